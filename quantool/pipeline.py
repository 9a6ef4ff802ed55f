"""The run: source → scan → plan → methods → checks → folders to publish. Every step is skipped when it is done already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from quantool import judging
from quantool.attest.signature import require_signer
from quantool.attest.since import earlier_releases
from quantool.card.user_template import read_card_template
from quantool.config.schema import Config
from quantool.errors import PublicationError
from quantool.given_artifacts import judged_by
from quantool.making import make_all, make_one
from quantool.plan import effort
from quantool.plan import make as planning
from quantool.plan.disk import check_disk, check_ram
from quantool.plugins.contract import Case
from quantool.publish import preupload
from quantool.publish.package import SUMS, pack
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
    Source,
    Verdict,
    sha256_of,
)
from quantool.report.files import write_report
from quantool.report.plots import draw
from quantool.report.sections import not_run
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace, write_text
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
        return _checked_plan(config, source, workspace, downloads=to_fetch(source))


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
        preflight({wanted.repo_id or "": private_of(config) for wanted in config.requested()}, config.publish)
    with workspace.lock():
        if rehash:
            forget_prepared(workspace)
            forget_scan(workspace)
        plan, machine = _planned(config, workspace, progress)
        if rehash:
            for output in plan.outputs:
                _drop_damaged(workspace, output, progress)
        progress.expect(effort.steps(plan, config, {*machine.done}))
        if config.disk_bounded:
            reports = _one_by_one(config, plan, workspace, progress, allow_regression=allow_regression)
        else:
            reports = _all_at_once(config, plan, workspace, progress)
        effort.learn_making(plan, config, workspace.seconds, {*machine.done})
        effort.learn_checking(plan, config, reports)
        with progress.step(effort.PACK):
            packed = pack(plan, reports, workspace, earlier_releases(config, plan, progress))
        write_report(reports, workspace.root, [each.folder for each in packed], not_run(config, reports))
        result = RunResult(plan, reports)
        if not config.push_to_hub:
            return result
        order = Order(private=private_of(config), allow_regression=allow_regression)
        with progress.step(effort.PUBLISH):
            done, refused = publish_passed(config, packed, order, progress)
        return replace(result, publications=done, refused=refused)


def _all_at_once(config: Config, plan: Plan, workspace: Workspace, progress: Progress) -> tuple[Report, ...]:
    artifacts = make_all(config, plan, workspace, progress)
    _drop_sums(artifacts)
    cases = [
        _case(config, plan, output, artifact, workspace)
        for output, artifact in zip(plan.outputs, artifacts, strict=True)
    ]
    return judging.judge(cases, artifacts, progress)


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
        case = _case(config, plan, output, artifact, workspace)
        if gone := preupload.missing(artifact):
            known = judging.kept_report(case, artifact)
            goes_out = known is not None and (allow_regression or known.verdict() is Verdict.PASS)
            if known is None or (goes_out and not preupload.is_whole(workspace, target, artifact, progress)):
                preupload.forget(workspace, target.repo_id, artifact.folder, gone)
                artifact = make_one(config, plan, output, workspace, progress)
        _drop_sums([artifact])
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
        plan, _ = _planned(config, workspace, progress)
        return tuple(make_all(config, plan, workspace, progress))


def _planned(config: Config, workspace: Workspace, progress: Progress) -> tuple[Plan, MachineState]:
    """The plan, with the source fetched and looked at; what a plan refuses is refused before weights are fetched."""
    with progress.step(f"read {config.model_id}"):
        source = resolve(config, weights=False, progress=progress)
        if missing := to_fetch(source):
            require_room(config, *_checked_plan(config, source, workspace, downloads=missing))
        if source.commit is not None or missing:
            source = resolve(config, weights=True, progress=progress)
        source = overlay(source, workspace.work / "source")
    with progress.step("work out files, sizes and memory"):
        known = recall_scan(recall_prepared(source, workspace), workspace)
        plan, machine = _checked_plan(config, known, workspace)
    require_room(config, plan, machine)
    source = prepare(source, workspace, progress)
    with progress.step("scan weights"):
        source = scan_source(source, workspace, progress)
    plan, machine = _checked_plan(config, source, workspace)
    warned = _warned(workspace)
    for note in plan.warnings:
        if note not in warned:
            progress.warn(note)
    write_text(workspace.root / "plan.json", plan.model_dump_json(indent=1))
    return plan, machine


def require_room(config: Config, plan: Plan, machine: MachineState) -> None:
    """DependencyError when disk or memory of this machine do not hold what the plan needs."""
    check_disk(machine, config.output_path)
    check_ram(plan, machine, config)


def _warned(workspace: Workspace) -> frozenset[str]:
    """What an earlier run of this folder has warned of: once is enough, and ``plan.json`` keeps it."""
    try:
        saved = json.loads((workspace.root / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return frozenset()
    notes = saved.get("warnings") if isinstance(saved, dict) else None
    return (
        frozenset(note for note in notes if isinstance(note, str)) if isinstance(notes, list) else frozenset()
    )


def _checked_plan(
    config: Config, source: Source, workspace: Workspace, *, downloads: int = 0
) -> tuple[Plan, MachineState]:
    """The plan of a configuration whose card template is one; ConfigError with file and line when it is none."""
    if config.card.template is not None:
        read_card_template(config.card.template)
    return planning.plan_here(config, source, workspace, downloads=downloads)


def _drop_sums(artifacts: Sequence[Artifact]) -> None:
    """Remove the SHA256SUMS of an earlier run that records other bytes than were made now; ``pack`` writes it anew.

    Left there, the new files would be judged damaged.
    """
    for artifact in artifacts:
        sums = artifact.folder / SUMS
        recorded = set(sums.read_text(encoding="utf-8").splitlines()) if sums.is_file() else None
        if (
            recorded is not None
            and not {f"{file.sha256}  {file.name}" for file in artifact.files} <= recorded
        ):
            sums.unlink()


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


def _case(config: Config, plan: Plan, output: OutputPlan, artifact: Artifact, workspace: Workspace) -> Case:
    base = workspace.root / artifact.made_from if artifact.made_from else None
    own = [other for other in plan.outputs if other.repo == output.repo]
    return Case(
        _loaded(artifact, output.engine),
        output.engine,
        output.id,
        plan.source,
        config,
        output.gates,
        workspace,
        output,
        base if base is not None and base.is_file() else None,
        (*artifact.files, *artifact.shared),
        tuple(file.name for other in own for file in other.files),
        artifact.details,
    )


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
                _loaded(artifact, engine),
                engine,
                f"given/{_loaded(artifact, engine).name}",
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


def _loaded(artifact: Artifact, engine: str) -> Path:
    """What the engine is given: a GGUF file (the first shard), or the folder."""
    return artifact.folder / artifact.files[0].name if engine == "llama.cpp" else artifact.folder
