"""The steps that a run expects are those that it takes, and what is done costs nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quantool import pipeline
from quantool.config.load import load
from quantool.plan.effort import COMPARE, PACK, steps
from quantool.plugins import find
from quantool.runtime.progress import Progress, Step

pytestmark = pytest.mark.usefixtures("plugin")


def test_a_run_takes_the_steps_that_it_expects(
    config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[str] = []
    taken: list[str] = []

    class Watched(Progress):
        def expect(self, steps: list[Step] | tuple[Step, ...]) -> None:  # type: ignore[override]
            expected.extend(step.name for step in steps)

        def step(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
            taken.append(name)
            return super().step(name)

    pipeline.run(load(config_file(), (), find).config, Watched(quiet=True))
    assert expected == [
        "make fake/Q8_0", "make fake/Q4_K_M", COMPARE, "judge fake/Q8_0", "judge fake/Q4_K_M", PACK,
    ]  # fmt: skip
    assert taken[3:] == expected


def test_larger_work_takes_longer_and_done_work_nothing(config_file: Callable[..., Path]) -> None:
    job = load(config_file(), (), find).config
    plan = pipeline.plan(job, Progress(quiet=True))
    first = {step.name: step.seconds for step in steps(plan, job, set())}
    again = {step.name: step.seconds for step in steps(plan, job, {"fake/Q8_0"})}
    assert first["make fake/Q8_0"] > 0
    assert again["make fake/Q8_0"] == 0
    assert again["make fake/Q4_K_M"] == first["make fake/Q4_K_M"]
    facts = plan.source.facts.model_copy(update={"parameters": 10**12})
    large = plan.model_copy(update={"source": plan.source.model_copy(update={"facts": facts})})
    assert {step.name: step.seconds for step in steps(large, job, set())}[COMPARE] > 100 * first[COMPARE]
