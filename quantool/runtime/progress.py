"""What the user sees while it runs, all on standard error.

On a terminal one live line for the whole run (step k of n, what it does, time left); elsewhere (CI) one line a step and
one a minute in long ones; nothing with ``quiet``. Outside a run (``Progress.whole``) each long stage is a run by itself.
Standard output is left to the result.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import Task
    from rich.text import Text

COMMON = "make "
"""What the names of steps that are taken side by side begin with."""
PLAIN_LINE_SECONDS = 15.0
STEP_LINE_SECONDS = 60.0
NEARLY = 0.95
"""Of a step, what its bar measures: files are loaded once and hashed behind it."""
LEARNT_SECONDS = 5.0
"""So much of the estimate must be behind a run before its own speed corrects the rest."""


class Bar(Protocol):
    """The progress of one stage."""

    def move(self, done: float, total: float) -> None:
        """Say that ``done`` of ``total`` units are done."""


@dataclass(frozen=True)
class Step:
    """A step that a run will take, and the seconds it may need; an estimate, which the run's own speed corrects."""

    name: str
    seconds: float


@dataclass
class Part:
    """One of the steps that are taken side by side."""

    estimate: float
    begun: bool = False
    share: float = 0.0
    """How much of it is done, 0 to 1."""


@dataclass
class Course:
    """How far a whole run is: steps behind it, the one that it takes, those that remain."""

    remaining: list[Step] = field(default_factory=list)
    name: str = ""
    estimate: float = 0.0
    activity: str = ""
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    finished: int = 0
    began: float = field(default_factory=lambda: time.monotonic())  # noqa: PLW0108 - looked up when it is called
    step_began: float = 0.0
    bar_began: float = 0.0
    estimated: float = 0.0
    """Seconds that finished steps of ``took`` seconds were estimated to need."""
    took: float = 0.0
    planned: bool = False
    parts: dict[str, Part] = field(default_factory=dict)
    """The steps that are taken side by side, by name; empty while there is one."""

    def begin_together(self, names: Sequence[str]) -> None:
        """Take steps side by side: together they are one, whose estimate is the sum of theirs.

        The first may have begun, with what they all need.
        """
        estimates = {step.name: step.seconds for step in self.remaining}
        if self.name != names[0]:
            self.begin(names[0])
        others = [estimates.get(name, 0.0) for name in names[1:]]
        first = min(self.estimate, max(others, default=self.estimate))  # of its own, without what all need
        self.parts = {name: Part(seconds) for name, seconds in zip(names, [first, *others], strict=True)}
        self.remaining = [step for step in self.remaining if step.name not in self.parts]
        self.estimate += sum(others)
        self.bar_began = time.monotonic()

    def end_together(self) -> None:
        """All of them are done."""
        self.finished += len(self.parts) - 1
        self.parts = {}
        self.end()

    def add_up(self) -> None:
        """Say how far the steps side by side are together, in seconds of their estimates."""
        known = [part for part in self.parts.values() if part.estimate]
        self.done = sum(part.share * part.estimate for part in known)
        self.total = sum(part.estimate for part in known)
        self.activity = ", ".join(
            f"{name.removeprefix(COMMON)} {100 * part.share:.0f} %"
            for name, part in self.parts.items()
            if part.begun and part.share < 1
        )

    def begin(self, name: str) -> None:
        """Take the step of this name; one that nobody expected counts as well, those before it needed not be taken."""
        place = next((i for i, step in enumerate(self.remaining) if step.name == name), None)
        expected = None
        if place is not None:
            expected, self.finished = self.remaining[place], self.finished + place
            self.remaining = self.remaining[place + 1 :]
        self.name, self.estimate = name, expected.seconds if expected else 0.0
        self.activity, self.done, self.total = "", 0.0, 0.0
        self.step_began = time.monotonic()

    def end(self) -> None:
        """The step is done."""
        self.finished += 1
        if self.estimate:
            self.estimated += self.estimate
            self.took += time.monotonic() - self.step_began
        self.name, self.estimate = "", 0.0

    def label(self) -> str:
        """``[3/14] ``; nothing while nobody knows how many steps there are."""
        taken = len(self.parts) or bool(self.name)
        first, last = self.finished + bool(taken), self.finished + taken
        number = f"{first}-{last}" if last > first else f"{last}"
        return f"[{number}/{last + len(self.remaining)}] " if self.planned else ""

    def share(self) -> str:
        """How much of the current stage is done: ``1.2/2.4 GB`` or ``30/240 tok``."""
        if not self.total or self.parts:
            return ""
        if self.unit == "B":
            return f"{amount(self.done, 'B')}/{amount(self.total, 'B')}"
        return f"{self.done:.0f}/{self.total:.0f} {self.unit}".rstrip()

    def left(self) -> float | None:
        """Seconds to the end, estimated; None while there is no estimate."""
        now = time.monotonic()
        stage = (
            (now - self.bar_began) * (self.total - self.done) / self.done if self.total and self.done else 0.0
        )
        if not self.planned:
            return None if self.name else stage or None  # a stage by itself
        pace = self.took / self.estimated if self.estimated > LEARNT_SECONDS else 1.0
        current = max(self.estimate * pace - (now - self.step_began), 0.0) if self.name else 0.0
        if self.parts and stage:
            current = stage  # what is taken side by side needs less than its parts one after the other
        return max(current, stage) + pace * sum(step.seconds for step in self.remaining)

    def times(self) -> str:
        """What a plain line says behind the step; nothing while there is no estimate."""
        so_far = span(time.monotonic() - self.began)
        return f" ({so_far} so far, {self.left_text()})" if self.planned else ""

    def left_text(self) -> str:
        """``about 3 min left``; nothing when there is no estimate."""
        left = self.left()
        return "" if left is None else f"about {span(left)} left"


