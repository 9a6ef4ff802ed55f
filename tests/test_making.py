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
from quantool.runtime import machine
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
