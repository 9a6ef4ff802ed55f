import math
from pathlib import Path

import pytest

from quantool.records import Artifact, Finding, Report, Verdict
from quantool.report.finding_text import failures, fields, number, percent, perplexity, verdict


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.0, 0.029, "1.000 ± 0.029"),  # was: 1 ± 0.029
        (0.00009, 0.0000004, "9.00e-05 ± 4e-07"),  # was: 0.00009 ± 0.00000
        (0.014047, 0.0002, "0.01405 ± 0.00020"),
        (61.1968, 0.18, "61.20 ± 0.18"),
        (0.857143, 0.12, "0.86 ± 0.12"),
        (0.914894, 0.0437, "0.91 ± 0.04"),
        (0.5, 0.0096, "0.500 ± 0.010"),
        (4.03e-07, 3.4e-08, "4.03e-07 ± 3.4e-08"),
        (-0.001225, 0.000459, "-0.0012 ± 0.0005"),
        (1234.5, 21.0, "1234 ± 21"),
        (0.0, 2e-9, "0e+00 ± 2.0e-09"),
        (1e-9, 1e-7, "1e-09 ± 1.0e-07"),
    ],
)
def test_digits_are_those_that_the_error_allows(value: float, error: float, text: str) -> None:
    assert number(value, error) == text
    assert number(value, error, plain=True) == text.split(" ± ", maxsplit=1)[0]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, None, "-"),
        ("Q4_K_M", None, "Q4_K_M"),
        (5245184.0, None, "5245184"),
        (0.0712345678, None, "0.0712346"),
        (0.1, 0.0, "0.1"),
        (0.1, math.nan, "0.1"),
        (math.nan, 0.1, "nan"),
        (math.inf, 0.1, "inf"),
    ],
)
def test_values_without_an_error_that_could_say_something(
    value: float | str | None, error: float | None, text: str
) -> None:
    assert number(value, error) == text


def finding(metric: str = "mean_kld", verdict: Verdict = Verdict.REGRESSION, **more: object) -> Finding:
    return Finding.model_validate({"check": "perplexity", "metric": metric, "verdict": verdict, **more})


def report(*findings: Finding, level: str = "Q4_K_M") -> Report:
    artifact = Artifact(
        output=f"gguf/{level}", method="gguf", level=level, folder=Path(), bits_per_weight=4.8, seconds=1, files=()
    )  # fmt: skip
    return Report(artifact=artifact, reference="org/m", findings=findings, seconds=1.5)


def test_a_share_is_a_percentage() -> None:
    assert percent(finding(measured=0.9096, error=0.0045)) == "91.0 ± 0.4 %"
    assert percent(finding(measured=0.9096)) == "90.96 %"
    assert percent(finding()) == "-"


def test_perplexities_have_the_digits_in_which_they_can_differ() -> None:
    """Their own error is that of the text, 2.9 here; what they differ by is known to 0.003 of them."""
    own = finding("perplexity", measured=61.19682, reference=60.131585, error=2.9, corpus="en")
    ratio = finding("ln_ppl_ratio", measured=0.01756, error=0.0029, corpus="en")
    assert perplexity(report(own, ratio), "en") == ("61.20", "60.13")
    assert perplexity(report(own), "en") == ("61.1968", "60.1316")
    assert perplexity(report(), "en") == ("-", "-")


def test_what_passes_beyond_its_limit_says_why() -> None:
    near = finding(
        verdict=Verdict.PASS, measured=0.857143, error=0.12, threshold=0.885, detail="beyond, within noise"
    )
    assert verdict(near) == "PASS (within noise)"
    assert verdict(near.model_copy(update={"detail": ""})) == "PASS"


def test_a_failure_is_one_short_line() -> None:
    """On 0.3.0 each corpus was a line of 280 characters that had the figures twice."""
    detail = "mean KL divergence: 0.0712 ± 0.002 on {}, beyond the upper limit 0.055"
    failed = [
        finding(corpus=corpus, measured=value, error=0.002, threshold=0.055, detail=detail.format(corpus))
        for corpus, value in (("en", 0.0712), ("eu", 0.1))
    ]
    assert failures([report(*failed)]) == [
        "Q4_K_M: REGRESSION in perplexity: mean_kld 0.0712 ± 0.0020 on en, 0.1000 ± 0.0020 on eu, limit 0.055"
    ]


def test_what_several_levels_fail_alike_is_said_once() -> None:
    template = Finding(
        check="chat_template",
        metric="text",
        verdict=Verdict.REGRESSION,
        detail=f"another text: {'x' * 300}\nand more",
    )
    (line,) = failures([report(template, template), report(template, level="Q8_0")])
    assert line.startswith("Q4_K_M, Q8_0: REGRESSION in chat_template: text: another text: xxx")
    assert line.endswith(" …")
    assert len(line) < 230
    assert "and more" not in line
    passed = template.model_copy(update={"verdict": Verdict.PASS})
    assert failures([report(passed)]) == []


def test_every_field_of_a_finding() -> None:
    full = finding(measured=0.5, error=0.25, reference="text", threshold=3.0, detail="a\nb")
    assert fields(full) == [
        "measured: 0.5",
        "standard error: 0.25",
        "reference: text",
        "threshold: 3",
        "a\nb",
    ]
    assert fields(finding()) == []
