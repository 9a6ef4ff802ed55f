"""The run: source → scan → plan → methods → checks → folders to publish. Every step is skipped when it is done already."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantool import hub, process, registry
from quantool.config import Config
from quantool.errors import PublicationError, SourceError
from quantool.package import SUMS, pack
from quantool.plan import check_disk, make_plan, versions
from quantool.plots import draw
from quantool.preflight import preflight
from quantool.progress import Progress
from quantool.publication import destination, read_parcel
from quantool.records import (
    Artifact,
    Finding,
    Gates,
    OutputPlan,
    Plan,
    Publication,
    Report,
    Source,
    Verdict,
    fingerprint,
)
from quantool.registry import Case, Job
from quantool.report import write_report
from quantool.source import identity, overlay, resolve
from quantool.subject import judged_by
from quantool.workspace import Workspace, write_text


@dataclass(frozen=True)
class Outcome:
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
    """What ``run`` would do. Weights are neither read nor downloaded, the output folder stays as it is."""
    workspace = Workspace(config.output_path)
    source = resolve(config, weights=False, progress=progress)
    missing = [file.bytes for file in source.files if not (source.folder / file.name).exists()]
    source = _recalled(source, workspace)
    return make_plan(config, source, workspace, downloads=sum(missing))


def run(config: Config, progress: Progress) -> Outcome:
    """Do everything that ``config`` asks for; a rerun redoes only what changed.

    With ``push_to_hub`` each folder whose artifacts all passed is published, whatever became of the others.
    """
    workspace = Workspace(config.output_path)
    if config.push_to_hub:
        preflight({wanted.repo_id or "": _private(config) for wanted in config.requested()})
    with workspace.lock():
        made, artifacts = _make_all(config, workspace, progress)
        _drop_sums(artifacts)
        reports = tuple(
            judge(_case(config, made.source, output, artifact, workspace), artifact, progress)
            for output, artifact in zip(made.outputs, artifacts, strict=True)
        )
        folders = pack(made, reports, workspace)
        write_report(reports, workspace.root, folders)
        outcome = Outcome(made, reports)
        return _publish_passed(config, outcome, folders, progress) if config.push_to_hub else outcome


def _private(config: Config) -> bool | None:
    """What the user said; None (create as private, take an existing repository as it is) when nothing."""
    return config.private if "private" in config.model_fields_set else None


def _publish_passed(config: Config, outcome: Outcome, folders: Sequence[Path], progress: Progress) -> Outcome:
    """Publish the folders without a failed artifact; one that the Hub refuses does not keep the next one back."""
    failed = {report.artifact.folder for report in outcome.failed}
    done, refused = [], []
    for folder in folders:
        if folder in failed:
            progress.warn(f"{folder.name} is not published: an artifact in it did not pass")
            continue
        try:
            done.append(_publish(folder, None, _private(config), progress))
        except PublicationError as error:
            refused.append(error)
    return replace(outcome, publications=tuple(done), refused=tuple(refused))


def _publish(folder: Path, repo_id: str | None, private: bool | None, progress: Progress) -> Publication:
    repo_id = destination(read_parcel(folder), repo_id)
    made = hub.publish(folder, repo_id, private=private, progress=progress)
    record = folder.parent / "records" / f"{folder.name}.publication.json"
    write_text(record, made.model_dump_json(indent=1))
    return made


def publish(folder: Path, repo_id: str | None, private: bool | None, progress: Progress) -> Publication:
    """Publish a folder that a run packed; None stands for what that run's configuration said."""
    folder = folder.absolute()
    parcel = read_parcel(folder)
    private = parcel.private if private is None else private
    preflight({destination(parcel, repo_id): private})
    workspace = Workspace(folder.parent)
    with workspace.lock() if workspace.state.is_dir() else nullcontext():  # elsewhere no run can be writing
        return _publish(folder, repo_id, private, progress)


def make(config: Config, progress: Progress) -> tuple[Artifact, ...]:
    """The artifacts alone, not judged and not to be published: what a benchmark of the methods needs."""
    workspace = Workspace(config.output_path)
    with workspace.lock():
        return _make_all(config, workspace, progress)[1]


def _make_all(config: Config, workspace: Workspace, progress: Progress) -> tuple[Plan, tuple[Artifact, ...]]:
    source = resolve(config, weights=True, progress=progress)
    source = overlay(source, workspace.work / "source")
    check_disk(make_plan(config, _recalled(source, workspace), workspace), workspace.root)
    source = scan(source, workspace, progress)
    made = make_plan(config, source, workspace)
    for note in made.warnings:
        progress.warn(note)
    write_text(workspace.root / "plan.json", made.model_dump_json(indent=1))
    return made, tuple(_make(config, made, output, workspace, progress) for output in made.outputs)


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


