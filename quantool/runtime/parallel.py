"""Several workers at once, each waited for by a thread of its own: one bar for all, and none outlives an interruption."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from quantool.runtime import children, process
from quantool.runtime.progress import Bar

Result = TypeVar("Result")


def side_by_side(calls: Sequence[Callable[[Bar], Result]], bar: Bar) -> list[Result]:
    """The results of ``calls``, which start workers (``process.call``) with the bar that each is given, in their order.

    See ``in_threads`` for errors and interruptions.
    """
    if len(calls) == 1:
        return [calls[0](bar)]
    sum_of = _Sum(bar, len(calls))
    return in_threads([partial(call, sum_of.part(number)) for number, call in enumerate(calls)])


def in_threads(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of ``calls``, each made in a thread of its own, in their order.

    When one fails, the others end first, so that what they keep is kept; then its error is raised, the first of several.
    On an interruption their workers are killed.
    """
    children.prepare(process.environment())
    outcomes: list[Result | BaseException | None] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            outcomes[number] = calls[number]()
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    with ExitStack() as undo:
        undo.callback(children.end)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        undo.pop_all()
    results: list[Result] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)  # type: ignore[arg-type] # every thread has left one
    return results


class _Sum:
    """What several workers report, as one."""

    def __init__(self, bar: Bar, parts: int) -> None:
        self._bar, self._lock = bar, threading.Lock()
        self._reports = [(0.0, 0.0)] * parts

    def part(self, number: int) -> Bar:
        return _Part(self, number)

    def move(self, number: int, done: float, total: float) -> None:
        with self._lock:
            self._reports[number] = (done, total)
            done, total = (sum(values) for values in zip(*self._reports, strict=True))
            self._bar.move(done, total)


class _Part:
    """The bar that one of them is given."""

    def __init__(self, whole: _Sum, number: int) -> None:
        self._whole, self._number = whole, number

    def move(self, done: float, total: float) -> None:
        """See ``Bar``."""
        self._whole.move(self._number, done, total)
