"""How far a run is, stage by stage, on whichever machines it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from quantool.cluster.marks import Mark, Outcome, RunOrder
from quantool.cluster.scheduler import JobState
from quantool.runtime.progress import span


class Phase(StrEnum):
    """Where a stage is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    HELD = "held back"
    """What it needs has failed."""

    @property
    def goes_on(self) -> bool:
        """Whether it may still change by itself."""
        return self in (Phase.WAITING, Phase.RUNNING)


@dataclass(frozen=True)
class Progressing:
    """A stage and where it is."""

    name: str
    phase: Phase
    job: str
    place: str
    """The node that does it."""
    note: str
    """Time it took or has left, why it waits, what it failed with."""


def phases(
    order: RunOrder,
    marks: Mapping[str, Mark],
    jobs: Mapping[str, JobState],
    *,
    is_run: bool,
    now: float | None = None,
) -> tuple[Progressing, ...]:
    """Where every stage is: ``jobs`` are those that the scheduler has, ``is_run`` says that a run on one machine lives."""
    found: dict[str, Progressing] = {}
    for stage in order.stages:
        mark, job = marks.get(stage.name), jobs.get(stage.job or "")
        failed = [before for before in stage.after if before in found and not _may_end_well(found[before])]
        has_failed = mark is not None and mark.outcome is Outcome.FAILED
        if job is not None and not job.begins_again and (failed or has_failed):
            job = None
        alive = job is not None or is_run
        place = mark.host if mark is not None else ""
        phase, note = Phase.WAITING, ""
        if mark is not None and mark.outcome is Outcome.DONE:
            phase, note = Phase.DONE, span((mark.ended or mark.began) - mark.began)
        elif mark is not None and mark.outcome is Outcome.BEGUN and alive:
            phase = Phase.RUNNING
            note = _left(stage.seconds, mark, job, time.time() if now is None else now)
        elif job is not None:
            place, note = job.node, job.reason if job.reason != "None" else ""
        elif mark is not None and mark.outcome is Outcome.FAILED and not is_run:
            phase, note = Phase.FAILED, mark.message
        elif mark is not None and not is_run:
            phase, note = Phase.FAILED, "it ended without a word: cancelled or killed; submit again to go on"
        elif failed:
            phase, note = Phase.HELD, f"by {', '.join(failed)}"
        elif not is_run:
            phase, note = Phase.FAILED, "it has no job: cancelled, or not sent yet; submit again"
        found[stage.name] = Progressing(stage.name, phase, stage.job or "", place, note)
    return tuple(found.values())


def _may_end_well(stage: Progressing) -> bool:
    return stage.phase.goes_on or stage.phase is Phase.DONE


def _left(seconds: float, mark: Mark, job: JobState | None, now: float) -> str:
    """How long it will take, by the estimate; beside it how long it may."""
    taken = now - mark.began
    parts = [f"{span(taken)} so far"]
    if seconds > taken:
        parts.append(f"about {span(seconds - taken)} left")
    if job is not None and job.left not in ("", "UNLIMITED", "INVALID"):
        parts.append(f"limit in {job.left}")
    return ", ".join(parts)


def table(stages: Sequence[Progressing]) -> str:
    """The stages as lines, and how many of them are where."""
    rows = [(each.name, str(each.phase), each.job, each.place, each.note) for each in stages]
    widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    counts = {phase: sum(each.phase is phase for each in stages) for phase in Phase}
    return "\n".join([*lines, ", ".join(f"{count} {phase}" for phase, count in counts.items() if count)])
