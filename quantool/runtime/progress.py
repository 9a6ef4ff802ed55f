"""What the user sees while it runs, all on standard error.

On a terminal one bar per long stage, with amount, speed and time left; elsewhere (CI) plain lines; nothing with
``quiet``. Standard output is left to the result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_LINE_SECONDS = 15.0


class Bar(Protocol):
    """The progress of one stage."""

    def move(self, done: float, total: float) -> None:
        """Say that ``done`` of ``total`` units are done."""


class Progress:
    """Where stages announce themselves. ``verbosity``: 0 quiet, 1 normal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = not quiet and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)  # noqa: T201

    def warn(self, text: str) -> None:
        """Print a warning; shown even when quiet."""
        print(f"warning: {text}", file=sys.stderr, flush=True)  # noqa: T201

    @contextmanager
    def bar(self, label: str, unit: str = "") -> Iterator[Bar]:
        """Show a stage: ``unit`` is ``"B"`` for bytes, ``"tok"`` for tokens, or empty. Says the time it took."""
        started = time.monotonic()
        if self.terminal:
            with _rich(unit) as shown:
                task = shown.add_task(label, total=None, count="")
                yield _RichBar(shown, task, unit)
        else:
            self.say(f"{label} …")
            yield _PlainBar(self, label, unit, started)
        self.say(f"{label}: {time.monotonic() - started:.1f} s")


class _RichBar:
    def __init__(self, shown: RichProgress, task: TaskID, unit: str) -> None:
        self._shown = shown
        self._task = task
        self._unit = unit

    def move(self, done: float, total: float) -> None:
        count = f"{done:.0f}/{total:.0f} {self._unit}".rstrip()
        self._shown.update(self._task, completed=done, total=total, count=count)


class _PlainBar:
    def __init__(self, progress: Progress, label: str, unit: str, started: float) -> None:
        self._progress = progress
        self._label = label
        self._unit = unit
        self._started = started
        self._last = started

    def move(self, done: float, total: float) -> None:
        now = time.monotonic()
        if now - self._last < PLAIN_LINE_SECONDS or not total or not done:
            return
        self._last = now
        left = (now - self._started) * (total - done) / done
        speed = amount(done / (now - self._started), self._unit)
        self._progress.say(f"{self._label}: {100 * done / total:.0f} %, {speed}/s, {left:.0f} s left")


def _rich(unit: str) -> RichProgress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counted = (
        (DownloadColumn(), TransferSpeedColumn()) if unit == "B" else (TextColumn("{task.fields[count]}"),)
    )
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *counted,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def amount(value: float, unit: str) -> str:
    """``value`` with a decimal prefix: ``amount(12_300_000, "B")`` is ``"12.3 MB"``."""
    for prefix in ("", "k", "M", "G"):
        digits = 1 if prefix else 0
        if abs(round(value, digits)) < 1000 or prefix == "G":
            break
        value /= 1000
    return f"{value:.{digits}f} {prefix}{unit}".rstrip()
