"""Fitted files beside stock levels: what is better is named, what is not better too."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantool.records import Artifact, FileRecord, Finding, Report, Verdict
from quantool.report.files import as_markdown
from quantool.report.fitted import compare, is_fitted, sentences, stock_at


def report(level: str, size: int, error: float = 0.001, method: str = "gguf", **kld: float) -> Report:
    """A level whose name says whether it was fitted, with its mean KLD by corpus."""
    findings = [
        Finding(check="perplexity", metric="mean_kld", corpus=corpus, verdict=Verdict.PASS, measured=value, error=error)
        for corpus, value in kld.items()
    ]  # fmt: skip
    artifact = Artifact(
        output=f"{method}/{level}", method=method, level=level, folder=Path("out"), bits_per_weight=4.8, seconds=1,
        files=(FileRecord(name=f"m-{level}.gguf", bytes=size, sha256="ab" * 32),),
        details={"fit": {"size": size}} if "fit" in level else {},
    )  # fmt: skip
    return Report(artifact=artifact, reference="org/m", findings=tuple(findings), seconds=1)


STOCK = (
    report("Q3_K_M", 3_000_000, en=0.16, eu=0.25),
    report("Q4_K_M", 4_000_000, en=0.04, eu=0.09),
    report("Q8_0", 8_000_000, en=0.001, eu=0.002),
)


def test_between_two_levels_the_logarithm_is_a_straight_line() -> None:
    assert stock_at(STOCK, "en", 3_500_000) == pytest.approx(0.08)  # the geometric mean of 0.16 and 0.04
    assert stock_at(STOCK, "en", 4_015_000) == 0.04  # the level itself, within what a budget is missed by
    assert stock_at(STOCK, "en", 2_900_000) is None
    assert stock_at(STOCK, "en", 9_000_000) is None
    assert stock_at(STOCK, "gl", 3_500_000) is None


def test_a_file_that_is_better_everywhere() -> None:
    fitted = report("Q4_K_M-fit", 3_990_000, en=0.024, eu=0.0585)
    (comparison,) = compare([fitted, *STOCK])
    assert comparison.nearest.artifact.level == "Q4_K_M"
    assert comparison.ratios == pytest.approx({"en": 0.6, "eu": 0.65})
    assert comparison.losses == ()
    (sentence,) = sentences([*STOCK, fitted])
    assert sentence == (
        "`m-Q4_K_M-fit.gguf` has 0.60 to 0.65 of the mean KLD of stock levels at its size, on every text. Nearest stock file: "
        "`m-Q4_K_M.gguf`, of the same size, with 0.0900 beside 0.0585 nats on eu."
    )


def test_what_is_worse_in_one_language_is_said() -> None:
    fitted = report("Q4_K_M-fit", 3_990_000, en=0.024, eu=0.0901)
    (sentence,) = sentences([*STOCK, fitted])
    assert "has 0.60 to 1.00 of the mean KLD of stock levels at its size: **not better** on eu." in sentence


@pytest.mark.parametrize("kld", [0.0395, 0.04, 0.05])
def test_what_is_not_better_by_more_than_its_error_is_not_better(kld: float) -> None:
    fitted = report("Q4_K_M-fit", 4_000_000, en=kld)
    (sentence,) = sentences([*STOCK, fitted])
    assert "is **not better** than stock levels at its size" in sentence


def test_a_larger_file_is_held_to_its_own_size() -> None:
    """Below Q4_K_M's divergence, but with so many more bytes that stock levels would do better yet."""
    fitted = report("5GB-fit", 5_000_000, en=0.03, eu=0.08)
    (sentence,) = sentences([*STOCK, fitted])
    assert "**not better**" in sentence
    assert "`m-Q4_K_M.gguf`, 20.0 % smaller" in sentence


def test_nothing_is_compared_with_what_is_not_there() -> None:
    fitted = report("2GB-fit", 2_000_000, en=0.3)
    assert "No stock level here is near the size" in sentences([*STOCK, fitted])[0]
    assert "No stock level lies beside" in sentences([fitted])[0]
    assert (
        "No stock level lies beside" in sentences([fitted, report("FP8", 2_000_000, method="fp8", en=0.4)])[0]
    )
    assert "was not measured" in sentences([*STOCK, report("2GB-fit", 2_000_000)])[0]
    assert sentences(STOCK) == []
    assert not any(map(is_fitted, STOCK))


def test_the_report_says_it_too() -> None:
    fitted = report("Q4_K_M-fit", 3_990_000, en=0.05, eu=0.1)
    text = as_markdown([*STOCK, fitted], {}, {})
    assert "## Types chosen by measuring\n\n- `m-Q4_K_M-fit.gguf` is **not better**" in text
    assert "Types chosen" not in as_markdown(STOCK, {}, {})


def test_a_divergence_that_was_asked_for_is_held_against_every_text() -> None:
    searched = {"fit": "kld: 0.06", "kld": 0.06, "measured": 0.0512, "bound": 0.0593}
    fitted = report("Q4_K_M-fit", 3_990_000, en=0.024, eu=0.0585)
    kept = fitted.model_copy(update={"artifact": fitted.artifact.model_copy(update={"details": searched})})
    (sentence,) = sentences([*STOCK, kept])
    assert sentence.endswith(
        " Chosen to keep 0.06 nats: 0.0512 on calibration text, with 0.0593 as the upper bound of that mean."
    )
    searched["kld"] = 0.05
    (sentence,) = sentences([*STOCK, kept])
    assert sentence.endswith("of that mean; **exceeded** on eu (0.0585): text unlike the calibration text.")
