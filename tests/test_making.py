"""Outputs made side by side: the same artifacts in the plan's order, and what one loses the others keep."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import making as models
import pytest

from quantool import pipeline
from quantool.config.load import load
from quantool.errors import QuantizationError
from quantool.methods import gguf
from quantool.plugins import find
from quantool.plugins.contract import Job
from quantool.run.making import lanes_of
from quantool.runtime import gpus, machine
from quantool.runtime.progress import Progress

Change = Callable[[Callable[[Job], None], int], None]
WAIT = 30.0


@pytest.fixture
def beside(plugin: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Change:
    """``beside(before, lanes)``: the fake method makes so many outputs at once and calls ``before`` with each job."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = find.find_method

    def change(before: Callable[[Job], None], lanes: int) -> None:
        def changed(name: str) -> Any:
            method = real(name)

            def quantize(job: Job, options: Any, progress: Progress) -> Any:
                before(job)
                return method.quantize(job, options, progress)

            return dataclasses.replace(method, quantize=quantize, at_once=lambda *_: lanes)

        monkeypatch.setattr(find, "find_method", changed)

    return change


def test_outputs_are_made_at_the_same_time_and_stay_in_order(
    config_file: Callable[..., Path], beside: Change
) -> None:
    both = threading.Barrier(2)

    def meet(_job: Job) -> None:
        both.wait(WAIT)

    beside(meet, 2)
    result = pipeline.run(load(config_file(), (), find).config, Progress(quiet=True))
    assert [report.artifact.output for report in result.reports] == ["fake/Q8_0", "fake/Q4_K_M"]
    assert not both.broken


def test_without_room_they_are_made_one_after_the_other(
    config_file: Callable[..., Path], beside: Change
) -> None:
    made: list[str] = []
    alive: list[int] = []

    def before(job: Job) -> None:
        made.append(job.output.level)
        alive.append(threading.active_count())

    beside(before, 1)
    pipeline.run(load(config_file(), (), find).config, Progress(quiet=True))
    assert made == ["Q8_0", "Q4_K_M"]
    assert alive[0] == alive[1]


def test_one_that_fails_lets_the_other_finish_and_is_named(
    config_file: Callable[..., Path], beside: Change, tmp_path: Path
) -> None:
    broken = True

    def before(job: Job) -> None:
        if job.output.level == "Q8_0" and broken:
            raise QuantizationError("Q8_0 cannot be made")
        time.sleep(0.2)

    beside(before, 2)
    job = load(config_file(), (), find).config
    with pytest.raises(QuantizationError, match="Q8_0 cannot be made"):
        pipeline.run(job, Progress(quiet=True))
    done = tmp_path / "out" / "done.txt"
    assert done.read_text().splitlines() == ["made Q4_K_M"]
    broken = False
    assert len(pipeline.run(job, Progress(quiet=True)).reports) == 2
    assert sorted(line for line in done.read_text().splitlines() if line.startswith("made")) == [
        "made Q4_K_M",
        "made Q8_0",
    ]


def test_seconds_of_outputs_side_by_side_add_up_to_the_time_they_took(
    config_file: Callable[..., Path], beside: Change
) -> None:
    beside(lambda _job: time.sleep(0.5), 2)
    started = time.monotonic()
    pipeline.run(load(config_file(), (), find).config, Progress(quiet=True))
    took = machine.measured()
    together = sum(took[f"fake/{level}"][-1].seconds for level in ("Q8_0", "Q4_K_M"))
    assert 0.5 <= together < time.monotonic() - started


