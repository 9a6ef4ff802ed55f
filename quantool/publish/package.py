"""Folders ready to publish: card, plots, ``quantool.json`` (plan, reports) and ``SHA256SUMS`` beside the artifacts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantool.card.card import write_card
from quantool.card.how_to_run import served_context
from quantool.card.modelfile import MODELFILE, modelfile
from quantool.card.redact import published
from quantool.config.sampling import chosen
from quantool.config.schema import Config
from quantool.publish.leaks import refuse_leaks
from quantool.publish.packed_folder import CARD, NOTICE, RECORD, SUMS, PackedFolder, packed_folder
from quantool.records import FileRecord, OutputPlan, Plan, Report, Verdict, file_record
from quantool.report.finding_text import failures
from quantool.report.plots import draw
from quantool.runtime.workspace import Workspace, write_text

__all__ = ["SUMS", "pack"]

TITLE = re.compile(r"\A(---\n.*?\n---\n)?\s*(# [^\n]*\n)?", re.DOTALL)


def pack(
    plan: Plan, reports: Sequence[Report], workspace: Workspace, repos: Collection[str] | None = None
) -> tuple[PackedFolder, ...]:
    """Write the records of each folder to publish, or of those named ``repos``.

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
        folders.append(_pack_folder(plan, outputs, own, plots, folder, machine_folders))
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
    folder: Path,
    machine_folders: Mapping[str, Path],
) -> PackedFolder:
    drawn = [file_record(folder, name) for name in plots]
    record: dict[str, Any] = {
        "plan": published(plan) | {"outputs": [published(output) for output in outputs]},
        "reports": [published(report) | {"verdict": report.verdict()} for report in reports],
        "plots": [file.model_dump() for file in drawn],
    }
    texts = {CARD: with_notice(write_card(plan, outputs, reports, plots), reports)}
    named = {
        file.name: file for report in reports for file in (*report.artifact.files, *report.artifact.shared)
    }
    sampling = chosen(plan.source, Config.model_validate(plan.config))
    if (text := modelfile(reports, sampling, served_context(plan))) is not None:
        texts[MODELFILE] = text
        made = text.encode()
        own = FileRecord(name=MODELFILE, bytes=len(made), sha256=hashlib.sha256(made).hexdigest())
        record["modelfile"] = own.model_dump()
    texts[RECORD] = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    refuse_leaks(folder, named, texts, machine_folders, plan.source.folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    named |= {file.name: file for file in (*(file_record(folder, name) for name in texts), *drawn)}
    lines = [f"{file.sha256}  {file.name}\n" for _, file in sorted(named.items())]
    write_text(folder / SUMS, "".join(lines))
    return packed_folder(folder, record, {name: file.sha256 for name, file in sorted(named.items())})


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
