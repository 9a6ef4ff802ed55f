import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantool.records import Artifact, FileRecord, Finding, Report, Verdict
from quantool.report import plots
from quantool.report.plots import CORPORA, SIZE, draw, existing_plots, wanted
from quantool.runtime.workspace import Workspace

LEVELS = {"Q8_0": (8_500_000, 0.0014), "Q4_K_M": (4_900_000, 0.031), "Q2_K": (3_000_000, 0.45)}


def report(level: str, *corpora: str, **values: float | None) -> Report:
    """The figures of one level: another corpus has twice the divergence; ``values`` replace them."""
    size, divergence = LEVELS[level]
    findings = []
    for number, corpus in enumerate(corpora, 1):
        figures = {"mean_kld": number * divergence, "ln_ppl_ratio": -divergence / number, "error": 0.0001}
        figures |= values  # type: ignore[arg-type]
        findings += [
            Finding(check="perplexity", metric=metric, corpus=corpus, verdict=Verdict.PASS,
                    measured=figures[metric], error=figures["error"])
            for metric in ("mean_kld", "ln_ppl_ratio")
        ]  # fmt: skip
    artifact = Artifact(
        output=f"gguf/{level}", method="gguf", level=level, folder=Path("out"), bits_per_weight=4.8, seconds=1,
        files=(FileRecord(name=f"m-{level}.gguf", bytes=size, sha256="ab" * 32),),
    )  # fmt: skip
    return Report(artifact=artifact, reference="org/m", findings=tuple(findings), seconds=1)


