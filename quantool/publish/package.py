"""Folders ready to publish: card, plots, ``quantool.json`` (plan, reports) and ``SHA256SUMS`` beside the artifacts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantool.attest.provenance import statement
from quantool.attest.release import CANARY, PROVENANCE, SIGNATURE
from quantool.attest.signature import sign
from quantool.attest.since import EarlierRelease, with_changes
from quantool.card.card import write_card
from quantool.card.how_to_run import served_context
from quantool.card.modelfile import MODELFILE, modelfile
from quantool.card.redact import published
from quantool.config.sampling import chosen
from quantool.config.schema import Config
from quantool.plugins.contract import left_file
from quantool.publish.leaks import refuse_leaks
from quantool.publish.packed_folder import CARD, NOTICE, RECORD, SUMS, PackedFolder, packed_folder
from quantool.records import FileRecord, OutputPlan, Plan, Report, Verdict, file_record
from quantool.report.finding_text import failures
from quantool.report.plots import draw
from quantool.runtime.workspace import Workspace, write_text

__all__ = ["SUMS", "pack"]

TITLE = re.compile(r"\A(---\n.*?\n---\n)?\s*(# [^\n]*\n)?", re.DOTALL)


def pack(
    plan: Plan,
    reports: Sequence[Report],
    workspace: Workspace,
    repos: Collection[str] | None = None,
    earlier: Mapping[str, EarlierRelease] = MappingProxyType({}),
) -> tuple[PackedFolder, ...]:
    """Write the records of each folder to publish, or of those named ``repos``.

    ``earlier`` releases, by folder, are compared with in the card.

    The card says first what did not pass: nothing is written when such a folder is published all the same. Files in it
    that no record names stay where they are and out of SHA256SUMS. Raises PublicationError when a file to publish holds
    a path of this machine.
    """
    folders = []
    machine_folders = {
        "the output folder": workspace.root,
        "the checkpoint's folder": plan.source.folder,
        "the working folder": Path.cwd(),
        **_origins(plan),
        "the home folder": Path.home(),
    }
    for repo in dict.fromkeys(output.repo for output in plan.outputs):
        if repos is not None and repo not in repos:
            continue
        folder = workspace.root / repo
        outputs = [output for output in plan.outputs if output.repo == repo]
        own = [report for report in reports if report.artifact.output in {output.id for output in outputs}]
        plots = draw(own, folder, repo, workspace)
        left = _left(workspace, own)
        folders.append(
            _pack_folder(plan, outputs, own, plots, left, folder, machine_folders, earlier.get(repo))
        )
    return tuple(folders)


def _origins(plan: Plan) -> dict[str, Path]:
    """Where the checkpoint was found before it was prepared, and the adapter."""
    prepared = plan.source.prepared
    if prepared is None:
        return {}
    adapter = {} if prepared.adapter is None else {"the adapter's folder": prepared.adapter.folder}
    return {"the original checkpoint's folder": prepared.origin.folder, **adapter}


def _pack_folder(
    plan: Plan,
    outputs: Sequence[OutputPlan],
    reports: Sequence[Report],
    plots: Sequence[str],
    left: Mapping[str, Mapping[str, Any]],
    folder: Path,
    machine_folders: Mapping[str, Path],
    earlier: EarlierRelease | None,
) -> PackedFolder:
    drawn = [file_record(folder, name) for name in plots]
    record = _record(plan, outputs, reports, drawn)
    texts = _texts(plan, outputs, reports, plots, left)
    texts[CARD] = with_notice(with_changes(texts[CARD], earlier, reports), reports)
    if MODELFILE in texts:
        record["modelfile"] = _of_text(MODELFILE, texts[MODELFILE]).model_dump()
    texts[RECORD] = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    judged = {
        file.name: file for report in reports for file in (*report.artifact.files, *report.artifact.shared)
    }
    refuse_leaks(folder, judged, texts, machine_folders, plan.source.folder)
    for name in {CANARY, MODELFILE} - texts.keys():
        (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
    packed = judged | {file.name: file for file in (*(_of_text(*each) for each in texts.items()), *drawn)}
    return packed_folder(folder, record, _attested(plan, folder, record["plan"], packed))


def _record(
    plan: Plan, outputs: Sequence[OutputPlan], reports: Sequence[Report], drawn: Sequence[FileRecord]
) -> dict[str, Any]:
    """quantool.json."""
    return {
        "plan": published(plan) | {"outputs": [published(output) for output in outputs]},
        "reports": [published(report) | {"verdict": report.verdict()} for report in reports],
        "plots": [file.model_dump() for file in drawn],
    }


def _texts(
    plan: Plan,
    outputs: Sequence[OutputPlan],
    reports: Sequence[Report],
    plots: Sequence[str],
    left: Mapping[str, Mapping[str, Any]],
) -> dict[str, str]:
    """The card, and what else is read beside an artifact, where there is any."""
    texts = {CARD: write_card(plan, outputs, reports, plots)}
    if left:
        texts[CANARY] = json.dumps(left, ensure_ascii=False, separators=(",", ":")) + "\n"
    sampling = chosen(plan.source, Config.model_validate(plan.config))
    if (text := modelfile(reports, sampling, served_context(plan))) is not None:
        texts[MODELFILE] = text
    return texts


def _of_text(name: str, text: str) -> FileRecord:
    content = text.encode()
    return FileRecord(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _attested(
    plan: Plan, folder: Path, record: Mapping[str, Any], files: Mapping[str, FileRecord]
) -> dict[str, str]:
    """SHA-256 by name, after provenance, signature and SHA256SUMS were written.

    SHA256SUMS is the last: where signing fails, the folder is not one that can be published.
    """
    digests = {name: file.sha256 for name, file in files.items()}
    origin = statement(record, digests, RECORD)
    write_text(folder / PROVENANCE, origin)
    sums = dict(sorted((digests | {PROVENANCE: _of_text(PROVENANCE, origin).sha256}).items()))
    text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    signer = Config.model_validate(plan.config).sign
    if signer is None:
        (folder / SIGNATURE).unlink(missing_ok=True)
    else:
        sign(folder, sums | {SUMS: _of_text(SUMS, text).sha256}, signer)
    write_text(folder / SUMS, text)
    return sums


def _left(workspace: Workspace, reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """What checks left to be published with the artifacts that they judged: by check, then by output."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        output = report.artifact.output
        for check in dict.fromkeys(finding.check for finding in report.findings):
            file = left_file(workspace, output, check)
            if file.is_file():
                found.setdefault(check, {})[output] = json.loads(file.read_bytes())
    return found


def with_notice(card: str, reports: Sequence[Report]) -> str:
    """The card with a section on what did not pass, after its title; unchanged when everything passed."""
    failed = [report for report in reports if report.verdict() is not Verdict.PASS]
    if not failed:
        return card
    unjudged = [
        f"{report.artifact.level}: nothing was judged"
        for report in failed
        if report.verdict() is Verdict.SKIPPED
    ]
    listed = "\n".join(f"- {line}" for line in (*failures(failed), *unjudged))
    section = f"{NOTICE}\n\nThese artifacts did not pass their checks; only `--allow-regression` publishes them:\n\n{listed}\n"
    title = TITLE.match(card)
    end = title.end() if title else 0
    return f"{card[:end]}\n{section}\n{card[end:].lstrip()}"
