"""Tables and recommendation of models that make one vector or a few logits."""

import math
from pathlib import Path
from typing import Any

import pytest

from quantool.gates import default_gates, task_limits
from quantool.records import Artifact, FileRecord, Finding, Report, Verdict
from quantool.report.pooled import loss, meaning, pooled_metrics, shown, worst_pooled
from quantool.report.recommend import recommend
from quantool.report.table import columns, headings, rows_of, table
from quantool.tasks import TaskKind


def report(level: str, size: int, *figures: tuple[str, str, float | None], **changes: Any) -> Report:
    found = [
        Finding(check="embedding", metric=metric, corpus=corpus, verdict=Verdict.PASS, measured=value)
        for metric, corpus, value in figures
    ]
    artifact = Artifact(
        output=f"gguf/{level}", method="gguf", level=level, folder=Path("out"), bits_per_weight=4.8, seconds=1,
        files=(FileRecord(name=f"m-{level}.gguf", bytes=size, sha256="ab" * 32),),
    )  # fmt: skip
    made = Report(artifact=artifact, reference="org/m", findings=tuple(found), seconds=1)
    return made.model_copy(update=changes)


EMBEDDED = [
    report("Q8_0", 8, ("cosine", "en", 0.99995), ("recall_at_10", "en", 0.99), ("cosine", "eu", 0.9997), ("recall_at_10", "eu", 0.97)),
    report("Q4_K_M", 4, ("cosine", "en", 0.991), ("recall_at_10", "en", 0.93), ("cosine", "eu", 0.995), ("recall_at_10", "eu", 0.95)),
    report("Q2_K", 2, ("cosine", "en", 0.9), ("recall_at_10", "en", 0.6)),
]  # fmt: skip


def test_the_columns_are_those_of_the_task() -> None:
    assert headings(EMBEDDED) == (
        "file", "size", "bpw", "worst corpus", "cosine", "recall@10", "verdict", "SHA-256",
    )  # fmt: skip
    assert rows_of(EMBEDDED)[0][3:6] == ["eu", "0.99970", "0.97"]
    assert rows_of(EMBEDDED)[1][3:6] == ["en", "0.99100", "0.93"]
    assert "recall@10" in table(EMBEDDED)
    assert max(map(len, table(EMBEDDED, 60).splitlines())) <= 60
    assert "nearest" in meaning(EMBEDDED)


def test_one_that_could_not_be_measured_keeps_its_row() -> None:
    broken = report("Q3_K_M", 3, ("cosine", "en", None))
    rows = rows_of([*EMBEDDED, broken])
    assert {len(row) for row in rows} == {8}
    assert rows[-1][3:6] == ["en", "-", "-"]
    assert math.isinf(loss(broken.findings[0]))


def test_models_that_write_text_have_their_own_columns() -> None:
    plain = report("Q8_0", 8, ("mean_kld", "en", 0.01), ("perplexity", "en", 7.0))
    assert "perplexity" in headings([plain])
    assert (pooled_metrics([plain]), worst_pooled(plain)) == ([], None)
    assert len(columns(plain)) == len(headings([plain]))


def test_the_smallest_close_one_is_recommended() -> None:
    chosen = recommend(EMBEDDED)
    assert chosen is not None
    assert chosen.report.artifact.level == "Q4_K_M"
    assert (
        chosen.reason
        == "the smallest that stays close to the original (cosine of at least 0.9875 on every text)"
    )
    scored = [report("Q8_0", 8, ("logit_error", "en", 0.01)), report("Q2_K", 2, ("logit_error", "en", 0.4))]
    chosen = recommend(scored)
    assert chosen is not None
    assert (chosen.report.artifact.level, "logit error of at most 0.1" in chosen.reason) == ("Q8_0", True)


def test_a_loss_is_measured_as_the_limits_are() -> None:
    limits = task_limits(0.04)
    for metric, limit in (("cosine", limits["min_cosine"]), ("logit_error", limits["max_logit_error"])):
        finding = Finding(check="x", metric=metric, verdict=Verdict.PASS, measured=limit)
        assert loss(finding) == pytest.approx(0.04)


def test_digits_of_a_cosine() -> None:
    finding = Finding(check="x", metric="cosine", verdict=Verdict.PASS, measured=0.99995043, error=1e-6)
    assert shown(finding) == "0.99995"
    assert shown(None) == "-"


def test_a_cosine_of_0_999_is_the_limit_of_q8_0() -> None:
    assert default_gates("Q8_0", TaskKind.EMBEDDING).min_cosine == pytest.approx(0.999)
