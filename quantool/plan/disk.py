"""The stages of a run in order, what they write, and whether the disk has room for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantool.errors import DependencyError
from quantool.plugins.contract import Outline
from quantool.records import MachineState, OutputPlan, Source, StagePlan
from quantool.runtime.progress import amount
from quantool.source.prepare import PEAK, STAGE, is_prepared


def stages(
    source: Source,
    outlines: Sequence[Outline],
    outputs: Sequence[OutputPlan],
    downloads: int,
    judging: int = 0,
    *,
    holds_model: bool = True,
) -> tuple[StagePlan, ...]:
    """The steps of the run in order; a stage that several methods share stands once.

    ``downloads`` and ``judging`` are the bytes still to fetch, and those that the checks keep; ``holds_model`` says that
    one of them needs the checkpoint in memory as a whole, where the others take it layer by layer if they must.
    """
    shared = {stage.name: stage for outline in outlines for stage in outline.stages}
    scanned = all(file.sha256 for file in source.files)
    steps = [StagePlan(name="download", writes=downloads, peak_ram=0, done=not downloads)]
    if source.prepared is not None:
        size = sum(file.bytes for file in source.files)
        steps.append(StagePlan(name=STAGE, writes=size, peak_ram=PEAK, done=is_prepared(source)))
    steps.append(StagePlan(name="scan", writes=0, peak_ram=100 << 20, done=scanned))
    steps += shared.values()
    for output in outputs:
        size = sum(file.bytes for file in output.files)
        steps.append(StagePlan(name=output.id, writes=size, peak_ram=output.peak_ram, done=output.done))
    needed = _weights(source) if holds_model else min(_weights(source), two_layers(source))
    steps.append(StagePlan(name="judge", writes=judging, peak_ram=needed + (2 << 30), done=False))
    return tuple(steps)


def _weights(source: Source) -> int:
    return sum(file.bytes for file in source.files if file.name.endswith(".safetensors"))


def two_layers(source: Source) -> int:
    """Bytes of two layers of the checkpoint, and of its embedding and output head, which stay in memory beside them."""
    facts = source.facts
    ends = facts.vocabulary * facts.hidden * (1 if facts.tied_embeddings else 2)
    inside = max(0, facts.parameters - ends)
    return (ends + 2 * inside // max(1, facts.layers)) * _weights(source) // max(1, facts.parameters)


def peak_disk(stages: Sequence[StagePlan], outputs: Sequence[OutputPlan], *, bounded: bool) -> int:
    """Bytes that the steps still to do write; of levels that are deleted one after the other the largest alone."""
    waiting = sum(stage.writes for stage in stages if not stage.done)
    heavy = [
        sum(file.bytes for file in output.files if file.name.endswith((".gguf", ".safetensors")))
        for output in outputs
        if not output.done
    ]
    return waiting - sum(heavy) + max(heavy, default=0) if bounded else waiting


def check_disk(machine: MachineState, root: Path) -> None:
    """DependencyError when the run would not fit."""
    if machine.peak_disk > machine.free_disk:
        raise DependencyError(
            f"the run writes {amount(machine.peak_disk, 'B')}, {amount(machine.free_disk, 'B')} are free in {root}",
            hint="free some, choose fewer levels, or set output_path to another disk",
        )


def existing(path: Path) -> Path:
    """The nearest folder above ``path`` that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
