"""The steps that a run expects are those that it takes, and what is done costs nothing."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantool import pipeline
from quantool.config.load import load
from quantool.errors import QuantoolError
from quantool.plan import effort
from quantool.plan.effort import COMPARE, PACK, steps
from quantool.plugins import find
from quantool.runtime import machine
from quantool.runtime.progress import Progress, Step
from quantool.runtime.workspace import Workspace
from tests.conftest import Ended

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    measured = job.validation.model_copy(update={"checks": ("perplexity",)})
    job = job.model_copy(update={"validation": measured})
    small, huge = (
        {step.name: step.seconds for step in steps(made, job, set())}[COMPARE] for made in (plan, large)
    )
    assert huge > 100 * small > 0


def test_what_a_run_took_is_what_the_next_plan_says(config_file: Callable[..., Path]) -> None:
    job = load(config_file(), (), find).config
    guessed = pipeline.plan_here(job, Progress(quiet=True))[1].seconds
    assert set(guessed) == {"download", "scan", "fake/Q8_0", "fake/Q4_K_M", "judge"}
    result = pipeline.run(job, Progress(quiet=True))
    known = machine.measured()
    assert {"scan", "fake/Q8_0", "fake/Q4_K_M", "check/fakecheck"} <= set(known)
    again = pipeline.plan_here(job, Progress(quiet=True))[1].seconds
    for name in ("fake/Q8_0", "fake/Q4_K_M", "scan"):
        assert again[name] == pytest.approx(known[name][-1].seconds)
    pipeline.run(job, Progress(quiet=True))
    assert machine.measured()["fake/Q8_0"] == known["fake/Q8_0"]  # recalled: nothing was measured
    assert again["judge"] == pytest.approx(sum(report.seconds for report in result.reports), abs=1e-6)


def test_a_stage_has_its_own_seconds_alone(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)

    def inner() -> tuple[list[Path], dict[str, str]]:
        time.sleep(0.05)
        return [], {}

    def outer() -> tuple[list[Path], dict[str, str]]:
        workspace.stage("inner", "1", inner)
        time.sleep(0.01)
        return [], {}

    began = time.monotonic()
    workspace.stage("outer", "1", outer)
    took = time.monotonic() - began
    assert workspace.seconds["inner"] >= 0.05
    assert workspace.seconds["outer"] >= 0.01
    assert sum(workspace.seconds.values()) <= took  # none is counted twice
    again = Workspace(tmp_path)
    again.stage("outer", "1", outer)
    assert again.seconds == {}  # recalled: nothing was measured


def test_operations_take_time_where_they_are_computed(
    config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load(config_file(), (), find).config
    plan = pipeline.plan(job, Progress(quiet=True))
    heavy = plan.outputs[0].model_copy(update={"engine": "transformers", "operations": 1e12})
    plan = plan.model_copy(update={"outputs": (heavy, plan.outputs[1])})
    speed = machine.Speed(operations=1e10, hashing=1e9)
    monkeypatch.setattr(machine, "gpus", lambda: 0)
    on_cpu = effort.making(plan, job, speed)[heavy.id].estimate
    assert on_cpu == pytest.approx(1e12 / (effort.FORWARD * 1e10), rel=0.1)
    monkeypatch.setattr(machine, "gpus", lambda: 1)
    assert effort.making(plan, job, speed)[heavy.id].estimate < 5
    kept_off = job.model_copy(update={"device": "cpu"})
    assert effort.making(plan, kept_off, speed)[heavy.id].estimate == on_cpu


def test_checks_cost_what_they_compute(config_file: Callable[..., Path]) -> None:
    job = load(config_file(), (), find).config
    plan = pipeline.plan(job, Progress(quiet=True))
    speed = machine.Speed(operations=1e6, hashing=1e9)

    def cost(**validation: object) -> float:
        settings = type(job.validation).model_validate(
            job.validation.model_dump(exclude_unset=True) | validation
        )
        changed = job.model_copy(update={"validation": settings})
        return sum(work.estimate for work in effort.checking(plan, changed, speed).values())

    few, many = (cost(checks=["perplexity"], context=16, max_tokens=tokens) for tokens in (16000, 160000))
    assert 5 < many / few < 10.5
    assert cost(checks=["needle"]) == 0  # not configured
    assert cost(checks=["needle"], needle={"lengths": [128]}) > 1


def test_generating_reads_the_weights_at_the_speed_of_the_memory_that_holds_them(
    config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan for one H200 said two hours where the processor's memory was counted."""
    job = load(config_file(), (), find).config
    plan = pipeline.plan(job, Progress(quiet=True))
    job = job.model_copy(update={"validation": job.validation.model_copy(update={"checks": ("behaviour",)})})
    facts = plan.source.facts.model_copy(
        update={"parameters": 6_700_000_000, "chat_template": "{{ messages }}"}
    )
    weights = plan.source.files[0].model_copy(update={"name": "model.safetensors", "bytes": 13_400_000_000})
    source = plan.source.model_copy(update={"facts": facts, "files": (weights,)})
    plan = plan.model_copy(update={"source": source})
    speed = machine.Speed(operations=1e12, hashing=1e9)

    def guess(gpus: int) -> float:
        monkeypatch.setattr(machine, "gpus", lambda: gpus)
        return effort.checking(plan, job, speed)["behaviour"].estimate

    assert guess(0) > 3600
    assert guess(1) < 600


def test_a_check_whose_time_is_not_known_is_named(
    config_file: Callable[..., Path], quantool: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file()
    whole = find.find_check("fakecheck")

    def computes(*_: object) -> tuple[int, int]:
        raise QuantoolError("its data set cannot be counted")

    monkeypatch.setattr(find, "find_check", lambda _name: replace(whole, computes=computes))
    shown = quantool("plan", path)
    assert shown.code == 0
    assert re.search(
        r"^time .*\n +without that of the check fakecheck: its data set cannot be counted$",
        shown.out,
        re.MULTILINE,
    )
    told = json.loads(quantool("plan", path, "--json").out)
    assert told["machine"]["untimed"] == {"fakecheck": "its data set cannot be counted"}


def test_a_plan_that_does_not_fit_is_shown_and_refused(
    config_file: Callable[..., Path], quantool: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file()
    shown = quantool("plan", path)
    assert shown.code == 0
    assert re.search(r"^time +about \d+ (s|min) on this machine$", shown.out, re.MULTILINE)
    monkeypatch.setattr(machine, "total_ram", lambda: 1 << 20)
    refused = quantool("plan", path)
    assert refused.code == 3
    assert "fake/Q8_0" in refused.out
    assert "judge needs 1.1 GB of memory, this machine has 1.0 MB" in refused.err
    assert quantool("run", path).code == 3
    assert not (path.parent / "out" / "done.txt").exists()
