"""Folders ready to publish: card, plots, ``quantool.json`` (plan, reports) and ``SHA256SUMS`` beside the artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantool.card.card import write_card
from quantool.card.redact import published
from quantool.publish.leaks import refuse_leaks
from quantool.records import FileRecord, OutputPlan, Plan, Report, sha256_of
from quantool.report.plots import draw
from quantool.runtime.workspace import Workspace, write_text

RECORD = "quantool.json"
SUMS = "SHA256SUMS"
CARD = "README.md"


def pack(plan: Plan, reports: Sequence[Report], workspace: Workspace) -> tuple[Path, ...]:
    """Write the records of each folder to publish; return the folders.

    A folder whose every artifact passed is complete with this. Files in it that no record names stay where they are
    and out of SHA256SUMS. Raises PublicationError when a file to publish holds a path of this machine.
    """
    folders = []
    places = {
        "the output folder": workspace.root,
        "the checkpoint's folder": plan.source.folder,
        "the working folder": Path.cwd(),
        "the home folder": Path.home(),
    }
    for repo in dict.fromkeys(output.repo for output in plan.outputs):
        folder = workspace.root / repo
        outputs = [output for output in plan.outputs if output.repo == repo]
        own = [report for report in reports if report.artifact.output in {output.id for output in outputs}]
        plots = draw(own, folder, repo, workspace)
        _pack_folder(plan, outputs, own, plots, folder, places)
        folders.append(folder)
    return tuple(folders)


def _pack_folder(
    plan: Plan,
    outputs: Sequence[OutputPlan],
    reports: Sequence[Report],
    plots: Sequence[str],
    folder: Path,
    places: Mapping[str, Path],
) -> None:
    drawn = [_file_record(folder, name) for name in plots]
    record = {
        "plan": published(plan) | {"outputs": [published(output) for output in outputs]},
        "reports": [published(report) | {"verdict": report.verdict()} for report in reports],
        "plots": [file.model_dump() for file in drawn],
    }
    texts = {
        CARD: write_card(plan, outputs, reports, plots),
        RECORD: json.dumps(record, indent=1, ensure_ascii=False) + "\n",
    }
    named = {
        file.name: file for report in reports for file in (*report.artifact.files, *report.artifact.shared)
    }
    refuse_leaks(folder, named, texts, places, plan.source.folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    named |= {file.name: file for file in (_file_record(folder, CARD), _file_record(folder, RECORD), *drawn)}
    lines = [f"{file.sha256}  {file.name}\n" for _, file in sorted(named.items())]
    write_text(folder / SUMS, "".join(lines))


def _file_record(folder: Path, name: str) -> FileRecord:
    return FileRecord(name=name, bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
