"""The steps of a run with the seconds that they may need: a guess from sizes, which the run's own pace corrects."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from quantool.config.schema import Config
from quantool.records import OutputPlan, Plan
from quantool.runtime.progress import Step

# Orders of magnitude of two server cores; only their relation counts once a few steps are behind.
OPERATIONS = 1e11
"""Multiplications and additions a second of a forward pass."""
BYTES = 2e8
"""Bytes a second that are quantized and written."""
START = 8.0
"""Seconds until a worker has loaded its libraries."""
CHECKS = 15.0
"""Seconds of the checks of an artifact that do not depend on its size."""
CALIBRATION = 512
"""Tokens of a calibration document."""

COMPARE, PACK, PUBLISH = "compare with the reference", "pack", "publish"


def make_step(output: OutputPlan) -> str:
    """Name of the step that makes an output."""
    return f"make {output.id}"


def judge_step(case: str) -> str:
    """Name of the step that judges one."""
    return f"judge {case.removeprefix('given/')}"


def steps(plan: Plan, config: Config, done: AbstractSet[str]) -> tuple[Step, ...]:
    """What a run of ``plan`` does, in order; stages and outputs that are ``done`` already take no time."""
    shared = [stage for stage in plan.stages if stage.name not in {output.id for output in plan.outputs}]
    waiting = sum(
        stage.writes for stage in shared if stage.name not in done and stage.name not in ("download", "judge")
    )
    first = next((output.id for output in plan.outputs if output.id not in done), None)
    made = {
        output.id: (0.0 if output.id in done else _making(plan, config, output))
        + (START + waiting / BYTES if output.id == first and waiting else 0)
        for output in plan.outputs
    }
    scoring = _forward(plan, config.validation.max_tokens * max(1, len(config.validation.corpora)))
    compare = Step(COMPARE, START + scoring)
    taken: list[Step] = []
    for output in plan.outputs:
        taken.append(Step(make_step(output), made[output.id]))
        if config.disk_bounded:
            taken += [compare, Step(judge_step(output.id), CHECKS + scoring)]
    if not config.disk_bounded:
        taken.append(Step(COMPARE, START + scoring * (1 + len(plan.outputs))))
        taken += [Step(judge_step(output.id), CHECKS) for output in plan.outputs]
    taken.append(Step(PACK, 1.0))
    if config.push_to_hub:
        taken.append(
            Step(PUBLISH, sum(file.bytes for output in plan.outputs for file in output.files) / BYTES)
        )
    return tuple(taken)


def _making(plan: Plan, config: Config, output: OutputPlan) -> float:
    written = sum(file.bytes for file in output.files)
    calibrated = config.dataset_path is not None or config.dataset_id is not None
    tokens = CALIBRATION * config.sample_size if calibrated and output.engine != "llama.cpp" else 0
    return START + written / BYTES + _forward(plan, tokens)


def _forward(plan: Plan, tokens: int) -> float:
    """Seconds of a forward pass: two operations a parameter and token."""
    return 2.0 * plan.source.facts.parameters * tokens / OPERATIONS
