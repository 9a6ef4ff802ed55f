"""Several workers at once: their results in order, one bar, and the error of one after the others' ends."""

import importlib
from pathlib import Path

import pytest

from quantool.errors import PublicationError
from quantool.runtime import process
from quantool.runtime.parallel import side_by_side
from quantool.runtime.progress import Bar
from tests.conftest import dies, wait_for

pytestmark = pytest.mark.usefixtures("plugin")


class Moves:
    """A bar that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def move(self, done: float, total: float) -> None:
        self.seen.append((done, total))


def work(name: str, request: dict[str, object], log: Path, bar: Bar) -> dict[str, object]:
    return process.call(getattr(importlib.import_module("quantool_fake"), name), request, log=log, bar=bar)


def test_results_in_order_and_one_bar(tmp_path: Path) -> None:
    bar = Moves()
    calls = [
        lambda part, number=number: work("steps", {"number": number}, tmp_path / f"{number}.log", part)
        for number in range(3)
    ]
    results = side_by_side(calls, bar)
    assert [result["number"] for result in results] == [0, 1, 2]
    assert max(bar.seen) == bar.seen[-1] == (6, 6)
    assert [done for done, _ in bar.seen] == sorted(done for done, _ in bar.seen)


def test_an_error_waits_for_what_the_others_finish(tmp_path: Path) -> None:
    done = tmp_path / "done"
    calls = [
        lambda part: work("refuse", {}, tmp_path / "a.log", part),
        lambda part: work("steps", {"number": 1, "touch": str(done), "wait": 1.0}, tmp_path / "b.log", part),
    ]
    with pytest.raises(PublicationError, match="the Hub is closed"):
        side_by_side(calls, Moves())
    assert done.exists()


def test_an_interruption_kills_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = [tmp_path / f"pids-{number}" for number in range(2)]
    calls = [
        lambda part, file=file: work("child", {"pids": str(file)}, tmp_path / f"{file.name}.log", part)
        for file in pids
    ]

    def interrupted(self: object, timeout: float | None = None) -> None:
        for file in pids:
            wait_for(file)
        raise KeyboardInterrupt

    monkeypatch.setattr("threading.Thread.join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        side_by_side(calls, Moves())
    for file in pids:
        assert all(dies(int(pid)) for pid in file.read_text().split())
