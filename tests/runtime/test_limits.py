import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantool.runtime import limits
from quantool.runtime.limits import EndlessError, each_limited


def slowly(count: int) -> int:
    """Uses processor time without an end for a negative number."""
    while count < 0:
        pass
    return count + 1


def test_results_come_in_order() -> None:
    assert list(each_limited([1, 2, 3], slowly)) == [2, 3, 4]
    assert list(each_limited([], slowly)) == []


def test_what_does_not_end_is_stopped_and_what_ended_before_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1)
    monkeypatch.setattr(limits.limit, "__defaults__", (0, 1, limits.BYTES))
    results = each_limited([1, -1, 3], slowly)
    started = time.process_time()
    assert next(results) == 2
    with pytest.raises(EndlessError, match="did not end within 1 s"):
        next(results)
    assert time.process_time() - started < 1  # the child's time is not ours


def test_a_number_that_no_signal_handler_of_python_can_interrupt_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits.limit, "__defaults__", (0, 1, limits.BYTES))
    with pytest.raises(EndlessError):
        list(each_limited([10**8], lambda power: len(str(7**power))))


def test_memory_is_bounded() -> None:
    def filling(size: int) -> int:
        return len("x" * size)

    assert list(each_limited([1 << 20], filling)) == [1 << 20]
    with pytest.raises(EndlessError, match="more than 1 GB of memory"):
        list(each_limited([1 << 20, 3 << 30], filling))


def test_a_bug_in_the_work_is_no_limit(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ended with code 1"):
        list(each_limited(["x"], slowly))
    assert "TypeError" in capfd.readouterr().err


def test_each_piece_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.limit, "__defaults__", (0, 1, limits.BYTES))

    def spinning(seconds: float) -> bool:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        return True

    assert list(each_limited([0.7] * 4, spinning)) == [True] * 4


def test_a_child_that_nobody_listens_to_is_ended() -> None:
    def children() -> Iterator[Any]:
        yield from each_limited([1, -1], slowly)

    def processes() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = processes()  # fork servers among them
    results = children()
    assert next(results) == 2
    assert processes() > before
    results.close()  # type: ignore[attr-defined]
    assert processes() == before


def test_a_child_that_ended_and_waits_for_its_parent_is_not_limited() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    limits.limit(child.pid)
    assert child.wait() == 0
