"""One stage of a run by itself, as a job of a cluster does it: everything it needs lies in the output folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.cluster.graph import Kind, RunStage, graph_of
from quantool.cluster.marks import OrderedStage, Outcome, RunOrder, marked, read_marks, read_order
from quantool.config.schema import Config
from quantool.errors import DependencyError, PublicationError, QuantoolError
from quantool.plugins import find
from quantool.plugins.contract import Case
from quantool.publish.package import SUMS, pack
from quantool.publish.packed_folder import read_packed_folder
from quantool.records import MachineState, OutputPlan, Plan, Report
from quantool.report.files import write_report
from quantool.report.sections import not_run
from quantool.run import judging, making
from quantool.run.preparing import planned_beside_others, save_plan
from quantool.runtime.gpus import devices
from quantool.runtime.progress import Progress
from quantool.runtime.unforeseen import written_down
from quantool.runtime.versions import versions
from quantool.runtime.workspace import Workspace


@dataclass(frozen=True)
class StageJob:
    """A stage of the run in an output folder, to be called on another machine (submitit pickles it)."""

    output: str
    stage: str

    def __call__(self) -> None:
        """Do the stage; raises what it fails with, so that the job fails."""
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # submitit's handler lets it pass; its own signal stays
        do_stage(Path(self.output), self.stage, Progress())

    def checkpoint(self) -> Any:
        """What submitit sends when the job has reached its limit: the same again, for finished parts are kept."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def do_stage(root: Path, name: str, progress: Progress) -> None:
    """Do the stage ``name`` of what was ordered in the output folder ``root``.

    Raises DependencyError when nothing was ordered there, or by other versions than this machine has, and what the stage
    fails with; ``quantool status`` tells it.
    """
    workspace = Workspace(root)
    order = read_order(workspace)
    if order is None:
        raise DependencyError(f"nothing was ordered in {root}", hint="quantool submit CONFIG")
    _require_before(workspace, order, name)
    with workspace.share(name), marked(workspace, name), _known_errors():
        _enter(order.folder)
        _refuse_other_versions(order)
        config = config_of(order, root)
        with progress.whole():
            plan, machine = planned_beside_others(config, workspace, progress)
            stage = next((each for each in graph_of(plan, config) if each.name == name), None)
            if stage is None:
                raise DependencyError(
                    f"the plan has no stage {name!r} any more", hint="quantool submit CONFIG"
                )
            _Doing(config, plan, machine, workspace, progress).do(stage)


@contextmanager
def _known_errors() -> Iterator[None]:
    """Raise nothing but QuantoolError, which a mark keeps for ``status``: what nobody foresaw, with the place of its traceback."""
    try:
        yield
    except QuantoolError:
        raise
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        raise DependencyError(f"{error.strerror or error}{place}") from error
    except Exception as error:  # noqa: BLE001 - a bug: a file has its traceback, status the place of that
        unforeseen = written_down(error)
    else:
        return
    raise unforeseen


