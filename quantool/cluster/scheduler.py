"""What a scheduler is: what it is handed, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from quantool.cluster.resources import NodeShape, Resources
from quantool.runtime.progress import Progress

Task = Callable[[], None]
"""What a job does: it can be pickled, and is called on the other machine."""


@dataclass(frozen=True)
class StageOrder:
    """A stage to send: what it does, what it needs, and the jobs that must have ended well before."""

    stage: str
    work: Task
    needs: Resources
    after: tuple[str, ...]
    """Names of stages: of this submission, or of earlier ones whose jobs wait or run."""


@dataclass(frozen=True)
class JobState:
    """A job that waits or runs."""

    state: str
    """``pending`` or ``running``; what else a scheduler says in its own words."""
    left: str = ""
    """Time left until its limit, as the scheduler writes it."""
    node: str = ""
    reason: str = ""
    """Why it waits."""
    begins_again: bool = True
    """Whether a stage of it that has failed may be begun again by the scheduler itself."""


class Scheduler(Protocol):
    """A scheduler."""

    def node(self) -> NodeShape:
        """What one of its nodes has. Raises DependencyError or ConfigError where it cannot be used."""

    def check(self, orders: Sequence[StageOrder], progress: Progress) -> None:
        """Raise what it would refuse, in its own words, before anything is sent."""

    def scripts(self, orders: Sequence[StageOrder]) -> str:
        """What would be sent, to read."""

    def submit(
        self, orders: Sequence[StageOrder], jobs: Mapping[str, str], keep: Callable[[str, str], None]
    ) -> None:
        """Send the stages; ``jobs`` are those sent earlier, by stage. ``keep`` is told stage and job as soon as one is."""

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """Those of ``jobs`` that wait or run."""
