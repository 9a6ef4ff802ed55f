"""What each stage of a graph asks a scheduler for: processors, memory, GPUs and minutes, from the plan's own estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quantool.cluster.graph import Kind, RunStage
from quantool.config.schema import Config
from quantool.errors import ConfigError
from quantool.plan import effort
from quantool.plan.disk import MARGIN
from quantool.plugins import find
from quantool.records import OutputPlan, Plan, StagePlan
from quantool.runtime import machine
from quantool.runtime.gpus import devices
from quantool.runtime.machine import Speed
from quantool.runtime.progress import amount, span

GIB = 1 << 30
LIBRARIES = 2 * GIB
"""Memory of the process that minds a stage, and of what a scheduler counts beside it."""
LEAST = 4 * GIB
SLACK = 3.0
"""Times the estimate that is asked for: another machine's speed is guessed from this one's."""
BEGIN = 10
"""Minutes that every stage gets beside that: a shared folder may be slow to import from."""
READERS = 8
"""Processors of stages that mostly read and write."""
QUANTIZERS = 16
"""Processors that a level of llama.cpp makes use of."""


@dataclass(frozen=True)
class NodeShape:
    """What a node has."""

    cpus: int
    memory: int
    """Bytes."""
    gpus: int
    minutes: int | None = None
    """Limit of a job there; None: none."""


@dataclass(frozen=True)
class Resources:
    """What a stage needs of one node."""

    cpus: int
    memory: int
    """Bytes, with a margin."""
    gpus: int
    seconds: float
    """As estimated."""

    @property
    def minutes(self) -> int:
        """To ask for, if nobody sets a limit."""
        return BEGIN + math.ceil(SLACK * self.seconds / 60)


def resources_of(
    stages: Sequence[RunStage], plan: Plan, config: Config, node: NodeShape
) -> dict[str, Resources]:
    """What each stage needs, by its name. Raises ConfigError for one that no such node has the memory for."""
    own = machine.speed()
    speed = Speed(own.operations * node.cpus / machine.cores(), own.hashing, node.gpus)
    took = effort.making(plan, config, speed)
    on_gpus, on_cpus = _Judging.of(plan, config, speed), _Judging.of(plan, config, replace(speed, gpus=0))
    memory = {stage.name: stage.peak_ram for stage in plan.stages}
    outputs = {output.id: output for output in plan.outputs}
    found = {}
    for stage in stages:
        ours = [outputs[name] for name in stage.outputs]
        parts = _parts(stage, plan)
        cpus, gpus = _shape(stage, ours, config, node)
        judging = on_gpus if gpus else on_cpus
        seconds = {
            Kind.REFERENCE: judging.reference,
            Kind.BASE: judging.base,
            Kind.JUDGE: judging.artifact,
            Kind.PACK: effort.START,
        }.get(stage.kind, effort.START + sum(took[part].estimate for part in parts if part in took))
        peak = max((memory[part] for part in parts), default=0)
        wanted = max(LEAST, math.ceil((MARGIN * peak + LIBRARIES) / GIB) * GIB)
        if peak + LIBRARIES > node.memory:
            raise ConfigError(
                f"{stage.name} needs {amount(peak, 'B')} of memory, a node has {amount(node.memory, 'B')}",
                hint="set cluster.memory_per_node if it has more, or choose another partition",
            )
        found[stage.name] = Resources(cpus, min(wanted, node.memory), gpus, seconds)
    return found


def require_time(needed: Mapping[str, Resources], limit: int | None, where: str) -> None:
    """ConfigError when a stage is expected to take longer than the ``limit`` in minutes that ``where`` sets."""
    longest = max(needed, key=lambda name: needed[name].seconds)
    if limit is not None and needed[longest].seconds > 60 * limit:
        raise ConfigError(
            f"{longest} is expected to take {span(needed[longest].seconds)}, longer than {where} allows "
            f"({span(60 * limit)})",
            hint="raise cluster.slurm.time, or choose a qos or partition that allows more",
        )


def _parts(stage: RunStage, plan: Plan) -> list[str]:
    """The plan's own stages that are done in this one."""
    if stage.kind is Kind.SOURCE:
        return [part.name for part in plan.stages if part.name in ("prepared", effort.SCAN)]
    if stage.kind is Kind.MAKE:
        alone = stage.after == ("source",)
        return [*stage.outputs, *(_shared(stage, plan) if alone else [])]
    if stage.kind is Kind.SHARE:
        return _shared(stage, plan)
    return [] if stage.kind is Kind.PACK else [effort.JUDGE]


def _shared(stage: RunStage, plan: Plan) -> list[str]:
    """The plan's stages that make what the outputs need: ``base-f16`` for ``base``."""
    needs = {need for output in plan.outputs if output.id in stage.outputs for need in output.needs}

    def is_needed(part: StagePlan) -> bool:
        return any(part.name == need or part.name.startswith(f"{need}-") for need in needs)

    return [part.name for part in plan.stages if is_needed(part)]


def _shape(
    stage: RunStage, outputs: Sequence[OutputPlan], config: Config, node: NodeShape
) -> tuple[int, int]:
    """Processors and GPUs: what computes gets a whole node."""
    kind = devices(config.device).kind
    gpus = node.gpus if kind != "cpu" else 0
    if stage.kind in (Kind.SOURCE, Kind.PACK):
        return min(READERS, node.cpus), 0
    if stage.kind is Kind.REFERENCE:
        return node.cpus, gpus
    if outputs[0].engine == "llama.cpp":  # on a GPU only where that is asked for by name
        cpus = min(QUANTIZERS, node.cpus) if stage.kind is Kind.MAKE else node.cpus
        return cpus, gpus if kind == "cuda" and stage.kind is not Kind.MAKE else 0
    if stage.kind is Kind.MAKE and not outputs[0].operations:  # streamed from file to file
        return min(READERS, node.cpus), 0
    return node.cpus, gpus


@dataclass(frozen=True)
class _Judging:
    """Seconds of what the checks do: of the reference, of a base, and of each artifact."""

    reference: float
    base: float
    artifact: float

    @classmethod
    def of(cls, plan: Plan, config: Config, speed: Speed) -> _Judging:
        reference, base, artifact = effort.START, effort.START, effort.START
        for name, work in effort.checking(plan, config, speed).items():
            check = find.find_check(name)
            if check.computes is None:
                artifact += work.estimate / max(1, len(plan.outputs))
                continue
            model = work.estimate / (len(plan.outputs) + 1)
            artifact += model
            reference += model if check.compare is not None else 0.0
            artifact += 0.0 if check.compare is not None else model
            base += model if check.prepare is not None else 0.0
        return cls(reference, base, artifact)
