"""The steps of a run with the seconds that they need: from sizes, this machine's speed, and what earlier runs took on it.

A stage needs the time to start a worker, to write its bytes and to compute its ``operations``, at the speed that a probe
found. Where a run has measured work of that kind here, the estimate is corrected by it (``machine.expected``); the run's own
pace corrects the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from quantool.config.schema import Config
from quantool.errors import QuantoolError
from quantool.plugins import find
from quantool.plugins.contract import Check
from quantool.records import OutputPlan, Plan, Report, Source
from quantool.runtime import machine
from quantool.runtime.gpus import devices
from quantool.runtime.machine import Speed, Taken
from quantool.runtime.progress import Step

FORWARD = 0.5
"""Of the speed of matrix products, what a model's forward pass reaches."""
BYTES = 4e8
"""Bytes a second that are prepared and written."""
NETWORK = 5e7
"""Bytes a second of a download or an upload."""
MEMORY = 2e10
"""Bytes of weights that are read a second to generate tokens, times the prompts that are answered at once."""
GPU_MEMORY = 1e12
"""The same of a GPU: a third of what recent ones have."""
TOKEN = 3e-3
"""Seconds that a generated token costs beside its arithmetic."""
START = 3.0
"""Seconds until a worker has loaded its libraries and a model."""
CHECK = 0.5
"""Seconds that a check takes of every artifact which lets it compute nothing."""
READERS = 4
"""Files that are scanned side by side."""

COMPARE, PACK, PUBLISH = "compare with the reference", "pack", "publish"
DOWNLOAD, SCAN, JUDGE = "download", "scan", "judge"


@dataclass(frozen=True)
class Work:
    """A piece of work: under which name this machine remembers such ones, and the seconds that it is guessed to need."""

    kind: str
    estimate: float


def make_step(output: OutputPlan) -> str:
    """Name of the step that makes an output."""
    return f"make {output.id}"


def judge_step(case: str) -> str:
    """Name of the step that judges one."""
    return f"judge {case.removeprefix('given/')}"


def seconds(plan: Plan, config: Config) -> dict[str, float]:
    """The seconds that every stage of the plan is expected to need on this machine, done or not."""
    speed, known = machine.speed(), machine.measured()
    found = {
        name: machine.expected(work.kind, work.estimate, known)
        for name, work in making(plan, config, speed).items()
    }
    return found | {JUDGE: sum(_judging(plan, config, speed, known).values())}


def making(plan: Plan, config: Config, speed: Speed) -> dict[str, Work]:
    """The stages before judging, by name."""
    outputs = {output.id: output for output in plan.outputs}
    weights = _weights(plan.source)
    found: dict[str, Work] = {}
    for stage in plan.stages:
        if stage.name == DOWNLOAD:
            found[stage.name] = Work(DOWNLOAD, stage.writes / NETWORK)
        elif stage.name == SCAN:
            files = sum(file.name.endswith(".safetensors") for file in plan.source.files)
            found[stage.name] = Work(
                SCAN, CHECK + weights / speed.hashing / max(1, min(READERS, files, machine.cores()))
            )
        elif stage.name in outputs:
            output = outputs[stage.name]
            rate = _rate(config, speed, on_gpu=output.engine != "llama.cpp")
            computed = START + stage.writes / BYTES + stage.writes / speed.hashing + output.operations / rate
            found[stage.name] = Work(output.id, computed)
        elif stage.name != JUDGE:
            rate = _rate(config, speed, on_gpu=devices(config.device).kind == "cuda")
            found[stage.name] = Work(stage.name, START + stage.writes / BYTES + stage.operations / rate)
    return found


def checking(plan: Plan, config: Config, speed: Speed) -> dict[str, Work]:
    """What each check needs for all artifacts of the plan together, by its name; of some that is not known."""
    return _estimates(plan, config, speed)[0]


def unknown(plan: Plan, config: Config) -> dict[str, str]:
    """The checks whose time no estimate holds, with the reason: they cannot be loaded, or to say what they compute fails."""
    return _estimates(plan, config, machine.speed())[1]


def _estimates(plan: Plan, config: Config, speed: Speed) -> tuple[dict[str, Work], dict[str, str]]:
    settings = config.validation
    found: dict[str, Work] = {}
    failed: dict[str, str] = {}
    for name in find.judging_checks(config, plan.source.facts.task):
        try:
            check = find.find_check(name)
            is_off = getattr(settings, name, True) is None  # one with an own section does nothing without it
            found[name] = Work(f"check/{name}", 0.0 if is_off else _check(check, plan, config, speed))
        except QuantoolError as error:
            failed[name] = error.message
    return found, failed