def test_lines_name_all_that_is_made(
    config_file: Callable[..., Path], beside: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    beside(lambda _job: None, 2)
    progress = Progress()
    with progress.whole():
        pipeline.run(load(config_file(), (), find).config, progress)
    lines = capsys.readouterr().err.splitlines()
    steps = [line.partition(" (")[0] for line in lines if line.startswith("[")]
    assert steps[0] == "[4/9] make fake/Q8_0"  # what both need
    assert sorted(steps[1:3]) == ["[4-5/9] make fake/Q4_K_M", "[4-5/9] make fake/Q8_0"]
    assert steps[3] == "[6/9] compare with the reference"


def test_lanes_are_made_and_judged_beside_each_other(
    config_file: Callable[..., Path],
    beside: Change,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = threading.Barrier(2)

    def meet(_job: Job) -> None:
        both.wait(WAIT)

    beside(meet, 1)
    monkeypatch.setattr(pipeline, "lanes_of", lambda _config, plan: [[output] for output in plan.outputs])
    progress = Progress()
    with progress.whole():
        result = pipeline.run(load(config_file(), (), find).config, progress)
    assert [report.artifact.output for report in result.reports] == ["fake/Q8_0", "fake/Q4_K_M"]
    assert all(report.findings for report in result.reports)
    steps = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert sorted(steps[:-1]) == sorted(
        f"[4-8/9] {step}"
        for step in (
            "make fake/Q8_0",
            "make fake/Q4_K_M",
            "compare with the reference",
            "judge fake/Q8_0",
            "judge fake/Q4_K_M",
        )
    )
    assert steps[-1] == "[9/9] pack"


def test_a_lane_that_fails_lets_the_other_be_judged(
    config_file: Callable[..., Path], beside: Change, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def before(job: Job) -> None:
        if job.output.level == "Q8_0":
            raise QuantizationError("Q8_0 cannot be made")

    beside(before, 1)
    monkeypatch.setattr(pipeline, "lanes_of", lambda _config, plan: [[output] for output in plan.outputs])
    with pytest.raises(QuantizationError, match="Q8_0 cannot be made"):
        pipeline.run(load(config_file(), (), find).config, Progress(quiet=True))
    assert [path.name for path in (tmp_path / "out" / "records").glob("*.report.json")] == [
        "fake-Q4_K_M.report.json"
    ]


GIB = 1 << 30


@pytest.mark.parametrize(
    ("device", "cores", "free", "gpus_have", "lanes"),
    [
        ("cuda", 16, 64 * GIB, [80 * GIB], 2),
        ("auto", 16, 64 * GIB, [80 * GIB, 80 * GIB], 2),
        ("cpu", 16, 64 * GIB, [80 * GIB], 1),
        ("auto", 16, 64 * GIB, [], 1),
        ("cuda", 4, 64 * GIB, [80 * GIB], 1),  # busy with llama.cpp alone
        ("cuda", 16, 5 * GIB, [80 * GIB], 1),  # 2 + 4 are needed
        ("cuda", 16, 64 * GIB, [80 * GIB, 32 * GIB], 1),  # four times 8 GiB, and the caches
    ],
)
def test_lanes_where_there_is_room_for_both(
    device: str,
    cores: int,
    free: int,
    gpus_have: list[int],
    lanes: int,
    config_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load(config_file(), (), find).config
    plan = pipeline.plan(config, Progress(quiet=True))
    gguf_output, other = plan.outputs
    outputs = (
        gguf_output.model_copy(update={"peak_ram": 2 * GIB}),
        other.model_copy(update={"peak_ram": 4 * GIB, "engine": "transformers"}),
    )
    weights = plan.source.files[0].model_copy(update={"name": "model.safetensors", "bytes": 8 * GIB})
    plan = plan.model_copy(
        update={"outputs": outputs, "source": plan.source.model_copy(update={"files": (weights,)})}
    )
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "free_ram", lambda: free)
    monkeypatch.setattr(gpus, "memory", lambda: gpus_have)
    chosen = lanes_of(config.model_copy(update={"device": device}), plan)
    assert len(chosen) == lanes
    assert sorted(output.id for lane in chosen for output in lane) == sorted(output.id for output in outputs)
    alone = plan.model_copy(update={"outputs": outputs[1:]})
    assert lanes_of(config.model_copy(update={"device": device}), alone) == [[outputs[1]]]


@pytest.mark.parametrize(
    ("waiting", "cores", "free", "peak", "lanes"),
    [
        (4, 2, 64, 1, 1),  # two cores are busy with one level
        (4, 16, 64, 1, 4),
        (8, 16, 64, 1, 4),
        (2, 16, 64, 1, 2),
        (4, 16, 12, 3, 2),  # half of what is free
        (4, 16, 1, 3, 1),
    ],
)
def test_levels_at_once(waiting: int, cores: int, free: int, peak: int, lanes: int) -> None:
    assert gguf.levels_at_once(waiting, cores, free, peak) == lanes


@pytest.mark.e2e
def test_levels_side_by_side_have_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = ["Q8_0", "Q4_K_M", "Q6_K"]
    hashes, asked = [], []
    for lanes in (1, 3):

        def forced(waiting: int, *_: int, lanes: int = lanes) -> int:
            asked.append(waiting)
            return lanes

        monkeypatch.setattr(gguf, "levels_at_once", forced)
        config = models.config(models.TINY, tmp_path / str(lanes), levels)
        made = pipeline.make(config, Progress(quiet=True))
        assert pipeline.make(config, Progress(quiet=True)) == made
        hashes.append([artifact.files[0].sha256 for artifact in made])
    assert hashes[0] == hashes[1]
    assert asked == [3, 3]  # where all are there, nothing is asked
