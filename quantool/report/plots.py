"""Pictures for the model card: size against divergence over the levels, and both figures of every corpus.

Bytes are the same for the same figures and the same matplotlib: no date, no name of the software, no setting of the
user, no font but matplotlib's own. Colours are told apart by the colour-blind: Okabe and Ito's palette
(https://jfly.uni-koeln.de/color/) for corpora, viridis for levels, which have an order.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.records import Report, fingerprint
from quantool.report.fitted import is_fitted
from quantool.report.recommend import recommend
from quantool.runtime.workspace import Workspace, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

SIZE = "plots/size-kld.png"
CORPORA = "plots/corpora.png"
CAPTIONS = {
    SIZE: "Size of each level against its mean KL divergence from the reference, one line a corpus; types chosen by "
    "measuring on a dotted line of their own",
    CORPORA: "Mean KL divergence and ln(PPL ratio) of each level on each corpus, with standard errors",
}
"""What each picture shows, by its name relative to the folder that holds it."""

DRAWING = 3  # goes up when the same figures shall look different: finished pictures are drawn again
KLD, RATIO = "mean_kld", "ln_ppl_ratio"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.")
FITTED_DASH = ":"
"""Files whose types were chosen by measuring, apart from the stock levels."""
DPI = 144
FRAME = (450.0, 290.0)  # about the size of the axes of a size plot, in points
ASIDE = 3.0  # points from a level's point to its name
LETTER = (5.6, 12.0)  # about the size of a letter of a level's name, in points
DECADES = 20  # a quotient of largest and smallest beyond which a linear axis hides the small ones


def draw(reports: Sequence[Report], folder: Path, title: str, workspace: Workspace) -> tuple[str, ...]:
    """Draw what these reports have figures for into ``folder``; names relative to it, in the order of ``CAPTIONS``.

    Pictures of the same figures that are still there stay as they are; of another run's none is left.
    """
    drawn = wanted(reports)
    for name in CAPTIONS.keys() - set(drawn):
        (folder / name).unlink(missing_ok=True)
    if not drawn:
        return ()

    def produce() -> tuple[list[Path], dict[str, Any]]:
        for name in drawn:
            with written(folder / name) as part, _plain_style():
                _save(_DRAWINGS[name](_by_size(reports), title), part)
        return [folder / name for name in drawn], {}

    figures = [
        [
            report.artifact.level,
            report.artifact.bytes(),
            _figures(report, KLD),
            _figures(report, RATIO),
            is_fitted(report),
        ]
        for report in reports
    ]
    key = fingerprint(DRAWING, version("matplotlib"), title, drawn, figures, _recommended(reports))
    workspace.stage(f"plots/{folder.relative_to(workspace.root)}", key, produce)
    return drawn


def wanted(reports: Sequence[Report]) -> tuple[str, ...]:
    """Names of the pictures that compare something: two levels, or two corpora."""
    levels = [report for report in reports if _figures(report, KLD)]
    several = len(levels) > 1
    names = [SIZE] if several else []
    if several or len(_corpora(reports)) > 1:
        names.append(CORPORA)
    return tuple(names)


def existing_plots(folder: Path) -> tuple[str, ...]:
    """Names of the pictures that ``draw`` left in ``folder``."""
    return tuple(name for name in CAPTIONS if (folder / name).is_file())


def _figures(report: Report, metric: str) -> dict[str, tuple[float, float]]:
    """Value and standard error (0 when none is known) by corpus; what is no finite number is left out."""
    values: dict[str, tuple[float, float]] = {}
    for finding in report.findings:
        if finding.metric == metric and finding.corpus and isinstance(finding.measured, float):
            error = finding.error if finding.error is not None and math.isfinite(finding.error) else 0.0
            if math.isfinite(finding.measured):
                values.setdefault(finding.corpus, (finding.measured, error))
    return values


def _recommended(reports: Sequence[Report]) -> str | None:
    """The level that the card says to take."""
    chosen = recommend(reports)
    return chosen.report.artifact.level if chosen else None


def _corpora(reports: Sequence[Report]) -> list[str]:
    names = [corpus for metric in (KLD, RATIO) for report in reports for corpus in _figures(report, metric)]
    return list(dict.fromkeys(names))


def _by_size(reports: Sequence[Report]) -> list[Report]:
    return sorted(reports, key=lambda report: report.artifact.bytes())


def _size_kld(reports: Sequence[Report], title: str) -> Figure:
    """One line a corpus over the sizes of the files, another of the fitted ones; each level is named once, above its topmost point."""
    from matplotlib.figure import Figure

    reports = [report for report in reports if _figures(report, KLD)]
    unit, divisor = _unit(max(report.artifact.bytes() for report in reports))
    sizes = [report.artifact.bytes() / divisor for report in reports]
    figures = [_figures(report, KLD) for report in reports]
    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    kinds = [is_fitted(report) for report in reports]
    for number, corpus in enumerate(_corpora(reports)):
        known_to_all = zip(sizes, figures, kinds, strict=True)
        points = [(kind, size, *known[corpus]) for size, known, kind in known_to_all if corpus in known]
        for fitted in sorted({kind for kind, *_ in points}):
            x, y, errors = zip(
                *((size, *known) for kind, size, *known in points if kind is fitted), strict=True
            )
            axes.errorbar(
                x, y, yerr=errors, label=f"{corpus}, fitted" if fitted else corpus, capsize=2, markersize=5, linewidth=1.4,
                color=PALETTE[number % len(PALETTE)],
                marker=MARKERS[number % len(MARKERS)],
                markerfacecolor="white" if fitted else None,
                linestyle=FITTED_DASH if fitted else DASHES[number // len(PALETTE) % len(DASHES)],
            )  # fmt: skip
    values = [value for known in figures for value, _ in known.values()]
    if min(values) > 0 and max(values) > DECADES * min(values):
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 2, max(values) * 4)
        axes.yaxis.set_major_formatter(_plain_numbers())
    else:
        _scale(axes, values)
    margin = 0.08 * (max(sizes) - min(sizes)) or 0.05 * sizes[0]
    axes.set_xlim(min(sizes) - margin, max(sizes) + 2 * margin)
    tops = [max(value for value, _ in known.values()) for known in figures]
    _name_levels(axes, [report.artifact.level for report in reports], sizes, tops, _recommended(reports))
    axes.set_xlabel(f"size of the files ({unit})")
    axes.set_ylabel("mean KL divergence (nats)")
    _finish(figure, axes, title, "corpus")
    return figure


def _name_levels(
    axes: Axes, levels: Sequence[str], sizes: Sequence[float], tops: Sequence[float], chosen: str | None
) -> None:
    """Each level's name above its topmost point, higher where it would lie on another; a ring around the recommended."""
    names = [f"{level} (recommended)" if level == chosen else level for level in levels]
    points = axes.transAxes.inverted().transform(
        axes.transData.transform(list(zip(sizes, tops, strict=True)))
    )
    heights = _heights([(float(x) * FRAME[0], float(y) * FRAME[1]) for x, y in points], list(map(len, names)))
    for level, name, size, top, height in zip(levels, names, sizes, tops, heights, strict=True):
        leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6} if height > LETTER[1] else None
        axes.annotate(
            name, (size, top), xytext=(ASIDE + 5 * (level == chosen), height), textcoords="offset points", fontsize=9, ha="left", va="bottom",
            fontweight="bold" if level == chosen else "normal", arrowprops=leader, annotation_clip=False,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
        if level == chosen:
            axes.plot(
                [size], [top], marker="o", markersize=13, markerfacecolor="none", markeredgecolor="#000000"
            )


def _heights(points: Sequence[tuple[float, float]], lengths: Sequence[int]) -> list[float]:
    """How far above its point each name stands, so that it lies on no other name and on no point.

    ``points`` rise in x; each name begins ``ASIDE`` to the right of its point and has so many letters. All in points of
    the print.
    """
    taken: list[tuple[float, float, float]] = []  # left, right, bottom
    heights = []
    for (x, y), letters in zip(points, lengths, strict=True):
        left, right, height = x + ASIDE, x + ASIDE + letters * LETTER[0], LETTER[1] / 2
        while any(left < r and ll < right and abs(y + height - b) < LETTER[1] for ll, r, b in taken) or any(
            left < px < right and -LETTER[1] / 2 < py - y - height < 1.5 * LETTER[1] for px, py in points
        ):
            height += LETTER[1] / 2
        taken.append((left, right, y + height))
        heights.append(height)
    return heights


def _corpus_bars(reports: Sequence[Report], title: str) -> Figure:
    """Two panels over the corpora: mean KL divergence and ln(PPL ratio), a bar for each level, ± a standard error."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    corpora = _corpora(reports)
    reports = [report for report in reports if _figures(report, KLD) or _figures(report, RATIO)]
    inches = min(max(8.0, 1.5 + 0.22 * len(corpora) * len(reports)), 16.0)
    figure = Figure(figsize=(inches, 7), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    heads = (KLD, "mean KL divergence (nats)"), (RATIO, "ln(PPL / PPL of the reference)")
    shades = colormaps["viridis"]
    width = 0.84 / len(reports)
    for axes, (metric, head) in zip(panels, heads, strict=True):
        every: list[float] = []
        for number, report in enumerate(reports):
            known = _figures(report, metric)
            places = [corpora.index(corpus) + (number + 0.5) * width - 0.42 for corpus in known]
            values, errors = [value for value, _ in known.values()], [error for _, error in known.values()]
            every += values
            axes.bar(
                places, values, width * 0.92, yerr=errors, label=report.artifact.level,
                color=shades(0.92 * number / max(1, len(reports) - 1)), edgecolor="#333333", linewidth=0.4,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
            )  # fmt: skip
        if metric == KLD:
            _scale(axes, every)
        axes.axhline(0, color="#333333", linewidth=0.8)
        axes.set_ylabel(head)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    crowded = max(map(len, corpora)) * len(corpora) > 11 * inches
    panels[1].set_xticks(
        range(len(corpora)), corpora, rotation=40 if crowded else 0, ha="right" if crowded else "center"
    )
    _finish(figure, panels[0], title, "level")
    return figure


_DRAWINGS = {SIZE: _size_kld, CORPORA: _corpus_bars}


def _unit(size: float) -> tuple[str, float]:
    """The decimal unit for sizes up to ``size`` bytes."""
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    return next(((name, bytes_) for name, bytes_ in units.items() if size >= bytes_), ("B", 1.0))


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis that still has a zero, when the values span decades; else from zero in even steps."""
    from matplotlib.ticker import NullLocator

    positive = [value for value in values if value > 0]
    if positive and max(positive) > DECADES * min(positive):
        smallest = 10.0 ** math.floor(math.log10(min(positive)))
        axes.set_yscale("symlog", linthresh=smallest, linscale=0.4)
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_plain_numbers())
    top = max(values, default=0.0)
    if top > 0 and min(values) >= 0:
        axes.set_ylim(0, 1.3 * top)


def _plain_numbers() -> FuncFormatter:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}")


def _finish(figure: Figure, axes: Axes, title: str, names: str) -> None:
    figure.suptitle(title, fontsize=11)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), title=names, loc="outside right upper", frameon=False)


@contextmanager
def _plain_style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's matplotlibrc says; a name is text, also with dollars in it."""
    import matplotlib.style

    with matplotlib.style.context(["default", {"text.parse_math": False}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)  # another script: the font shows boxes
        yield


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", metadata={"Software": None})
