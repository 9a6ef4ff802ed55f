"""What of the source's parts a folder holds, as the card says it: text-only files of a model that also sees or hears."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantool.ledger import TOWERS, Ledger
from quantool.records import OutputPlan, Report
from quantool.report.holdings import of_experts, of_outputs

MULTIMODAL = frozenset({
    "image-text-to-text", "video-text-to-text", "audio-text-to-text", "image-to-text", "any-to-any", "visual-question-answering",
    "image-text-to-image", "audio-to-audio", "text-to-speech", "automatic-speech-recognition", "multimodal", "vision", "image",
    "vlm", "audio", "speech", "video",
})  # fmt: skip
"""Tasks and tags of the Hub that promise what a text-only file lacks."""
TEXT_ONLY = "text-only"
ADAPTER_END = "-lora.gguf"
"""How the names of adapters end, which no importance matrix has."""


def adapters(reports: Sequence[Report]) -> list[str]:
    """Names of the adapters that lie beside the files (``merge: false``)."""
    shared = (file.name for report in reports for file in report.artifact.shared)
    return list(dict.fromkeys(name for name in shared if name.endswith(ADAPTER_END)))


def ledgers(outputs: Iterable[OutputPlan]) -> list[Ledger]:
    """Those that the outputs have."""
    return [output.ledger for output in outputs if output.ledger is not None]


def is_text_only(outputs: Iterable[OutputPlan]) -> bool:
    """Whether a tower of the source is in none of them."""
    return any(ledger.parts_left_out().keys() & TOWERS for ledger in ledgers(outputs))


def task_of(outputs: Sequence[OutputPlan], task: str | None) -> str | None:
    """The pipeline tag: that of the source, as far as the files can still do it."""
    return "text-generation" if is_text_only(outputs) and (task is None or task in MULTIMODAL) else task


def tags_of(outputs: Sequence[OutputPlan], tags: Sequence[str]) -> list[str]:
    """The source's tags without those that promise what was left out, and that it was."""
    if not is_text_only(outputs):
        return [*tags]
    return [*(tag for tag in tags if tag.lower() not in MULTIMODAL), TEXT_ONLY]


def left_out_sentence(outputs: Iterable[OutputPlan]) -> str:
    """``Text only: the source's vision (0.4 B) left out.``; empty where nothing was."""
    statements = dict.fromkeys(text for ledger in ledgers(outputs) for text in ledger.left_out())
    if not statements:
        return ""
    start = "**Text only.** " if is_text_only(outputs) else ""
    return f"{start}Of the source's parts, not in these files: {', '.join(statements)}. "


def holdings(outputs: Sequence[OutputPlan]) -> list[str]:
    """What became of the source's tensors, as lines of Markdown."""
    return [f"- {ids}: {statement}" for ids, statement in of_outputs(outputs)]


def expert_coverage(reports: Sequence[Report]) -> list[str]:
    """What the experts saw of the calibration text, as lines of Markdown; none for a dense model."""
    return [f"- experts, {levels}: {statement}" for levels, statement in of_experts(reports)]
