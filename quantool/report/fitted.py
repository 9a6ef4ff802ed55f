"""Files whose types were chosen by measured divergence, beside the stock levels of their size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantool.records import Report
from quantool.report.finding_text import figure
from quantool.report.table import file_name

FIT = "fit"
"""Key of an artifact's details that says for what its types were chosen; stock levels lack it."""
TOLERANCE = 0.005
"""Share of its size by which a file may be smaller than what it is compared with: what fills a budget lands so close."""


def is_fitted(report: Report) -> bool:
    """Whether the types of the artifact were chosen by measuring."""
    return bool(report.artifact.details.get(FIT))


def choice(report: Report) -> str:
    """For what its types were chosen, and how many layers got which where these are named; empty for stock levels."""
    if not is_fitted(report):
        return ""
    schemes = report.artifact.details.get("schemes")
    counts = Counter(schemes.values()) if isinstance(schemes, dict) else {}
    named = ", ".join(
        f"{count} {'layer' if count == 1 else 'layers'} {kind}" for kind, count in counts.items()
    )
    return f"types chosen by measuring, for {report.artifact.details[FIT]}" + (f": {named}" if named else "")


def divergences(report: Report) -> dict[str, float]:
    """Mean KLD in nats by corpus; what is no finite number is left out."""
    found: dict[str, float] = {}
    for finding in report.findings:
        value = finding.measured
        if (
            finding.metric == "mean_kld"
            and finding.corpus
            and isinstance(value, float)
            and math.isfinite(value)
        ):
            found.setdefault(finding.corpus, value)
    return found


@dataclass(frozen=True)
class Comparison:
    """A fitted file beside the stock file that is nearest in size.

    ``losses`` are the corpora where it is not better by more than one standard error.
    """

    report: Report
    nearest: Report
    ratios: dict[str, float]
    """By corpus: its mean KLD over that of stock levels at the same size (``stock_at``)."""
    losses: tuple[str, ...]


def compare(reports: Sequence[Report]) -> list[Comparison]:
    """Every fitted file of ``reports`` that has stock files of its method to compare with, in the order of their sizes."""
    found = []
    for report in _by_size(filter(is_fitted, reports)):
        stock = _stock_beside(report, reports)
        size, own = report.artifact.bytes(), divergences(report)
        expected = {corpus: stock_at(stock, corpus, size) for corpus in own}
        ratios = {corpus: own[corpus] / value for corpus, value in expected.items() if value}
        if ratios:
            nearest = min(stock, key=lambda other: abs(other.artifact.bytes() - size))
            losses = tuple(c for c in ratios if own[c] + _error(report, c) >= (expected[c] or 0.0))
            found.append(Comparison(report, nearest, ratios, losses))
    return found


def _by_size(reports: Iterable[Report]) -> list[Report]:
    return sorted(reports, key=lambda report: report.artifact.bytes())


def _stock_beside(report: Report, reports: Iterable[Report]) -> list[Report]:
    """Judged stock levels of the same method."""
    same = (r for r in reports if r.artifact.method == report.artifact.method and not is_fitted(r))
    return _by_size(r for r in same if divergences(r))


def _error(report: Report, corpus: str) -> float:
    found = report.find("mean_kld", corpus)
    return found.error if found and found.error is not None and math.isfinite(found.error) else 0.0


def stock_at(stock: Sequence[Report], corpus: str, size: int) -> float | None:
    """Mean KLD that stock levels have on ``corpus`` at ``size`` bytes; None where the size is beyond all of them.

    Between two levels on the straight line of its logarithm, which is nearly straight over bits (Q2_K to Q8_0 of the
    published figures in llama.cpp's tools/perplexity/README.md). ``stock`` rises in size.
    """
    points = [
        (r.artifact.bytes(), known[corpus]) for r in stock if (known := divergences(r)).get(corpus, 0) > 0
    ]
    for bytes_, value in points:
        if abs(bytes_ - size) <= TOLERANCE * bytes_:
            return value
    for (left, high), (right, low) in pairwise(points):
        if left < size < right:
            share = (size - left) / (right - left)
            return math.exp((1 - share) * math.log(high) + share * math.log(low))
    return None


def sentences(reports: Sequence[Report]) -> list[str]:
    """One for each fitted file: how it compares with stock at its size, also where it is not better."""
    compared = {id(comparison.report): comparison for comparison in compare(reports)}
    lines = []
    for report in _by_size(filter(is_fitted, reports)):
        comparison = compared.get(id(report))
        lines.append(
            (_sentence(comparison) if comparison else _incomparable(report, reports)) + _kept(report)
        )
    return lines


def _sentence(comparison: Comparison) -> str:
    report, nearest, ratios = comparison.report, comparison.nearest, comparison.ratios
    low, high = min(ratios.values()), max(ratios.values())
    span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    own = divergences(report)
    corpus = max(ratios, key=lambda name: own[name])
    beside = [figure(entry.find("mean_kld", corpus), plain=True) for entry in (nearest, report)]
    figures = (
        f" Nearest stock file: `{file_name(nearest)}`, {_apart(report, nearest)}, with {beside[0]} beside {beside[1]} nats on "
        f"{corpus}."
    )
    if not comparison.losses:
        return f"`{file_name(report)}` has {span} of the mean KLD of stock levels at its size, on every text.{figures}"
    if len(comparison.losses) == len(ratios):
        return f"`{file_name(report)}` is **not better** than stock levels at its size ({span} of their mean KLD).{figures}"
    where = ", ".join(comparison.losses)
    return f"`{file_name(report)}` has {span} of the mean KLD of stock levels at its size: **not better** on {where}.{figures}"


def _kept(report: Report) -> str:
    """Of a divergence that was asked for: what the calibration text said of it, and the held-out texts that exceed it."""
    details = report.artifact.details
    asked, measured, bound = (details.get(key) for key in ("kld", "measured", "bound"))
    if not (isinstance(asked, float) and isinstance(measured, float) and isinstance(bound, float)):
        return ""
    above = ", ".join(
        f"{corpus} ({value:.4g})" for corpus, value in divergences(report).items() if value > asked
    )
    chosen = f" Chosen to keep {asked:g} nats: {measured:.4g} on calibration text, with {bound:.4g} as the upper bound of that mean"
    return f"{chosen}; **exceeded** on {above}: text unlike the calibration text." if above else f"{chosen}."


def _incomparable(report: Report, reports: Sequence[Report]) -> str:
    name = file_name(report)
    if not divergences(report):
        return f"`{name}` was chosen by measuring on calibration text; how it compares with stock levels was not measured."
    if not _stock_beside(report, reports):
        return f"No stock level lies beside `{name}`, so nothing here says whether it is better at its size."
    return f"No stock level here is near the size of `{name}`, so nothing here says whether it is better at its size."


def _apart(report: Report, other: Report) -> str:
    """How much larger or smaller another file is."""
    share = other.artifact.bytes() / report.artifact.bytes() - 1
    if abs(share) < TOLERANCE:
        return "of the same size"
    return f"{abs(share):.1%} {'larger' if share > 0 else 'smaller'}".replace("%", " %")
