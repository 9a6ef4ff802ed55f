"""The run: source → scan → plan → methods → checks → folders to publish. Every step is skipped when it is done already."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantool.card.user_template import read_card_template
from quantool.config.schema import Config, Corpus
from quantool.errors import PublicationError
from quantool.given_artifacts import judged_by
from quantool.plan import effort
from quantool.plan.disk import check_disk
from quantool.plan.make import make_plan
from quantool.plugins import find
from quantool.plugins.contract import Case, Job
from quantool.publish import preupload
from quantool.publish.package import SUMS, pack
from quantool.publish.permissions import preflight
from quantool.publish.publish import Order, private_of, publish_passed
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
from quantool.report.files import write_report
from quantool.report.plots import draw
from quantool.report.sections import not_run
from quantool.runtime.progress import Progress
from quantool.runtime.versions import versions
from quantool.runtime.workspace import Workspace, write_text
from quantool.source.resolve import overlay, resolve
from quantool.source.scan import recall_scan, scan_source


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
    workspace = Workspace(config.output_path, bounded=config.disk_bounded)
    with progress.step(f"read the headers of {config.model_id}"):
        source = resolve(config, weights=False, progress=progress)
    missing = [file.bytes for file in source.files if not (source.folder / file.name).exists()]
    source = recall_scan(source, workspace)
    with progress.step("work out files, sizes and memory"):
        return _checked_plan(config, source, workspace, downloads=sum(missing))


def run(config: Config, progress: Progress, *, allow_regression: bool = False) -> Outcome:
    """Do everything that ``config`` asks for; a rerun redoes only what changed.

    With ``push_to_hub`` each folder whose artifacts all passed is published, whatever became of the others; with
    ``allow_regression`` those with artifacts that did not pass as well. With ``disk_bounded`` a level is made, judged,
    uploaded and deleted before the next one, and the commit names them all.
    """
    workspace = Workspace(config.output_path, bounded=config.disk_bounded)
    if config.push_to_hub:
        preflight({wanted.repo_id or "": private_of(config) for wanted in config.requested()}, config.publish)
    with workspace.lock():
        made = _planned(config, workspace, progress)
        progress.expect(effort.steps(made, config, {stage.name for stage in made.stages if stage.done}))
        if config.disk_bounded:
            reports = _one_by_one(config, made, workspace, progress, allow_regression=allow_regression)
        else:
            reports = _all_at_once(config, made, workspace, progress)
        with progress.step(effort.PACK):
            folders = pack(made, reports, workspace)
        write_report(reports, workspace.root, folders, not_run(config, reports))
        outcome = Outcome(made, reports)
        if not config.push_to_hub:
            return outcome
        order = Order(private=private_of(config), allow_regression=allow_regression)
        with progress.step(effort.PUBLISH):
            done, refused = publish_passed(config, reports, folders, order, progress)
        return replace(outcome, publications=done, refused=refused)


def _all_at_once(config: Config, made: Plan, workspace: Workspace, progress: Progress) -> tuple[Report, ...]:
    artifacts = [_make(config, made, output, workspace, progress) for output in made.outputs]
    _drop_sums(artifacts)
    cases = [
        _case(config, made.source, output, artifact, workspace)
        for output, artifact in zip(made.outputs, artifacts, strict=True)
    ]
    return judge(cases, artifacts, progress)


def _one_by_one(
    config: Config, made: Plan, workspace: Workspace, progress: Progress, *, allow_regression: bool
) -> tuple[Report, ...]:
    """Make, judge, upload and delete one level after the other.

    One that an earlier run was done with is left alone as long as its report holds and the Hub has its files. One that
    did not pass is deleted as well; its report stays.
    """
    reports = []
    for output in made.outputs:
        target = preupload.Target(output.repo_id or "", private_of(config), config.publish)
        artifact = _make(config, made, output, workspace, progress)
        case = _case(config, made.source, output, artifact, workspace)
        if gone := preupload.missing(artifact):
            known = _known_report(case, artifact)
            goes_out = known is not None and (allow_regression or known.verdict() is Verdict.PASS)
            if known is None or (goes_out and not preupload.is_whole(workspace, target, artifact, progress)):
                preupload.forget(workspace, target.repo_id, artifact.folder, gone)
                artifact = _make(config, made, output, workspace, progress)
        _drop_sums([artifact])
        (report,) = judge([case], [artifact], progress)
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
        made = _planned(config, workspace, progress)
        return tuple(_make(config, made, output, workspace, progress) for output in made.outputs)


def _planned(config: Config, workspace: Workspace, progress: Progress) -> Plan:
    """The plan, with the source fetched and looked at."""
    with progress.step(f"read {config.model_id}"):
        source = resolve(config, weights=True, progress=progress)
        source = overlay(source, workspace.work / "source")
    with progress.step("work out files, sizes and memory"):
        check_disk(_checked_plan(config, recall_scan(source, workspace), workspace), workspace.root)
    with progress.step("scan weights"):
        source = scan_source(source, workspace, progress)
    made = _checked_plan(config, source, workspace)
    known = _warned(workspace)
    for note in made.warnings:
        if note not in known:
            progress.warn(note)
    write_text(workspace.root / "plan.json", made.model_dump_json(indent=1))
    return made


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


def _checked_plan(config: Config, source: Source, workspace: Workspace, *, downloads: int = 0) -> Plan:
    """The plan of a configuration whose card template is one; ConfigError with file and line when it is none."""
    if config.card.template is not None:
        read_card_template(config.card.template)
    return make_plan(config, source, workspace, downloads=downloads)


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


def _make(
    config: Config, made: Plan, output: OutputPlan, workspace: Workspace, progress: Progress
) -> Artifact:
    """Let the method make one output."""
    method = find.find_method(output.method)
    options = method.options.model_validate(output.options)
    job = Job(config, made, output, workspace)
    with progress.step(effort.make_step(output)):
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
    base = workspace.root / artifact.made_from if artifact.made_from else None
    return Case(
        path,
        output.engine,
        output.id,
        source,
        config,
        output.gates,
        workspace,
        output,
        base if base is not None and base.is_file() else None,
    )


def judge(cases: Sequence[Case], artifacts: Sequence[Artifact], progress: Progress) -> tuple[Report, ...]:
    """Run every check on the artifacts; kept under the hashes of their files and all that the checks depend on.

    What a check can do for several artifacts at once (``Check.prepare``) is done once for those still to judge.
    """
    if not cases:
        return ()
    names = _checks(cases[0])
    kept = [_known_report(case, artifact) for case, artifact in zip(cases, artifacts, strict=True)]
    missing = [case for case, found in zip(cases, kept, strict=True) if found is None]
    with progress.step(effort.COMPARE):
        shared = _prepared(missing, names, progress) if missing else {}
    reports = []
    for case, artifact, found in zip(cases, artifacts, kept, strict=True):
        report = found
        if report is None:
            with progress.step(effort.judge_step(case.name)):
                report = _judged(case, names, artifact, shared, progress)
            files = [artifact.folder / file.name for file in artifact.files]
            key = _report_key(case, artifact)
            case.workspace.keep(f"report/{case.name}", key, files, report.model_dump(mode="json"))
        write_text(_record(case.workspace, "report", case.name), report.model_dump_json(indent=1))
        reports.append(report)
    return tuple(reports)


def _checks(case: Case) -> tuple[str, ...]:
    return case.settings.checks or tuple(find.names("checks"))


def _known_report(case: Case, artifact: Artifact) -> Report | None:
    """The report of an earlier run that still holds.

    A text that is a data set on the Hub may have changed unseen: it is measured again, unless the artifact was
    uploaded and deleted after it was judged.
    """
    sure = all(identity is not None for _, identity in _texts(case.config))
    if not sure and not preupload.missing(artifact):
        return None
    found = case.workspace.recall(f"report/{case.name}", _report_key(case, artifact))
    return None if found is None else Report.model_validate(found).model_copy(update={"artifact": artifact})


def _report_key(case: Case, artifact: Artifact) -> str:
    """What the report depends on, as far as it can be known."""
    return fingerprint(
        [file.model_dump() for file in artifact.files],
        {file.name: file.sha256 for file in case.source.files},
        case.settings.model_copy(update={"gates": {}}),  # those of other levels do not matter
        case.gates,
        case.engine,
        case.base is not None or artifact.made_from is not None,  # a base that was lost since changes nothing
        case.source.commit,
        _promised(case.output),
        _texts(case.config),
        _checks(case),
        versions(),
    )


def _promised(output: OutputPlan | None) -> list[Any]:
    """What the plan says that an artifact is held to."""
    return [] if output is None else [output.files, output.bits_per_weight]


def _prepared(cases: Sequence[Case], names: Sequence[str], progress: Progress) -> dict[str, float]:
    """Do what checks can do for all ``cases`` at once; each case's even part of the seconds, by check."""
    seconds = {}
    for name in names:
        if (prepare := find.find_check(name).prepare) is not None:
            started = time.monotonic()
            prepare(cases, progress)
            seconds[name] = (time.monotonic() - started) / len(cases)
    return seconds


