"""What became of each stage: a small file beside the others in the output folder, so that ``quantool status`` can tell.

Whether a stage has to be done again is not read here: that the keys of what it made say.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from enum import StrEnum
from pathlib import Path

from pydantic import JsonValue, ValidationError

from quantool.errors import DependencyError, QuantoolError
from quantool.record import Record
from quantool.runtime.workspace import Workspace, write_text


class Outcome(StrEnum):
    """What is known of a stage that was begun."""

    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"


class Mark(Record):
    """The latest attempt at a stage."""

    stage: str
    outcome: Outcome
    host: str
    job: str
    """The Slurm job; empty outside of one."""
    began: float
    """Unix time."""
    ended: float | None = None
    kind: str = ""
    """Class of the error of a stage that failed."""
    message: str = ""
    hint: str = ""


class OrderedStage(Record):
    """A stage as it was ordered."""

    name: str
    after: tuple[str, ...]
    seconds: float
    """As estimated."""
    job: str | None = None
    """Its job in the scheduler, once it has one."""


class RunOrder(Record):
    """What is to be done in an output folder: written when a run begins or is submitted, read by jobs and ``status``."""

    config: dict[str, JsonValue]
    folder: str
    """Where relative paths of the configuration begin."""
    versions: dict[str, str]
    engine: str = ""
    """The scheduler; empty for a run on this machine."""
    stages: tuple[OrderedStage, ...]


def save_order(workspace: Workspace, order: RunOrder) -> None:
    """Keep what is to be done."""
    write_text(workspace.state / "order.json", order.model_dump_json(indent=1))


def read_order(workspace: Workspace) -> RunOrder | None:
    """What was ordered last in this folder; None where nothing was."""
    try:
        return RunOrder.model_validate_json((workspace.state / "order.json").read_bytes())
    except (OSError, ValidationError):
        return None


def read_marks(workspace: Workspace) -> dict[str, Mark]:
    """The marks of all stages, by name."""
    found = {}
    for path in sorted((workspace.state / "marks").glob("[!.]*.json")):
        try:
            mark = Mark.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):  # removed meanwhile, or of another version
            continue
        found[mark.stage] = mark
    return found


@contextmanager
def marked(workspace: Workspace, stage: str) -> Iterator[None]:
    """Note that the stage is begun, and how it ended."""
    begun = Mark(
        stage=stage,
        outcome=Outcome.BEGUN,
        host=socket.gethostname(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        began=time.time(),
    )
    _save(workspace, begun)
    try:
        yield
    except QuantoolError as error:
        cause = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        failed = begun.model_copy(update={"outcome": Outcome.FAILED, "ended": time.time(), **cause})
        with suppress(DependencyError):  # the disk that is full, which the error itself says better
            _save(workspace, failed)
        raise
    _save(workspace, begun.model_copy(update={"outcome": Outcome.DONE, "ended": time.time()}))


@contextmanager
def marked_in_run(workspace: Workspace, stage: str) -> Iterator[None]:
    """As ``marked`` in a run that does all stages; in a job the job itself does it."""
    with marked(workspace, stage) if workspace.holds_all else nullcontext():
        yield


def mark_done(workspace: Workspace, stages: Sequence[str]) -> None:
    """Note stages that need not be done, because what they make is there."""
    known = read_marks(workspace)
    for stage in stages:
        if stage not in known or known[stage].outcome is not Outcome.DONE:
            with marked(workspace, stage):
                pass


def forget_marks(workspace: Workspace, stages: Sequence[str]) -> None:
    """Forget how stages ended that are to be done again."""
    for stage in stages:
        _path(workspace, stage).unlink(missing_ok=True)


def _save(workspace: Workspace, mark: Mark) -> None:
    write_text(_path(workspace, mark.stage), mark.model_dump_json(indent=1))


def _path(workspace: Workspace, stage: str) -> Path:
    return workspace.state / "marks" / f"{stage.replace('/', '-').replace(' ', '-')}.json"
