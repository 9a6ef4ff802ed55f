import math
from pathlib import Path
from typing import Any

import pytest

from quantool.records import Artifact, FileRecord, Finding, Report, Verdict
from quantool.report.finding_text import failures
from quantool.report.table import HEADINGS, columns, markdown, table, terminal_width, write_step_summary

FILE = FileRecord(name="tiny-Q8_0.gguf", bytes=2_500_000, sha256="0123456789abcdef" * 4)


def finding(check: str, metric: str, verdict: Verdict = Verdict.PASS, **more: Any) -> Finding:
    return Finding(check=check, metric=metric, verdict=verdict, **more)


def figures(corpus: str, kld: float, verdict: Verdict = Verdict.PASS) -> list[Finding]:
    return [
        finding("perplexity", "perplexity", corpus=corpus, measured=10 + kld, reference=10.0),
        finding("perplexity", "mean_kld", verdict, corpus=corpus, measured=kld, threshold=0.01, error=0.001),
        finding("perplexity", "same_top_p", corpus=corpus, measured=1 - kld, threshold=0.9),
    ]


def report(*findings: Finding, level: str = "Q8_0", files: tuple[FileRecord, ...] = (FILE,)) -> Report:
    artifact = Artifact(
        output=f"gguf/{level}", method="gguf", level=level, folder=Path("out/tiny-GGUF"), files=files,
        bits_per_weight=8.5012, seconds=1.0,
    )  # fmt: skip
    return Report(artifact=artifact, reference="tiny", findings=findings, seconds=1.0)


def row(made: Report) -> dict[str, str]:
    return dict(zip(HEADINGS, columns(made), strict=True))


def test_a_row_shows_the_corpus_that_suffers_most() -> None:
    made = report(*figures("en", 0.002), *figures("eu", 0.005), *figures("es", 0.001))
    assert row(made) == {
        "file": "tiny-Q8_0.gguf", "size": "2.5 MB", "bpw": "8.50", "worst corpus": "eu", "perplexity": "10.005",
        "reference": "10", "mean KLD": "0.0050", "same top-p": "99.5 %", "template": "-",
        "verdict": "PASS", "SHA-256": "0123456789ab",
    }  # fmt: skip


def test_what_was_not_measured_is_a_dash() -> None:
    made = row(report())
    assert [made[name] for name in ("worst corpus", "perplexity", "reference", "mean KLD", "same top-p")] == [
        "-"
    ] * 5
    assert made["verdict"] == "SKIPPED"


@pytest.mark.parametrize(
    ("verdicts", "shown"),
    [
        ([Verdict.SKIPPED, Verdict.PASS], "PASS"),
        ([Verdict.SKIPPED], "SKIPPED"),
        ([Verdict.PASS, Verdict.REGRESSION, Verdict.PASS], "REGRESSION"),
        ([], "-"),
    ],
)
def test_the_verdict_on_the_template(verdicts: list[Verdict], shown: str) -> None:
    found = [finding("chat_template", "text", verdict) for verdict in verdicts]
    assert row(report(*found, finding("tokenizer", "ids", Verdict.ANOMALOUS)))["template"] == shown


def test_files_of_one_artifact_count_together() -> None:
    shards = tuple(FILE.model_copy(update={"name": f"tiny-{n}.gguf"}) for n in range(4))
    assert row(report(files=shards))["size"] == "10.0 MB"
    weights = FILE.model_copy(update={"name": "model.safetensors"})
    assert row(report(files=(weights,)))["file"] == "tiny-GGUF"


def test_columns_are_aligned() -> None:
    text = table([report(*figures("en", 0.002)), report(*figures("a-long-name", 0.25), level="IQ4_XS")])
    lines = text.splitlines()
    assert lines[0].split("  ")[0].strip() == "file"
    starts = {line.index(word) for line, word in zip(lines[1:], ("en ", "a-long-name"), strict=True)}
    assert len(starts) == 1
    assert lines[1].index("0.0020") == lines[2].index("0.2500")
    assert all(line == line.rstrip() for line in lines)


def test_failures_say_measured_limit_and_detail() -> None:
    made = report(
        *figures("en", 0.25, Verdict.REGRESSION),
        finding("chat_template", "text", Verdict.REGRESSION, detail="conversation 2: another text"),
        finding("tokenizer", "ids", Verdict.SKIPPED, detail="no normalizer"),
    )
    assert failures([made, report()]) == [
        "Q8_0: REGRESSION in perplexity: mean_kld 0.2500 ± 0.0010 on en, limit 0.01",
        "Q8_0: REGRESSION in chat_template: text: conversation 2: another text",
    ]


def test_a_corpus_that_failed_or_is_no_number_is_worse_than_a_larger_divergence() -> None:
    failed = report(*figures("en", 0.5), *figures("eu", 0.2, Verdict.REGRESSION))
    assert row(failed)["worst corpus"] == "eu"
    assert row(report(*figures("en", 0.5), *figures("eu", math.nan)))["worst corpus"] == "eu"


NARROW = [report(*figures("docs", 0.002)), report(*figures("docs", 0.25), level="IQ4_XS")]


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (200, []),
        (120, []),
        (110, ["SHA-256"]),
        (80, ["SHA-256", "template", "reference", "perplexity"]),
        (56, ["SHA-256", "template", "reference", "perplexity", "worst corpus", "bpw"]),
    ],
)
def test_a_narrow_terminal_goes_without_columns_the_hash_first(width: int, gone: list[str]) -> None:
    text = table(NARROW, width)
    assert max(map(len, text.splitlines())) <= width
    assert {head for head in HEADINGS if head not in text.splitlines()[0]} == set(gone)


def test_a_name_that_is_too_long_keeps_its_end() -> None:
    long = FILE.model_copy(update={"name": "salamandra-7b-instruct-tools-16k-Q4_K_M.gguf"})
    text = table([report(*figures("en", 0.002), files=(long,))], 40)
    assert max(map(len, text.splitlines())) <= 40
    assert text.splitlines()[1].split()[0].startswith("sal")
    assert "…" in text.splitlines()[1]
    assert text.splitlines()[1].split()[0].endswith("Q4_K_M.gguf")
    assert "PASS" in text


def test_the_width_is_what_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal_width() == 72
    monkeypatch.delenv("COLUMNS")
    assert terminal_width() is None  # a file or a pipe has none


def test_cells_do_not_break_a_markdown_table() -> None:
    assert markdown(["a", "b"], [["1|2", "3"]]) == "| a | b |\n|---|---|\n| 1&#124;2 | 3 |\n"


def test_a_summary_for_github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    write_step_summary([report(*figures("en", 0.25, Verdict.REGRESSION))])
    lines = summary.read_text().splitlines()
    assert lines[:3] == ["before", "## quantool", ""]
    assert lines[3].startswith("| file | size |")
    assert lines[5].startswith("| tiny-Q8_0.gguf | 2.5 MB |")
    assert lines[-1] == "- Q8_0: REGRESSION in perplexity: mean_kld 0.2500 ± 0.0010 on en, limit 0.01"


def test_no_summary_without_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.chdir(tmp_path)
    write_step_summary([report()])
    assert list(tmp_path.iterdir()) == []