def _check(check: Check, plan: Plan, config: Config, speed: Speed) -> float:
    """The reference computes as much as an artifact, once."""
    if check.computes is None:
        return CHECK * len(plan.outputs)
    read, generated = check.computes(config, plan.source)
    models = len(plan.outputs) + 1
    operations = 2.0 * plan.source.facts.parameters * (read + generated)
    step = TOKEN + _weights(plan.source) / (GPU_MEMORY if _takes_gpu(config, speed) else MEMORY)
    rate = _rate(config, speed, on_gpu=True)
    return models * (START + operations / rate + generated * step)


def _rate(config: Config, speed: Speed, *, on_gpu: bool) -> float:
    """Operations a second of a forward pass, on a GPU where the configuration lets it run there and there is one."""
    return FORWARD * (machine.GPU_OPERATIONS if on_gpu and _takes_gpu(config, speed) else speed.operations)


def _takes_gpu(config: Config, speed: Speed) -> bool:
    """Whether there is a GPU and the configuration lets work run on it."""
    there = machine.gpus() if speed.gpus is None else speed.gpus
    return there > 0 and devices(config.device).kind != "cpu"


def _judging(
    plan: Plan, config: Config, speed: Speed, known: Mapping[str, Sequence[Taken]]
) -> dict[str, float]:
    """Seconds of each check for all artifacts together."""
    return {
        name: machine.expected(work.kind, work.estimate, known)
        for name, work in checking(plan, config, speed).items()
    }


def _weights(source: Source) -> int:
    return sum(file.bytes for file in source.files if file.name.endswith(".safetensors"))


def steps(plan: Plan, config: Config, done: AbstractSet[str]) -> tuple[Step, ...]:
    """What a run of ``plan`` does, in order; stages and outputs that are ``done`` already take no time."""
    needed = seconds(plan, config)
    outputs = {output.id for output in plan.outputs}
    beside = sum(
        needed[name]
        for name in needed
        if name not in (*outputs, *done) and name not in (DOWNLOAD, SCAN, JUDGE)
    )
    first = next((output.id for output in plan.outputs if output.id not in done), None)
    made = {
        output.id: (0.0 if output.id in done else needed[output.id]) + (beside if output.id == first else 0.0)
        for output in plan.outputs
    }
    compare, judge = _divided(plan, config)
    each = judge / max(1, len(plan.outputs))
    taken: list[Step] = []
    for output in plan.outputs:
        taken.append(Step(make_step(output), made[output.id]))
        if config.disk_bounded:
            taken += [Step(COMPARE, compare / len(plan.outputs)), Step(judge_step(output.id), each)]
    if not config.disk_bounded:
        taken.append(Step(COMPARE, compare))
        taken += [Step(judge_step(output.id), each) for output in plan.outputs]
    taken.append(Step(PACK, 1.0))
    if config.push_to_hub:
        taken.append(
            Step(PUBLISH, sum(file.bytes for output in plan.outputs for file in output.files) / NETWORK)
        )
    return tuple(taken)


def _divided(plan: Plan, config: Config) -> tuple[float, float]:
    """Seconds of the checks that prepare all artifacts at once, and of the others."""
    taken = _judging(plan, config, machine.speed(), machine.measured())
    compare = sum(value for name, value in taken.items() if find.find_check(name).prepare is not None)
    return compare, sum(taken.values()) - compare


def learn_making(plan: Plan, config: Config, took: Mapping[str, float], done: AbstractSet[str]) -> None:
    """Remember the seconds that stages took on this machine, by name; outputs that were ``done`` before tell nothing."""
    works = making(plan, config, machine.speed())
    recalled = {output.id for output in plan.outputs} & done
    machine.remember(
        (work.kind, Taken(work.estimate, took[name]))
        for name, work in works.items()
        if name in took and name not in recalled
    )


def learn_checking(plan: Plan, config: Config, reports: Sequence[Report]) -> None:
    """Remember what the checks took of all artifacts together."""
    works = checking(plan, config, machine.speed())
    took = {name: sum(report.check_seconds.get(name, 0.0) for report in reports) for name in works}
    machine.remember((work.kind, Taken(work.estimate, took[name])) for name, work in works.items())
