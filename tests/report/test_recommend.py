from pathlib import Path

import pytest

from quantool.records import Artifact, FileRecord, Finding, Report, Verdict
from quantool.report.recommend import folders, recommend


def report(level: str, size: int, *divergences: float, verdict: Verdict = Verdict.PASS) -> Report:
    findings = [
        Finding(
            check="perplexity", metric="mean_kld", corpus=f"text-{number}", verdict=verdict, measured=value
        )
        for number, value in enumerate(divergences)
    ] or [Finding(check="integrity", metric="loads", verdict=verdict)]
    artifact = Artifact(
        output=f"gguf/{level}", method="gguf", level=level, folder=Path("out"), bits_per_weight=4.8, seconds=1,
        files=(FileRecord(name=f"m-{level}.gguf", bytes=size, sha256="ab" * 32),),
    )  # fmt: skip
    return Report(artifact=artifact, reference="org/m", findings=tuple(findings), seconds=1)


LLAMA_3_8B = [  # llama.cpp's tools/perplexity/README.md
    report("Q8_0", 854, 0.0014), report("Q6_K", 659, 0.0055), report("Q5_K_M", 573, 0.0108), report("Q4_K_M", 492, 0.0313),
    report("Q4_K_S", 469, 0.0431), report("Q3_K_L", 432, 0.0872), report("Q2_K", 318, 0.4451),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reports", "level"),
    [
        (LLAMA_3_8B, "Q4_K_S"),
        ([made for made in LLAMA_3_8B if made.artifact.level != "Q4_K_S"], "Q4_K_M"),
        (list(reversed(LLAMA_3_8B)), "Q4_K_S"),
        ([report("Q4_K_M", 4, 0.02, 0.06), report("Q5_K_M", 5, 0.01, 0.04)], "Q5_K_M"),  # one text is enough
        ([report("Q4_K_M", 4, 0.02, verdict=Verdict.REGRESSION), report("Q8_0", 8, 0.01)], "Q8_0"),
        ([report("Q2_K", 3, 0.4), report("Q3_K_M", 4, 0.2)], "Q3_K_M"),  # none is close: the nearest
        ([report("Q3_K_M", 3), report("Q8_0", 8), report("Q5_K_M", 5)], "Q5_K_M"),  # nothing was measured
        ([report("W4A16", 3)], "W4A16"),
    ],
)
def test_the_smallest_that_is_close_to_its_reference(reports: list[Report], level: str) -> None:
    chosen = recommend(reports)
    assert chosen is not None
    assert chosen.report.artifact.level == level


@pytest.mark.parametrize("verdict", [Verdict.REGRESSION, Verdict.ANOMALOUS, Verdict.SKIPPED])
def test_what_did_not_pass_is_never_recommended(verdict: Verdict) -> None:
    assert recommend([report("Q8_0", 8, 0.001, verdict=verdict)]) is None
    assert recommend([]) is None


def test_a_folder_of_several_files_says_which_to_take() -> None:
    alone = report("W4A16", 3, 0.02)
    alone = alone.model_copy(update={"artifact": alone.artifact.model_copy(update={"folder": Path("awq")})})
    assert folders([*LLAMA_3_8B, alone]) == ["folder: out (recommended: m-Q4_K_S.gguf)", "folder: awq"]
    failed = [report(level, 8, 0.001, verdict=Verdict.REGRESSION) for level in ("Q8_0", "Q6_K")]
    assert folders(failed) == ["folder: out"]
