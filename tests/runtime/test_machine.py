"""What this machine is remembered to take: kept by kind, corrected by size, never a reason to fail."""

import multiprocessing
from pathlib import Path

import pytest

from quantool.runtime import machine
from quantool.runtime.machine import Speed, Taken


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_nothing_measured_leaves_the_estimate() -> None:
    assert machine.expected("convert", 10.0, machine.measured()) == 10.0


def test_the_same_work_takes_what_it_took() -> None:
    machine.remember([("convert", Taken(10.0, 40.0)), ("scan", Taken(1.0, 1.0))])
    machine.remember([("convert", Taken(10.0, 30.0))])
    assert machine.expected("convert", 10.0, machine.measured()) == pytest.approx(30.0)  # the latest
    assert machine.expected("scan", 10.0, machine.measured()) == pytest.approx(10.0)


def test_what_small_work_took_says_less_of_large_work() -> None:
    known = {"convert": [Taken(1.0, 16.0)]}
    assert machine.expected("convert", 10.0, known) == pytest.approx(40.0)  # the root of 16
    assert machine.expected("convert", 1000.0, known) == pytest.approx(2000.0)  # the fourth root
    known["convert"].append(Taken(1000.0, 500.0))
    assert machine.expected("convert", 1000.0, known) == pytest.approx(500.0)


@pytest.mark.parametrize("text", ["", "[]", '{"convert": 3}', '{"convert": [["a", 1]]}', "[" * 3000])
def test_a_damaged_memory_is_none(text: str) -> None:
    machine.remember([("convert", Taken(1.0, 2.0))])
    (machine._folder() / "taken.json").write_text(text)
    assert machine.measured() == {}
    machine.remember([("convert", Taken(1.0, 3.0))])
    assert machine.measured() == {"convert": [Taken(1.0, 3.0)]}


def test_only_the_latest_are_kept() -> None:
    for number in range(machine.KEPT + 3):
        machine.remember([("convert", Taken(1.0, float(number + 1)))])
    assert [taken.seconds for taken in machine.measured()["convert"]] == [
        float(number + 4) for number in range(machine.KEPT)
    ]


def _remember(number: int) -> None:
    machine.remember([(f"kind {number}", Taken(1.0, 1.0))])


def test_runs_at_the_same_time_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_remember, args=(number,)) for number in range(6)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert set(machine.measured()) == {f"kind {number}" for number in range(6)}


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine.remember([("convert", Taken(1.0, 2.0))])
    assert machine.measured() == {}
    assert machine.speed().operations > 0


def test_the_machine_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.speed()
    assert found.operations > 1e9
    assert found.hashing > 1e7
    monkeypatch.setattr(machine, "_probe", lambda: Speed(1.0, 1.0))
    assert machine.speed() == found
    monkeypatch.setattr(machine, "cores", lambda: 1000)  # another machine of the same home
    assert machine.speed() == Speed(1.0, 1.0)
    (machine._folder() / "speed.json").write_text('{"operations": 1}')
    assert machine.speed() == Speed(1.0, 1.0)


def test_memory_is_that_of_the_machine() -> None:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < machine.total_ram() <= int(lines["MemTotal"].split()[0]) << 10