def _enter(folder: str) -> None:
    """Work where relative paths of the configuration begin; DependencyError where this machine has no such folder."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise DependencyError(
            f"the run was ordered in {folder}, which cannot be entered here: {error.strerror}",
            hint="submit from a folder on the shared file system",
        ) from error


def _require_before(workspace: Workspace, order: RunOrder, name: str) -> None:
    """DependencyError unless all that the stage waits for is done: Slurm takes a cancelled task of an array for done."""
    marks = read_marks(workspace)
    for stage in order.stages:
        for before in stage.after if stage.name == name else ():
            if before not in marks or marks[before].outcome is not Outcome.DONE:
                raise DependencyError(
                    f"{name} needs {before}, which is not done", hint="quantool submit CONFIG"
                )


def config_of(order: RunOrder, root: Path) -> Config:
    """The configuration that was ordered, for the output folder as it is found."""
    return Config.model_validate(order.config).model_copy(update={"output_path": root})


def _refuse_other_versions(order: RunOrder) -> None:
    here = versions()
    differing = [
        f"{name} {wanted} (here {here.get(name) or 'none'})"
        for name, wanted in order.versions.items()
        if here.get(name) != wanted
    ]
    if differing:
        raise DependencyError(
            f"the run was planned with {', '.join(differing)}",
            hint="login and compute nodes must use the same environment",
        )


@dataclass(frozen=True)
class _Doing:
    """A stage at work."""

    config: Config
    plan: Plan
    machine: MachineState
    workspace: Workspace
    progress: Progress

    def do(self, stage: RunStage) -> None:
        outputs = [output for output in self.plan.outputs if output.id in stage.outputs]
        match stage.kind:
            case Kind.SOURCE:
                save_plan(self.plan, self.workspace)  # planning has prepared and read the checkpoint
            case Kind.SHARE:
                making.share(self.config, self.plan, outputs, self.workspace, self.progress)
            case Kind.REFERENCE:
                self._compare(judging.case_of_source(self.config, self.plan, self.workspace))
            case Kind.BASE:
                self._compare(self._case(outputs[0]))
            case Kind.MAKE:
                making.make_one(self.config, self.plan, outputs[0], self.workspace, self.progress)
            case Kind.JUDGE:
                self._judge(outputs[0])
            case Kind.PACK:
                self._pack(outputs)

    def _case(self, output: OutputPlan) -> Case:
        """The case of an artifact that another stage has made: making recalls it."""
        artifact = making.make_one(self.config, self.plan, output, self.workspace, self.progress)
        return judging.case_of(self.config, self.plan, output, artifact, self.workspace)

    def _compare(self, case: Case) -> None:
        for check in find.active_checks(self.config, self.plan.source.facts.task).values():
            if check.compare is not None:
                if check.require is not None:
                    check.require(self.config, self.plan.source)
                with self.progress.step(f"{case.name}, {check.name}"):
                    check.compare(case, self.progress)

    def _judge(self, output: OutputPlan) -> None:
        artifact = making.make_one(self.config, self.plan, output, self.workspace, self.progress)
        judging.drop_sums([artifact])
        case = judging.case_of(self.config, self.plan, output, artifact, self.workspace)
        judging.judge([case], [artifact], self.progress)

    def _pack(self, outputs: Sequence[OutputPlan]) -> None:
        """Pack one folder, then write the report of all that is judged: the last one to pack writes the whole one."""
        packed = [
            report
            for report in self._reports()
            if report.artifact.output in {output.id for output in outputs}
        ]
        pack(self.plan, packed, self.workspace, {output.repo for output in outputs})
        with self.workspace.alone(["report"]):
            reports = self._reports()
            judged = {report.artifact.output for report in reports}
            repos = dict.fromkeys(output.repo for output in self.plan.outputs if output.id in judged)
            folders = [self.workspace.root / repo for repo in repos]
            write_report(reports, self.workspace.root, folders, not_run(self.config, reports))

    def _reports(self) -> tuple[Report, ...]:
        return reports_here(self.plan, self.machine, self.workspace)


def require_devices(config: Config) -> None:
    """DependencyError when the configuration asks for GPUs by number: on a cluster a job is given its own."""
    if devices(config.device).numbers:
        raise DependencyError(
            f"device: {config.device} names GPUs of one machine", hint="set device: cuda, or leave it out"
        )


def done_stages(
    config: Config, plan: Plan, machine: MachineState, workspace: Workspace, graph: Sequence[RunStage]
) -> set[str]:
    """Names of the stages that need not be done: what they make is there, under the key that it would be made under."""
    outputs = {output.id: output for output in plan.outputs}
    done: set[str] = set()
    for stage in graph:
        own = [outputs[name] for name in stage.outputs]
        match stage.kind:
            case Kind.SOURCE:
                is_done = all(file.sha256 for file in plan.source.files)
            case Kind.MAKE:
                is_done = own[0].id in machine.done
            case Kind.JUDGE:
                is_done = own[0].id in machine.done and _is_judged(config, plan, own[0], workspace)
            case Kind.PACK:
                is_done = {*stage.after} <= done and _is_packed(own, workspace)
            case _:  # done for the sake of others alone
                is_done = False
        if is_done:
            done.add(stage.name)
    return done


def _is_judged(config: Config, plan: Plan, output: OutputPlan, workspace: Workspace) -> bool:
    report = judging.saved_report(workspace, output.id)
    if report is None:
        return False
    case = judging.case_of(config, plan, output, report.artifact, workspace)
    return judging.kept_report(case, report.artifact) is not None


def _is_packed(outputs: Sequence[OutputPlan], workspace: Workspace) -> bool:
    """Whether a folder's SHA256SUMS names the artifacts and what was packed with them, and all of it is there."""
    sums = workspace.root / outputs[0].repo / SUMS
    if not sums.is_file():
        return False
    try:
        packed = read_packed_folder(sums.parent)
    except PublicationError:  # damaged, or another version's
        return False
    lines = {*sums.read_text(encoding="utf-8").splitlines()}
    reports = [judging.saved_report(workspace, output.id) for output in outputs]
    files = [file for report in reports if report is not None for file in report.artifact.files]
    verdicts = {report.artifact.output: report.verdict() for report in packed.reports}
    return (
        {f"{file.sha256}  {file.name}" for file in files} <= lines
        and not packed.missing
        and all(
            report is not None and verdicts.get(report.artifact.output) == report.verdict()
            for report in reports
        )
    )


def reports_here(plan: Plan, machine: MachineState, workspace: Workspace) -> tuple[Report, ...]:
    """The reports of the outputs that are made and judged."""
    found = (
        judging.saved_report(workspace, output.id) for output in plan.outputs if output.id in machine.done
    )
    return tuple(report for report in found if report is not None)


def order_of(
    config: Config, plan: Plan, graph: Sequence[RunStage], seconds: Mapping[str, float], engine: str = ""
) -> RunOrder:
    """What is about to be done, with ``seconds`` by stage or output."""
    return RunOrder(
        config=config.model_dump(mode="json", exclude_unset=True),
        folder=str(Path.cwd()),
        versions=plan.versions,
        engine=engine,
        stages=tuple(
            OrderedStage(name=each.name, after=each.after, seconds=_estimate(each, seconds)) for each in graph
        ),
    )


def _estimate(stage: RunStage, seconds: Mapping[str, float]) -> float:
    if stage.name in seconds:
        return seconds[stage.name]
    return seconds.get(stage.outputs[0], 0.0) if stage.kind is Kind.MAKE else 0.0
