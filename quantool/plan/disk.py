"""The stages of a run in order, what they write, and whether the disk has room for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantool.config.schema import Config
from quantool.errors import DependencyError
from quantool.plugins import find
from quantool.plugins.contract import Outline
from quantool.records import MachineState, OutputPlan, Plan, Source, StagePlan
from quantool.runtime import arithmetic, machine
from quantool.runtime.progress import amount
from quantool.source.prepare import PEAK, STAGE, is_prepared

LIBRARIES = 1 << 30
"""Bytes that torch, transformers and the activations of a batch take."""
LOGITS_ROWS = 2048
"""Positions whose logits are in memory at once, of reference and artifact together."""
MARGIN = 1.25
"""Estimates of memory are from above: what needs little more than there is may fit."""
LARGER = "run on a machine with more memory"
WHOLE_SHARE = 0.7
"""Of the memory, up to which a model is judged whole (``validation/_engines/memory.py``)."""


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
    steps.append(
        StagePlan(
            name="judge", writes=judging, peak_ram=_judging_ram(source, holds_model=holds_model), done=False
        )
    )
    return tuple(steps)


def _judging_ram(source: Source, *, holds_model: bool) -> int:
    """A model as it is computed with, whole where it fits or must; else two layers; and libraries, logits, activations."""
    widening = 2 if source.facts.dtype != "F32" and "bfloat16" not in arithmetic.native() else 1
    whole = widening * _weights(source)
    fits = whole <= WHOLE_SHARE * machine.total_ram()
    needed = whole if holds_model or fits else min(whole, widening * two_layers(source))
    logits = 4 * source.facts.vocabulary * LOGITS_ROWS
    return needed + logits + LIBRARIES


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


def check_disk(here: MachineState, root: Path) -> None:
    """DependencyError when the run would not fit."""
    if here.peak_disk > here.free_disk:
        raise DependencyError(
            f"the run writes {amount(here.peak_disk, 'B')}, {amount(here.free_disk, 'B')} are free in {root}",
            hint="free some, choose fewer levels, or set output_path to another disk",
        )


def check_ram(plan: Plan, here: MachineState, config: Config) -> None:
    """DependencyError when a step still to do needs more memory than this machine has, with the setting to change."""
    waiting = [stage for stage in plan.stages if stage.name not in here.done]
    largest = max(waiting, key=lambda stage: stage.peak_ram, default=None)
    if largest is None or not here.ram or largest.peak_ram <= MARGIN * here.ram:
        return
    raise DependencyError(
        f"{largest.name} needs {amount(largest.peak_ram, 'B')} of memory, this machine has {amount(here.ram, 'B')}",
        hint=_smaller(plan, largest, config),
    )


def _smaller(plan: Plan, stage: StagePlan, config: Config) -> str:
    """What makes a stage fit."""
    output = next((output for output in plan.outputs if output.id == stage.name), None)
    if stage.name == "judge":
        holders = ", ".join(holding(config, plan.source))
        return (
            f"leave {holders} out of validation.checks: the others judge layer by layer"
            if holders
            else LARGER
        )
    if output is not None and output.operations and output.engine == "transformers":
        return "lower sample_size or calibration_config.max_seq_length, or choose a level without calibration (FP8_DYNAMIC)"
    if stage.name == "imatrix":
        return "set quantization_config.imatrix to a matrix that was made elsewhere, or to false"
    return LARGER


def holding(config: Config, source: Source) -> tuple[str, ...]:
    """The checks that will run and need memory for all weights of the checkpoint at once."""
    active = find.active_checks(config, source.facts.task)
    return tuple(name for name, check in active.items() if check.holds_model)


def existing(path: Path) -> Path:
    """The nearest folder above ``path`` that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