class Progress:
    """Where stages announce themselves."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = not quiet and sys.stderr.isatty()
        self._course: Course | None = None
        self._live: RichProgress | None = None
        self._own = threading.local()
        """The part of steps side by side that a thread takes."""
        self._turn = threading.Lock()

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning; shown even when quiet."""
        self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        if self._live is not None:  # above the live line
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Show one line for all that is done inside, in ``step``s."""
        self._course = Course()
        try:
            if self.terminal:
                with _live_line(self._course) as self._live:
                    yield
            else:
                yield
        finally:
            self._live, course, self._course = None, self._course, None
        if course.planned:
            self.say(f"done in {span(time.monotonic() - course.began)}")

    def expect(self, steps: Sequence[Step]) -> None:
        """Say what steps are still to come."""
        if self._course is not None:
            self._course.remaining, self._course.planned = list(steps), True

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take a step of a whole run; outside of one this does nothing."""
        course = self._course
        if course is None:
            yield
            return
        if course.parts:
            with self._part(course, name):
                yield
            return
        if course.name == name:  # what several steps share was made in it
            yield
            course.end()
            return
        course.begin(name)
        if self._live is None:
            self.say(f"{course.label()}{name}{course.times()}")
        yield
        course.end()

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Begin a step that ``step`` or ``together`` goes on with: what it needs is made first."""
        if self._course is not None and not self._course.parts:
            self._course.begin(name)
            if self._live is None:
                self.say(f"{self._course.label()}{name}{self._course.times()}")
        yield

    @contextmanager
    def together(self, names: Sequence[str]) -> Iterator[None]:
        """Take steps side by side, each in ``step`` and in a thread of its own; those of some of them are theirs already."""
        if self._course is None or self._course.parts:
            yield
            return
        self._course.begin_together(names)
        yield
        self._course.end_together()

    @contextmanager
    def _part(self, course: Course, name: str) -> Iterator[None]:
        part = course.parts.get(name, Part(0.0))  # a step that nobody expected
        first, part.begun, self._own.part = not part.begun, True, part
        if self._live is None and first:
            self.say(f"{course.label()}{name}{course.times()}")
        yield
        with self._turn:
            part.share = 1.0
            course.add_up()
        self._own.part = None

    def activity(self, text: str) -> None:
        """Say what the current step does; shown on the live line alone."""
        if self._course is not None and not self._course.parts:
            self._course.activity, self._course.total = text, 0.0

    @contextmanager
    def bar(self, label: str, unit: str = "") -> Iterator[Bar]:
        """Show a stage: ``unit`` is ``"B"`` for bytes, ``"tok"`` for tokens, or empty.

        Within a whole run it moves that line; by itself it says the time it took.
        """
        started = time.monotonic()
        if self._course is not None and self._course.parts:
            part = getattr(self._own, "part", None)
            yield _PartBar(self._course, part or Part(0.0), self._turn)  # none: what several of them need
            return
        if self._course is not None:
            before = self._course.activity
            yield _StepBar(self, self._course, label, unit, started)
            self.activity(before)
            return
        if self.terminal:
            with self.whole(), self.bar(label, unit) as shown:
                yield shown
        else:
            self.say(f"{label} …")
            yield _PlainBar(self, label, unit, started)
        self.say(f"{label}: {time.monotonic() - started:.1f} s")


class _StepBar:
    """A stage within a step: the live line shows it, plain output says it once a minute."""

    def __init__(self, progress: Progress, course: Course, label: str, unit: str, started: float) -> None:
        self._progress = progress
        self._course = course
        self._label = label
        self._last = started
        course.activity, course.unit, course.bar_began = label, unit, started
        course.done = course.total = 0.0

    def move(self, done: float, total: float) -> None:
        course, now = self._course, time.monotonic()
        course.done, course.total = done, total
        if self._progress.terminal or now - self._last < STEP_LINE_SECONDS or not total or not done:
            return
        self._last = now
        left = ", ".join(filter(None, (f"{100 * done / total:.0f} %", course.left_text())))
        self._progress.say(f"{course.label()}{course.name}: {self._label} {left}")


class _PartBar:
    """A stage of a step that is taken beside others: it moves them all."""

    def __init__(self, course: Course, part: Part, turn: threading.Lock) -> None:
        self._course, self._part, self._turn = course, part, turn

    def move(self, done: float, total: float) -> None:
        with self._turn:
            self._part.share = max(self._part.share, NEARLY * done / total if total else 0.0)
            self._course.add_up()


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


def _live_line(course: Course) -> RichProgress:
    """The line of a whole run: the step and what it does, how much of that, and the time left, which ticks by itself."""
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, SpinnerColumn
    from rich.table import Column
    from rich.text import Text

    class Described(ProgressColumn):
        def render(self, task: Task) -> Text:  # noqa: ARG002
            return Text(f"{course.label()}{' · '.join(filter(None, (course.name, course.activity)))}")

    class Measured(ProgressColumn):
        def render(self, task: Task) -> Text:  # noqa: ARG002
            return Text("  ".join(filter(None, (course.share(), course.left_text()))))

    shown = Progress(
        SpinnerColumn(),
        Described(Column(no_wrap=True, overflow="ellipsis")),
        Measured(Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    shown.add_task("", total=None)
    return shown


def span(seconds: float) -> str:
    """A time as people say it: ``41 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def amount(value: float, unit: str) -> str:
    """``value`` with a decimal prefix: ``amount(12_300_000, "B")`` is ``"12.3 MB"``.

    Without a unit it is a count, as of parameters, whose thousand millions are called B.
    """
    for prefix in ("", "k", "M", "G"):
        digits = 1 if prefix else 0
        if abs(round(value, digits)) < 1000 or prefix == "G":
            break
        value /= 1000
    if not unit:
        prefix = prefix.replace("G", "B")
    return f"{value:.{digits}f} {prefix}{unit}".rstrip()
