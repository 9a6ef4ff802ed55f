"""The run: source → scan → plan → methods → checks → folders to publish. Every step is skipped when it is done already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from quantool.attest.signature import require_signer
from quantool.attest.since import earlier_releases
from quantool.cluster.graph import Kind, RunStage, graph_of
from quantool.cluster.marks import forget_marks, mark_done, save_order
from quantool.config.schema import Config
from quantool.errors import PublicationError
from quantool.given_artifacts import judged_by
from quantool.plan import effort
from quantool.plugins.contract import Case
from quantool.publish import preupload
from quantool.publish.package import pack
from quantool.publish.permissions import preflight
from quantool.publish.publish import Order, private_of, publish_passed
from quantool.records import (
    Artifact,
    Gates,
    MachineState,
    OutputPlan,
    Plan,
    Publication,
    Report,
    Verdict,
    sha256_of,
)
from quantool.report.files import write_report
from quantool.report.plots import draw
from quantool.report.sections import not_run
from quantool.run import judging
from quantool.run.making import lanes_of, make_all, make_one
from quantool.run.preparing import checked_plan, planned
from quantool.run.stages import order_of
from quantool.runtime.parallel import in_threads
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace
from quantool.source.prepare import forget as forget_prepared
from quantool.source.prepare import prepare, to_fetch
from quantool.source.prepare import recall as recall_prepared
from quantool.source.resolve import overlay, resolve
from quantool.source.scan import forget_scan, recall_scan, scan_source


@dataclass(frozen=True)
class RunResult:
    """What a run ends with."""

    plan: Plan
    reports: tuple[Report, ...]
    publications: tuple[Publication, ...] = ()
    refused: tuple[PublicationError, ...] = ()
    """Why folders whose artifacts all passed could not be published."""

    @property
    def failed(self) -> tuple[Report, ...]:
        """Reports of artifacts that must not be published: a gate was not met, or nothing could be judged."""
        return tuple(report for report in self.reports if report.verdict() is not Verdict.PASS)


def plan(config: Config, progress: Progress) -> Plan:
    """What ``run`` would do; see ``plan_here``."""
    return plan_here(config, progress)[0]


def plan_here(config: Config, progress: Progress) -> tuple[Plan, MachineState]:
    """What ``run`` would do, and what of it is done here.

    Weights are neither read nor downloaded, the output folder stays as it is.
    """
    workspace = Workspace(config.output_path, bounded=config.disk_bounded)
    with progress.step(f"read the headers of {config.model_id}"):
        source = resolve(config, weights=False, progress=progress)
    source = recall_scan(recall_prepared(source, workspace), workspace)
    with progress.step("work out files, sizes and memory"):
        return checked_plan(config, source, workspace, downloads=to_fetch(source))


def run(
    config: Config, progress: Progress, *, allow_regression: bool = False, rehash: bool = False
) -> RunResult:
    """Do everything that ``config`` asks for; a rerun redoes only what changed.

    With ``push_to_hub`` each folder whose artifacts all passed is published, whatever became of the others; with
    ``allow_regression`` those with artifacts that did not pass as well. With ``disk_bounded`` a level is made, judged,
    uploaded and deleted before the next one, and the commit names them all. With ``rehash`` the checkpoint and every
    finished file are read again: one whose size and time are as they were, but not its bytes, is made again.
    """
    workspace = Workspace(config.output_path, bounded=config.disk_bounded)
    judging.checks_of(config)  # one that cannot be loaded is found now, not hours later
    require_signer(config.sign)
    if config.push_to_hub:
        ask_hub(config)
    with workspace.lock():
        if rehash:
            forget_prepared(workspace)
            forget_scan(workspace)
        plan, machine = planned(config, workspace, progress)
        if rehash:
            for output in plan.outputs:
                _drop_damaged(workspace, output, progress)
        graph = graph_of(plan, config)
        save_order(workspace, order_of(config, plan, graph, machine.seconds))
        forget_marks(workspace, [stage.name for stage in graph])
        _mark(workspace, graph, Kind.SOURCE)
        progress.expect(effort.steps(plan, config, {*machine.done}))
        if config.disk_bounded:
            reports = _one_by_one(config, plan, workspace, progress, allow_regression=allow_regression)
        else:
            reports = _all_at_once(config, plan, workspace, progress)
        _mark(workspace, graph, Kind.SHARE, Kind.REFERENCE, Kind.BASE)
        effort.learn_making(plan, config, workspace.seconds, {*machine.done})
        effort.learn_checking(plan, config, reports)
        with progress.step(effort.PACK):
            packed = pack(plan, reports, workspace, earlier=earlier_releases(config, plan, progress))
        write_report(reports, workspace.root, [each.folder for each in packed], not_run(config, reports))
        _mark(workspace, graph, Kind.PACK)
        result = RunResult(plan, reports)
        if not config.push_to_hub:
            return result
        order = Order(private=private_of(config), allow_regression=allow_regression)
        with progress.step(effort.PUBLISH):
            done, refused = publish_passed(config, packed, order, progress)
        return replace(result, publications=done, refused=refused)


def ask_hub(config: Config) -> None:
    """Raise PublicationError for repositories that cannot be written to, before anything is made."""
    preflight({wanted.repo_id or "": private_of(config) for wanted in config.requested()}, config.publish)


def _mark(workspace: Workspace, graph: Sequence[RunStage], *kinds: Kind) -> None:
    mark_done(workspace, [stage.name for stage in graph if stage.kind in kinds])


def _all_at_once(config: Config, plan: Plan, workspace: Workspace, progress: Progress) -> tuple[Report, ...]:
    """Make, then judge; what torch makes on a GPU beside what llama.cpp makes, where this machine has room for both."""

    def made_and_judged(outputs: Sequence[OutputPlan]) -> tuple[Report, ...]:
        artifacts = make_all(config, plan, outputs, workspace, progress)
        judging.drop_sums(artifacts)
        cases = [
            judging.case_of(config, plan, output, artifact, workspace)
            for output, artifact in zip(outputs, artifacts, strict=True)
        ]
        return judging.judge(cases, artifacts, progress)

    lanes = lanes_of(config, plan)
    if len(lanes) == 1:
        return made_and_judged(plan.outputs)
    names = [effort.make_step(output) for output in plan.outputs]
    names += [effort.COMPARE, *(effort.judge_step(output.id) for output in plan.outputs)]
    with progress.together(names):
        done = in_threads([partial(made_and_judged, lane) for lane in lanes])
    reports = {report.artifact.output: report for lane in done for report in lane}
    return tuple(reports[output.id] for output in plan.outputs)


def _one_by_one(
    config: Config, plan: Plan, workspace: Workspace, progress: Progress, *, allow_regression: bool
) -> tuple[Report, ...]:
    """Make, judge, upload and delete one level after the other.

    One that an earlier run was done with is left alone as long as its report holds and the Hub has its files. One that
    did not pass is deleted as well; its report stays.
    """
    reports = []
    for output in plan.outputs:
        target = preupload.Target(output.repo_id or "", private_of(config), config.publish)
        artifact = make_one(config, plan, output, workspace, progress)
        case = judging.case_of(config, plan, output, artifact, workspace)
        if gone := preupload.missing(artifact):
            known = judging.kept_report(case, artifact)
            goes_out = known is not None and (allow_regression or known.verdict() is Verdict.PASS)
            if known is None or (goes_out and not preupload.is_whole(workspace, target, artifact, progress)):
                preupload.forget(workspace, target.repo_id, artifact.folder, gone)
                artifact = make_one(config, plan, output, workspace, progress)
        judging.drop_sums([artifact])
        (report,) = judging.judge([case], [artifact], progress)
        if allow_regression or report.verdict() is Verdict.PASS:
            preupload.ship(workspace, target, artifact, progress)
        else:
            preupload.drop(workspace, artifact)
        reports.append(report)
    return tuple(reports)


def make(config: Config, progress: Progress) -> tuple[Artifact, ...]:
    """The artifacts alone, not judged and not to be published: what a benchmark of the methods needs."""
    workspace = Workspace(config.output_path)
    with workspace.lock():
        plan, _ = planned(config, workspace, progress)
        return tuple(make_all(config, plan, plan.outputs, workspace, progress))


def _drop_damaged(workspace: Workspace, output: OutputPlan, progress: Progress) -> None:
    """Delete the files of an earlier run whose bytes are not those that its record has, so that they are made again."""
    record = judging.record_path(workspace, "artifact", output.id)
    if not record.is_file():
        return
    try:
        artifact = Artifact.model_validate_json(record.read_bytes())
    except ValidationError:  # damaged: nothing to compare with, so nothing is taken for finished
        workspace.forget(output.id)
        return
    for file in (*artifact.files, *artifact.shared):
        path = workspace.root / output.repo / file.name
        if path.is_file() and sha256_of(path) != file.sha256:
            progress.warn(f"{path} is not what was made: its bytes changed; made again")
            path.unlink()


def validate(
    artifacts: Sequence[Artifact],
    engine: str,
    config: Config,
    limits: Sequence[Gates],
    progress: Progress,
    base: Path | None = None,
) -> tuple[Report, ...]:
    """Judge artifacts that somebody made, against ``config.model_id``, working in ``config.output_path``.

    ``limits`` are the gates of each. ``base`` is the unquantized GGUF that they were made from: with it, damage done
    by the conversion is told apart.
    """
    workspace = Workspace(config.output_path)
    with workspace.lock():
        with progress.step(f"read {config.model_id}"):
            source = resolve(config, weights=True, progress=progress)
            source = overlay(source, workspace.work / "source")
            source = prepare(source, workspace, progress)
            source = scan_source(source, workspace, progress)
        cases = [
            Case(
                judging.loaded_file(artifact, engine),
                engine,
                f"given/{judging.loaded_file(artifact, engine).name}",
                source,
                config,
                gates,
                workspace,
                base=base,
                files=artifact.files,
            )
            for artifact, gates in zip(artifacts, limits, strict=True)
        ]
        counted = [judged_by(artifact, engine, source.facts.parameters) for artifact in artifacts]
        reports = judging.judge(cases, counted, progress)
        title = cases[0].artifact.name if len(cases) == 1 else source.name
        draw(reports, workspace.root, title, workspace)
        write_report(reports, workspace.root, [workspace.root], not_run(config, reports))
        return reports
