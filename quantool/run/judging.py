"""Judging: every check on every artifact, its findings kept under what they depend on until that changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantool.cluster.marks import marked_in_run
from quantool.config.schema import Config
from quantool.plan import effort
from quantool.plan.depends import depends_of
from quantool.plugins import find
from quantool.plugins.contract import Case, Check, left_file
from quantool.plugins.keys import PACKED, own_files
from quantool.publish import preupload
from quantool.publish.package import SUMS
from quantool.records import Artifact, Finding, Gates, OutputPlan, Plan, Report, sha256_of
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace, write_text
from quantool.tasks import Task


def judge(cases: Sequence[Case], artifacts: Sequence[Artifact], progress: Progress) -> tuple[Report, ...]:
    """Run the checks on the artifacts; findings that still hold are taken from the workspace, check by check.

    What a check can do for several artifacts at once (``Check.prepare``) is done once for those that it has to judge.
    """
    checks = checks_of(cases[0].config, cases[0].source.facts.task) if cases else []
    kept = [
        {check.name: _kept(check, case, artifact) for check in checks}
        for case, artifact in zip(cases, artifacts, strict=True)
    ]
    shared: dict[str, float] = {}
    with progress.step(effort.COMPARE):
        for check in checks:
            waiting = [case for case, known in zip(cases, kept, strict=True) if known[check.name] is None]
            if check.require is not None and waiting:
                check.require(waiting[0].config, waiting[0].source)
            if check.prepare is not None and waiting:
                started = time.monotonic()
                check.prepare(waiting, progress)
                shared[check.name] = (time.monotonic() - started) / len(waiting)
    reports = []
    for case, artifact, known in zip(cases, artifacts, kept, strict=True):
        name = effort.judge_step(case.name)
        with marked_in_run(case.workspace, name), progress.step(name):
            results = {
                check.name: known[check.name]
                or _judged(check, case, artifact, shared.get(check.name, 0.0), progress)
                for check in checks
            }
        report = _report(case, artifact, results)
        write_text(record_path(case.workspace, "report", case.name), report.model_dump_json(indent=1))
        reports.append(report)
    return tuple(reports)


def kept_report(case: Case, artifact: Artifact) -> Report | None:
    """The report of an earlier run, when the findings of every check still hold."""
    results = {
        check.name: _kept(check, case, artifact) for check in checks_of(case.config, case.source.facts.task)
    }
    found = {name: result for name, result in results.items() if result is not None}
    return _report(case, artifact, found) if len(found) == len(results) else None


def saved_report(workspace: Workspace, output: str) -> Report | None:
    """The report that was written last about the artifact that an output's record has now; None where there is none."""
    try:
        artifact = Artifact.model_validate_json(record_path(workspace, "artifact", output).read_bytes())
        report = Report.model_validate_json(record_path(workspace, "report", output).read_bytes())
    except (OSError, ValidationError):
        return None
    if report.artifact.files != artifact.files:
        return None
    return report.model_copy(
        update={"artifact": artifact.model_copy(update={"folder": workspace.root / artifact.folder.name})}
    )