def scan(source: Source, workspace: Workspace, progress: Progress) -> Source:
    """Hash every weight file and look at every weight once; the source with hashes and largest magnitude.

    Raises SourceError when weights are NaN or infinite.
    """
    from quantool.scan import require_finite

    def produce() -> tuple[list[Path], dict[str, Any]]:
        with progress.bar("scan weights", "B") as bar:
            found = process.call(
                "quantool.scan:scan_worker",
                {"folder": str(source.folder)},
                log=workspace.logs / "scan.log",
                bar=bar,
                failure=SourceError,
            )
        require_finite(found)
        return [], found

    return _with_scan(source, workspace.stage("scan", fingerprint(identity(source)), produce))


def _recalled(source: Source, workspace: Workspace) -> Source:
    """The source with what an earlier scan of the same files found, if there was one."""
    found = workspace.recall("scan", fingerprint(identity(source))) if _is_here(source) else None
    return source if found is None else _with_scan(source, found)


def _is_here(source: Source) -> bool:
    return all((source.folder / file.name).exists() for file in source.files)


def _with_scan(source: Source, found: dict[str, Any]) -> Source:
    hashes = {name: entry["sha256"] for name, entry in found["files"].items()}
    files = tuple(
        file if file.sha256 else file.model_copy(update={"sha256": hashes[file.name]})
        for file in source.files
    )
    return source.model_copy(update={"files": files, "max_abs": found["max_abs"]})


def _make(
    config: Config, made: Plan, output: OutputPlan, workspace: Workspace, progress: Progress
) -> Artifact:
    """Let the method make one output."""
    method = registry.find_method(output.method)
    options = method.options.model_validate(output.options)
    job = Job(config, made, output, workspace)
    artifact = method.quantize(job, options, progress)
    artifact = artifact.model_copy(update={"folder": job.folder})  # a recalled one says where it was
    write_text(_record(workspace, "artifact", output.id), artifact.model_dump_json(indent=1))
    return artifact


def _case(
    config: Config, source: Source, output: OutputPlan, artifact: Artifact, workspace: Workspace
) -> Case:
    path = artifact.folder
    if output.engine == "llama.cpp":
        path = path / artifact.files[0].name
    return Case(path, output.engine, output.id, source, config, output.gates, workspace)


def judge(case: Case, artifact: Artifact, progress: Progress) -> Report:
    """Run every check on one artifact; kept under the hashes of its files and all that the checks depend on."""
    names = case.settings.checks or tuple(registry.names("checks"))
    texts = _texts(case.config)
    key = fingerprint(
        [file.model_dump() for file in artifact.files],
        {file.name: file.sha256 for file in case.source.files},
        case.settings.model_copy(update={"gates": {}}),  # those of other levels do not matter
        case.gates,
        texts,
        names,
        versions(),
    )
    stage = f"report/{case.name}"
    known = all(identity is not None for _, identity in texts)  # a data set on the Hub may have changed
    if known and (kept := case.workspace.recall(stage, key)) is not None:
        report = Report.model_validate(kept).model_copy(update={"artifact": artifact})
    else:
        report = _judged(case, names, artifact, progress)
        files = [artifact.folder / file.name for file in artifact.files]
        case.workspace.keep(stage, key, files, report.model_dump(mode="json"))
    write_text(_record(case.workspace, "report", case.name), report.model_dump_json(indent=1))
    return report


def _judged(case: Case, names: Sequence[str], artifact: Artifact, progress: Progress) -> Report:
    started = time.monotonic()
    findings: list[Finding] = []
    for name in names:
        progress.say(f"{case.name}: {name}")
        findings += registry.find_check(name).judge(case, progress)
    return Report(
        artifact=artifact,
        reference=case.source.label(),
        findings=tuple(findings),
        seconds=time.monotonic() - started,
    )


def _texts(config: Config) -> list[tuple[str, str | None]]:
    """Name and identity of every evaluation text: a changed file is another corpus; None where nothing tells."""
    from quantool import corpus

    return [(entry.name, corpus.identity(entry)) for entry in corpus.corpora(config)]


def _record(workspace: Workspace, kind: str, name: str) -> Path:
    return workspace.root / "records" / f"{name.replace('/', '-')}.{kind}.json"


def validate(artifact: Artifact, engine: str, config: Config, gates: Gates, progress: Progress) -> Report:
    """Judge an artifact that somebody made, against ``config.model_id``, working in ``config.output_path``."""
    workspace = Workspace(config.output_path)
    with workspace.lock():
        source = resolve(config, weights=True, progress=progress)
        source = overlay(source, workspace.work / "source")
        source = scan(source, workspace, progress)
        path = artifact.folder / artifact.files[0].name if engine == "llama.cpp" else artifact.folder
        case = Case(path, engine, f"given/{path.name}", source, config, gates, workspace)
        report = judge(case, judged_by(artifact, engine, source.facts.parameters), progress)
        draw([report], workspace.root, path.name, workspace)
        write_report([report], workspace.root, [workspace.root])
        return report
