from pathlib import Path

from quantool.records import Artifact, Finding, Report, Verdict
from quantool.report.loss_origin import losses

PASS, REGRESSION, SKIPPED = Verdict.PASS, Verdict.REGRESSION, Verdict.SKIPPED


def report(*findings: Finding) -> Report:
    artifact = Artifact(
        output="gguf/Q4_K_M", method="gguf", level="Q4_K_M", folder=Path(), bits_per_weight=4.8, seconds=1, files=()
    )  # fmt: skip
    return Report(artifact=artifact, reference="org/m", findings=findings, seconds=1.5)


def finding(
    check: str, metric: str, verdict: Verdict = PASS, measured: float | None = None, corpus: str | None = None
) -> Finding:
    return Finding(check=check, metric=metric, verdict=verdict, measured=measured, corpus=corpus, error=0.001)


def conversion(verdict: Verdict, measured: float, corpus: str = "en") -> Finding:
    return finding("perplexity", "conversion_kld", verdict, measured, corpus)


TOKENS = finding("tokenizer", "ids")
KLD = finding("perplexity", "mean_kld", REGRESSION, 0.4, "en")
FROM_BASE = finding("perplexity", "quantization_kld", PASS, 0.3, "en")


def row(*findings: Finding) -> list[str]:
    """The cells of the one row."""
    text = losses([report(*findings)])[1]
    return [cell.strip() for cell in text.strip().splitlines()[2].strip("|").split("|")]


def test_every_damage_is_named() -> None:
    sound = conversion(PASS, 0.0002)
    assert row(TOKENS, sound, FROM_BASE) == [
        "Q4_K_M", "same", "0.0002 ± 0.0010 (en)", "0.3000 ± 0.0010 (en)", "nothing",
    ]  # fmt: skip
    assert row(TOKENS, sound, KLD)[-1] == "quantization"
    off = conversion(REGRESSION, 0.5, "eu")
    assert row(TOKENS, sound, off, KLD)[2:] == ["0.5000 ± 0.0010 (eu)", "-", "conversion"]
    wrong = finding("tokenizer", "bos", REGRESSION)
    assert row(wrong, sound)[1:5:3] == ["bos", "tokenizer"]
    assert row(wrong, off, KLD)[-1] == "tokenizer, conversion"


def test_what_cannot_be_told_apart_is_not_guessed() -> None:
    untold = finding("perplexity", "conversion_kld", SKIPPED)
    assert row(untold, KLD)[1:] == ["-", "-", "-", "conversion or quantization"]
    unquantized = finding("perplexity", "quantization_kld", SKIPPED)
    assert row(unquantized, KLD)[-1] == "conversion"
    unscorable = finding("perplexity", "perplexity", REGRESSION)
    assert row(unscorable, conversion(PASS, 0.0002))[-1] == "quantization"


def test_artifacts_without_a_conversion_have_no_such_section() -> None:
    assert losses([report(TOKENS, KLD)]) == []