def case_of(config: Config, plan: Plan, output: OutputPlan, artifact: Artifact, workspace: Workspace) -> Case:
    """What checks are handed of an output's artifact."""
    base = workspace.root / artifact.made_from if artifact.made_from else None
    own = [other for other in plan.outputs if other.repo == output.repo]
    return Case(
        loaded_file(artifact, output.engine),
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


def case_of_source(config: Config, plan: Plan, workspace: Workspace) -> Case:
    """The checkpoint in the place of an artifact: for what checks ask of it alone."""
    return Case(plan.source.folder, "transformers", "reference", plan.source, config, Gates(), workspace)


def loaded_file(artifact: Artifact, engine: str) -> Path:
    """What the engine is given: a GGUF file (the first shard), or the folder."""
    return artifact.folder / artifact.files[0].name if engine == "llama.cpp" else artifact.folder


def drop_sums(artifacts: Sequence[Artifact]) -> None:
    """Remove the SHA256SUMS of an earlier run that records other bytes than were made now; ``pack`` writes it anew.

    Left there, the new files would be judged damaged.
    """
    for artifact in artifacts:
        sums = artifact.folder / SUMS
        try:
            recorded = {*sums.read_text(encoding="utf-8").splitlines()}
        except FileNotFoundError:  # stages of the same folder may be judged at the same time
            continue
        if not {f"{file.sha256}  {file.name}" for file in artifact.files} <= recorded:
            sums.unlink(missing_ok=True)


def record_path(workspace: Workspace, kind: str, name: str) -> Path:
    """Where the record of an output is saved."""
    return workspace.root / "records" / f"{name.replace('/', '-')}.{kind}.json"


def checks_of(config: Config, task: Task | None = None) -> list[Check]:
    """The checks of a configuration, of those that judge models of ``task`` if it is known.

    Raises ConfigError or DependencyError for one that cannot be loaded, ConfigError for one that is asked for and says
    nothing about such models.
    """
    names = config.validation.checks or find.names("checks")
    return [find.find_check(name) for name in (find.judging_checks(config, task) if task else names)]


def _report(case: Case, artifact: Artifact, results: Mapping[str, dict[str, Any]]) -> Report:
    """``results`` are the findings and seconds of each check, by its name."""
    findings = [
        Finding.model_validate(finding) for result in results.values() for finding in result["findings"]
    ]
    return Report(
        artifact=artifact,
        reference=case.source.label(),
        prepared=case.source.prepared.described() if case.source.prepared is not None else "",
        findings=tuple(findings),
        seconds=sum(result["seconds"] for result in results.values()),
        check_seconds={name: result["seconds"] for name, result in results.items()},
    )


def _kept(check: Check, case: Case, artifact: Artifact) -> dict[str, Any] | None:
    """The findings of an earlier run, and the seconds they took.

    What depends on a text that may have changed unseen (a data set on the Hub) is measured again, unless the artifact
    was uploaded and deleted after it was judged.
    """
    if not depends_of(check).is_traceable(case.config) and not preupload.missing(artifact):
        return None
    return case.workspace.recall(_stage(check, case), findings_key(check, case, artifact))


def _judged(
    check: Check, case: Case, artifact: Artifact, prepared: float, progress: Progress
) -> dict[str, Any]:
    """Judge anew; ``prepared`` is this artifact's part of the seconds that several took together."""
    started = time.monotonic()
    if (
        getattr(case.settings, check.name, True) is not None
    ):  # one with an own section does nothing without it
        progress.activity(check.name)
    left = left_file(case.workspace, case.name, check.name)
    left.unlink(missing_ok=True)
    findings = [finding.model_dump(mode="json") for finding in check.judge(case, progress)]
    result = {"findings": findings, "seconds": time.monotonic() - started + prepared}
    files = [*(artifact.folder / file.name for file in artifact.files), *([left] if left.is_file() else [])]
    case.workspace.keep(_stage(check, case), findings_key(check, case, artifact), files, result)
    return result


def _stage(check: Check, case: Case) -> str:
    return f"findings/{case.name}/{check.name}"


def findings_key(check: Check, case: Case, artifact: Artifact) -> str:
    """The key of a check's findings: what it declared, and what every one depends on, the artifact and its plan."""
    depends = depends_of(check)
    promised = case.output and [case.output.files, case.output.bits_per_weight, case.output.needs]
    return case.key(
        depends,
        own_files([*artifact.files, *artifact.shared]),
        [case.engine, promised],
        case.base is not None or artifact.made_from is not None,  # a base that was lost since changes nothing
        case.gates if depends.gates else None,
        _folder(case) if depends.folder else None,
    )


def _folder(case: Case) -> list[Any]:
    """What else the artifact's folder holds: by the plan, or as it lies there."""
    if case.output is not None:
        return [*case.neighbours]
    folder = case.artifact if case.artifact.is_dir() else case.artifact.parent
    packed = [folder / name for name in sorted(PACKED)]
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [names, [sha256_of(path) for path in packed if path.is_file()]]
