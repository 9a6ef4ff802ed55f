"""What a card says of files that do not hold all of their source."""

from __future__ import annotations

from typing import Any

import pytest

from quantool.card import holdings
from quantool.card.card import front_matter
from quantool.ledger import ArtifactTensor, Fate, Ledger, TensorLine
from quantool.records import Artifact, Finding, Gates, ModelCard, OutputPlan, Report, Verdict
from quantool.report.holdings import of_outputs, of_reports
from quantool.tasks import Task

KEPT = TensorLine(
    name="model.layers.{0-1}.up",
    shape=(1000, 100),
    fate=Fate.QUANTIZED,
    to=(ArtifactTensor(name="blk.{0-1}.up", dtype="Q8_0", shape=(1000, 100)),),
)


def dropped(part: str) -> TensorLine:
    return TensorLine(
        name=f"{part}.{{0-3}}.w", shape=(1000, 1000), part=part, fate=Fate.DROPPED, reason="drop"
    )


def output(*parts: str, level: str = "Q8_0") -> OutputPlan:
    ledger = Ledger(tensors=(KEPT, *(dropped(part) for part in parts)))
    return OutputPlan(
        id=f"gguf/{level}", method="gguf", level=level, options={}, engine="llama.cpp", repo="r", repo_id=None, files=(),
        bits_per_weight=8.5, peak_ram=1, gates=Gates(), ledger=ledger,
    )  # fmt: skip


def test_a_whole_model() -> None:
    outputs = [output()]
    assert holdings.left_out_sentence(outputs) == ""
    assert holdings.task_of(outputs, "image-text-to-text") == "image-text-to-text"
    assert holdings.tags_of(outputs, ["vision"]) == ["vision"]
    assert holdings.holdings(outputs) == ["- gguf/Q8_0: 2 tensors: 2 in"]


def test_a_text_only_file() -> None:
    outputs = [output("vision"), output("vision", level="Q4_K_M")]
    assert holdings.left_out_sentence(outputs) == (
        "**Text only.** Of the source's parts, not in these files: vision (4.0 M). "
    )
    assert holdings.task_of(outputs, "image-text-to-text") == "text-generation"
    assert holdings.task_of(outputs, None) == "text-generation"
    assert holdings.task_of(outputs, "text-ranking") == "text-ranking"
    assert holdings.tags_of(outputs, ["Vision", "gemma", "multimodal"]) == ["gemma", "text-only"]
    assert of_outputs(outputs) == [
        (
            "gguf/Q8_0, gguf/Q4_K_M",
            "6 tensors: 2 in, 4 dropped; vision (4.0 M) left out: this is a text-only file",
        )
    ]


def test_a_head_that_is_left_out_changes_no_task() -> None:
    outputs = [output("mtp")]
    assert holdings.left_out_sentence(outputs) == ("Of the source's parts, not in these files: mtp (4.0 M). ")
    assert holdings.task_of(outputs, "image-text-to-text") == "image-text-to-text"
    assert holdings.tags_of(outputs, ["vision"]) == ["vision"]


def test_front_matter_of_a_text_only_file() -> None:
    card = ModelCard(pipeline_tag="image-text-to-text", tags=("vision", "gemma"))
    source: Any = type("Source", (), {})()
    source.card, source.commit = card, None
    source.facts = type("Facts", (), {"architecture": "Gemma3ForConditionalGeneration", "task": Task()})()
    front = front_matter(source, [output("vision")])
    assert (front["pipeline_tag"], front["tags"]) == (
        "text-generation",
        ["gemma", "text-only", "gguf", "quantized"],
    )


@pytest.mark.parametrize("verdict", [Verdict.PASS, Verdict.REGRESSION])
def test_the_report_says_what_was_found(verdict: Verdict) -> None:
    finding = Finding(check="ledger", metric="tensors", verdict=verdict, measured="2 tensors: 2 in")
    reports = [
        Report(
            artifact=Artifact(
                output=f"gguf/{level}", method="gguf", level=level, folder="x", files=(), bits_per_weight=1, seconds=1
            ),
            reference="r", findings=(finding,), seconds=1,
        )
        for level in ("Q8_0", "Q4_K_M")
    ]  # fmt: skip
    assert of_reports(reports) == "- Q8_0, Q4_K_M: 2 tensors: 2 in"