def _judged(
    case: Case, names: Sequence[str], artifact: Artifact, shared: Mapping[str, float], progress: Progress
) -> Report:
    findings: list[Finding] = []
    seconds: dict[str, float] = {}
    for name in names:
        if (
            getattr(case.settings, name, True) is not None
        ):  # one with a section of its own and none given does nothing
            progress.activity(name)
        started = time.monotonic()
        findings += find.find_check(name).judge(case, progress)
        seconds[name] = time.monotonic() - started + shared.get(name, 0.0)
    return Report(
        artifact=artifact,
        reference=case.source.label(),
        findings=tuple(findings),
        seconds=sum(seconds.values()),
        check_seconds=seconds,
    )


def _texts(config: Config) -> list[tuple[str, str | None]]:
    """Name and identity of every evaluation text: a changed file is another corpus; None where nothing tells."""
    from quantool.texts import corpus

    settings = config.validation
    texts = [*corpus.corpora(config)]
    for name, path in (("conversations", settings.conversations), ("prompts", settings.behaviour.prompts)):
        if path is not None:
            texts.append(Corpus(name=name, path=path))
    if settings.needle is not None and settings.needle.haystack is not None:
        texts.append(Corpus(name="haystack", path=settings.needle.haystack))
    found = [(entry.name, corpus.identity(entry)) for entry in texts]
    return found if settings.lm_eval is None else [*found, ("lm_eval", None)]  # its data lies anywhere


def _record(workspace: Workspace, kind: str, name: str) -> Path:
    return workspace.root / "records" / f"{name.replace('/', '-')}.{kind}.json"


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
            source = scan_source(source, workspace, progress)
        cases = [
            Case(path, engine, f"given/{path.name}", source, config, gates, workspace, base=base)
            for path, gates in zip((_loaded(one, engine) for one in artifacts), limits, strict=True)
        ]
        counted = [judged_by(artifact, engine, source.facts.parameters) for artifact in artifacts]
        reports = judge(cases, counted, progress)
        title = cases[0].artifact.name if len(cases) == 1 else source.name
        draw(reports, workspace.root, title, workspace)
        write_report(reports, workspace.root, [workspace.root], not_run(config, reports))
        return reports


def _loaded(artifact: Artifact, engine: str) -> Path:
    """What the engine is given: a GGUF file (the first shard), or the folder."""
    return artifact.folder / artifact.files[0].name if engine == "llama.cpp" else artifact.folder