TWO = (report("Q8_0", "en", "eu"), report("Q4_K_M", "en", "eu"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "out")


def chunks(content: bytes) -> Iterator[str]:
    """Types of the chunks of a PNG file."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    place = 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        yield content[place + 4 : place + 8].decode()
        place += 12 + length


@pytest.mark.parametrize(
    ("reports", "names"),
    [
        ([], ()),
        ([report("Q8_0")], ()),
        ([report("Q8_0", "en")], ()),
        ([report("Q8_0", "en", "eu")], (CORPORA,)),
        ([report("Q8_0", "en"), report("Q4_K_M")], ()),
        ([report("Q8_0", "en"), report("Q4_K_M", "en")], (SIZE, CORPORA)),
        (TWO, (SIZE, CORPORA)),
        ([report("Q8_0", "en", mean_kld=float("nan")), report("Q4_K_M", "en")], ()),
    ],
)
def test_pictures_compare_something(
    reports: list[Report], names: tuple[str, ...], workspace: Workspace
) -> None:
    assert wanted(reports) == names
    assert draw(reports, workspace.root, "m", workspace) == names
    assert existing_plots(workspace.root) == names


def test_bytes_depend_on_the_figures_alone(workspace: Workspace, tmp_path: Path) -> None:
    """Another process, years later, with settings of its own."""
    draw(TWO, workspace.root, "m", workspace)
    rc = tmp_path / "matplotlibrc"
    rc.write_text("font.size: 30\nlines.linewidth: 9\nsavefig.dpi: 20\nsavefig.transparent: True\n")
    code = (
        "import sys; from pathlib import Path; from quantool.report.plots import draw\n"
        "from quantool.records import Report; from quantool.runtime.workspace import Workspace\n"
        "reports = [Report.model_validate_json(line) for line in sys.stdin]\n"
        "draw(reports, Path(sys.argv[1]), 'm', Workspace(Path(sys.argv[1])))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other")],
        input="\n".join(made.model_dump_json() for made in TWO),
        text=True,
        check=True,
        env={**os.environ, "MATPLOTLIBRC": str(rc), "MPLBACKEND": "svg", "SOURCE_DATE_EPOCH": "2000000000"},
    )
    for name in (SIZE, CORPORA):
        content = (workspace.root / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() == content
        assert set(chunks(content)) == {"IHDR", "pHYs", "IDAT", "IEND"}  # neither text nor time


def test_finished_pictures_stay_as_they_are(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(TWO, workspace.root, "m", workspace)
    with monkeypatch.context() as patch:
        patch.setattr(plots, "_save", None)  # nothing may be drawn
        assert draw(TWO, workspace.root, "m", workspace) == (SIZE, CORPORA)
    path = workspace.root / CORPORA
    before = path.read_bytes()
    path.write_bytes(b"touched")
    draw(TWO, workspace.root, "m", workspace)
    assert path.read_bytes() == before
    draw([TWO[0], report("Q4_K_M", "en", "eu", mean_kld=0.5)], workspace.root, "m", workspace)
    assert path.read_bytes() != before


def test_pictures_of_another_run_do_not_stay(workspace: Workspace) -> None:
    mine = workspace.root / "plots" / "mine.png"
    draw(TWO, workspace.root, "m", workspace)
    mine.write_bytes(b"")
    assert draw(TWO[:1], workspace.root, "m", workspace) == (CORPORA,)
    assert draw([report("Q8_0", "en")], workspace.root, "m", workspace) == ()
    assert list((workspace.root / "plots").iterdir()) == [mine]


def test_a_line_for_each_corpus_and_a_name_at_each_level() -> None:
    drawn: Any = plots._size_kld([report("Q4_K_M", "en", "eu"), report("Q8_0", "en", "eu")], "m").axes
    (axes,) = drawn
    lines = {bars.get_label(): bars.lines[0] for bars in axes.containers}
    assert list(lines) == ["en", "eu"]
    assert lines["eu"].get_xydata().tolist() == [[4.9, 0.062], [8.5, 0.0028]]
    assert [text.get_text() for text in axes.texts] == ["Q4_K_M", "Q8_0 (recommended)"]
    assert [text.xy for text in axes.texts] == [(4.9, 0.062), (8.5, 0.0028)]
    assert axes.get_xlabel() == "size of the files (MB)"


def test_fitted_files_have_a_line_of_their_own() -> None:
    """The stock levels' line does not bend to a file that was fitted."""
    fitted = report("Q4_K_M", "en", mean_kld=0.02)
    artifact = fitted.artifact.model_copy(
        update={"level": "Q4_K_M-fit", "details": {"fit": {"size": 4_900_000}}}
    )
    fitted = fitted.model_copy(update={"artifact": artifact})
    drawn: Any = plots._size_kld([report("Q4_K_M", "en"), fitted, report("Q8_0", "en")], "m").axes
    lines = {bars.get_label(): bars.lines[0] for bars in drawn[0].containers}
    assert lines["en"].get_xydata().tolist() == [[4.9, 0.031], [8.5, 0.0014]]
    assert lines["en, fitted"].get_xydata().tolist() == [[4.9, 0.02]]
    assert (lines["en"].get_linestyle(), lines["en, fitted"].get_linestyle()) == ("-", ":")
    assert {text.get_text().split(" ")[0] for text in drawn[0].texts} == {"Q4_K_M", "Q4_K_M-fit", "Q8_0"}


def test_a_level_that_lacks_a_corpus_leaves_its_place_empty() -> None:
    panels: Any = plots._corpus_bars([report("Q4_K_M", "en"), report("Q8_0", "en", "eu")], "m").axes
    groups = [[group for group in axes.containers if hasattr(group, "patches")] for axes in panels]
    heights = [[[bar.get_height() for bar in group] for group in panel] for panel in groups]
    assert heights == [[[0.031], [0.0014, 0.0028]], [[-0.031], [-0.0014, -0.0007]]]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["en", "eu"]
    for group in groups[1]:
        low, high = group.errorbar.lines[2][0].get_segments()[0][:, 1]
        assert high - low == pytest.approx(0.0002)  # one standard error to each side


@pytest.mark.parametrize(
    "odd",
    [
        [report("Q8_0", "en", mean_kld=0.0), report("Q4_K_M", "en")],
        [report("Q8_0", "en", mean_kld=-1e-9), report("Q4_K_M", "en", mean_kld=0.0)],
        [report("Q8_0", "en", mean_kld=0.0), report("Q4_K_M", "en", mean_kld=0.0)],
        [report("Q8_0", "en", error=None), report("Q4_K_M", "en", error=float("inf"))],
        [report("Q8_0", "a$b$", "中文"), report("Q2_K", "a$b$", "中文")],
        [report("Q8_0", "en"), report("Q8_0", "en")],
        [report(level, *(f"language-{number}" for number in range(40))) for level in LEVELS],
    ],
)
def test_odd_figures_and_names_are_drawn_without_a_warning(odd: Any, workspace: Workspace) -> None:
    assert draw(odd, workspace.root, "100 $ $ 模型", workspace) == (SIZE, CORPORA)


@pytest.mark.parametrize(
    "points",
    [
        [(0.0, 0.0)],
        [(0.0, 100.0), (200.0, 50.0)],
        [(100.0, 50.0)] * 3,
        [(10.0 * number, 100.0 - number) for number in range(30)],
    ],
)
def test_names_keep_apart(points: list[tuple[float, float]]) -> None:
    heights = plots._heights(points, [6] * len(points))
    width, line = 6 * plots.LETTER[0], plots.LETTER[1]
    boxes = [(x, y + height) for (x, y), height in zip(points, heights, strict=True)]
    for number, (x, y) in enumerate(boxes):
        for other_x, other_y in boxes[:number]:
            assert abs(x - other_x) >= width or abs(y - other_y) >= line
    if len(points) <= 2:
        assert set(heights) == {line / 2}  # nothing is in the way: right beside the point


def test_the_axis_of_sizes_does_not_begin_at_zero() -> None:
    drawn: Any = plots._size_kld([report("Q4_K_M", "en"), report("Q8_0", "en")], "m").axes
    low, high = drawn[0].get_xlim()
    assert 4.0 < low < 4.9
    assert 8.5 < high < 9.5
