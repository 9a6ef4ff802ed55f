"""Where stages are, from what was ordered, their marks and the scheduler's jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantool.cluster.marks import (
    Mark,
    OrderedStage,
    Outcome,
    RunOrder,
    forget_marks,
    mark_done,
    marked,
    read_marks,
    read_order,
    save_order,
)
from quantool.cluster.scheduler import JobState
from quantool.cluster.status import Phase, phases, table
from quantool.errors import QuantizationError
from quantool.runtime.workspace import Workspace

STAGES = (
    OrderedStage(name="source", after=(), seconds=60, job="1"),
    OrderedStage(name="make a", after=("source",), seconds=600, job="2_0"),
    OrderedStage(name="make b", after=("source",), seconds=600, job="2_1"),
    OrderedStage(name="judge a", after=("make a",), seconds=5, job="3"),
    OrderedStage(name="judge b", after=("make b",), seconds=5, job="4"),
)
ORDER = RunOrder(config={}, folder="/", versions={}, engine="slurm", stages=STAGES)


def mark(stage: str, outcome: Outcome, ended: float | None = None, message: str = "") -> Mark:
    return Mark(stage=stage, outcome=outcome, host="node4", job="", began=1000, ended=ended, message=message)


def marks(*given: Mark) -> dict[str, Mark]:
    return {each.stage: each for each in given}


def test_every_phase() -> None:
    known = marks(
        mark("source", Outcome.DONE, 1042),
        mark("make a", Outcome.BEGUN),
        mark("make b", Outcome.FAILED, 1010, "the disk is full"),
    )
    jobs = {"2_0": JobState("running", "1:00:00", "node4"), "3": JobState("pending", reason="Dependency")}
    found = phases(ORDER, known, jobs, is_run=False, now=1200)
    assert [(each.phase, each.note) for each in found] == [
        (Phase.DONE, "42 s"),
        (Phase.RUNNING, "3 min so far, about 7 min left, limit in 1:00:00"),
        (Phase.FAILED, "the disk is full"),
        (Phase.WAITING, "Dependency"),
        (Phase.HELD, "by make b"),
    ]
    assert table(found).splitlines() == [
        "source   done       1    node4  42 s",
        "make a   running    2_0  node4  3 min so far, about 7 min left, limit in 1:00:00",
        "make b   failed     2_1  node4  the disk is full",
        "judge a  waiting    3           Dependency",
        "judge b  held back  4           by make b",
        "1 waiting, 1 running, 1 done, 1 failed, 1 held back",
    ]


def test_a_job_that_is_gone_without_a_word_has_failed() -> None:
    found = phases(ORDER, marks(mark("source", Outcome.BEGUN)), {}, is_run=False)
    assert found[0].phase is Phase.FAILED
    assert "cancelled or killed" in found[0].note
    assert [each.phase for each in found[1:]] == [Phase.HELD] * 4
    cancelled = phases(ORDER, marks(mark("source", Outcome.DONE, 1001)), {}, is_run=False)
    assert "it has no job" in cancelled[1].note


def test_a_requeued_job_waits_or_runs_whatever_it_did_before() -> None:
    known = marks(mark("source", Outcome.FAILED, 1001, "killed"))
    (first, *_) = phases(ORDER, known, {"1": JobState("pending", reason="BeginTime")}, is_run=False)
    assert (first.phase, first.note) == (Phase.WAITING, "BeginTime")


def test_a_failed_stage_of_a_scheduler_that_begins_none_again_has_failed_while_others_run() -> None:
    order = ORDER.model_copy(
        update={"engine": "local", "stages": tuple(each.model_copy(update={"job": "9"}) for each in STAGES)}
    )
    known = marks(
        mark("source", Outcome.DONE, 1001),
        mark("make a", Outcome.BEGUN),
        mark("make b", Outcome.FAILED, 1002),
    )
    found = phases(order, known, {"9": JobState("running", begins_again=False)}, is_run=False, now=1003)
    assert [each.phase for each in found] == [
        Phase.DONE, Phase.RUNNING, Phase.FAILED, Phase.WAITING, Phase.HELD,
    ]  # fmt: skip


def test_a_run_on_one_machine() -> None:
    order = ORDER.model_copy(update={"engine": ""})
    known = marks(mark("source", Outcome.DONE, 1001), mark("make a", Outcome.BEGUN))
    found = phases(order, known, {}, is_run=True, now=1001)
    assert [each.phase for each in found] == [Phase.DONE, Phase.RUNNING, *[Phase.WAITING] * 3]
    dead = phases(order, known, {}, is_run=False)
    assert dead[1].phase is Phase.FAILED


def test_marks_say_how_a_stage_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with marked(workspace, "make gguf/Q8_0"):
        assert read_marks(workspace)["make gguf/Q8_0"].outcome is Outcome.BEGUN
    assert read_marks(workspace)["make gguf/Q8_0"].job == "7"
    with pytest.raises(QuantizationError), marked(workspace, "make b"):
        raise QuantizationError("too small", hint="take a larger one")
    failed = read_marks(workspace)["make b"]
    assert (failed.outcome, failed.kind, failed.hint) == (
        Outcome.FAILED,
        "QuantizationError",
        "take a larger one",
    )
    before = read_marks(workspace)["make gguf/Q8_0"]
    mark_done(workspace, ["make gguf/Q8_0", "make b"])
    assert {each.outcome for each in read_marks(workspace).values()} == {Outcome.DONE}
    assert read_marks(workspace)["make gguf/Q8_0"] == before
    forget_marks(workspace, ["make b", "never begun"])
    assert {*read_marks(workspace)} == {"make gguf/Q8_0"}
    with pytest.raises(KeyboardInterrupt), marked(workspace, "make c"):
        raise KeyboardInterrupt
    assert read_marks(workspace)["make c"].outcome is Outcome.BEGUN  # its job says that it is gone


def test_an_order_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_order(Workspace(tmp_path)) is None
    save_order(Workspace(tmp_path), ORDER)
    assert read_order(Workspace(tmp_path)) == ORDER
    (tmp_path / ".quantool" / "order.json").write_text("{}")
    assert read_order(Workspace(tmp_path)) is None


def test_status_of_a_run_here(
    config_file: Callable[..., Path], quantool: Callable[..., object], tmp_path: Path
) -> None:
    ended = quantool("run", config_file(), "-q")
    shown = quantool("status", tmp_path / "out")
    lines = str(vars(shown)["out"]).splitlines()
    assert lines[-1] == "6 done"
    assert [line.split()[0] for line in lines[:-1]] == ["source", "make", "make", "judge", "judge", "pack"]
    again = quantool("status", tmp_path / "out", "--wait", "-q")
    assert vars(again)["out"] == vars(ended)["out"]
    none = quantool("status", tmp_path)
    assert (vars(none)["code"], "no run was begun in" in str(vars(none)["err"])) == (2, True)
