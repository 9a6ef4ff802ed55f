"""The files of one GGUF level: one file, the shards of a split base, or one file split afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantool.errors import QuantizationError
from quantool.methods._llama_cpp import base_file, quantize, split
from quantool.plugins.contract import Job
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import link_file, write_text, written

WHOLE = "whole.gguf"


def write_level(
    job: Job, request: dict[str, Any], key: str, limit: int, log: Path, progress: Progress
) -> dict[str, Any]:
    """Run the quantizer on ``request`` until the output's files lie in the job's folder; what it warned of.

    ``key`` is the fingerprint of the level: what an interrupted run left under it is gone on with. Files of several
    parts are split at ``limit`` bytes of tensors unless the quantizer itself keeps the base's shards.
    """
    names = [file.name for file in job.output.files]
    kept = request["settings"]["keep_split"] and len(names) > 1
    request = {**request, "settings": request["settings"] | {"keep_split": kept}}
    if kept:
        return _keep_split(job, request, names, log, progress)
    if len(names) > 1:
        folder = job.workspace.work / f"split-{job.output.level}-{key[:32]}"
        return _split(job, request, names, folder, limit, log, progress)
    with written(job.folder / names[0]) as part:
        remarks = _quantize(job, request | {"output": str(part)}, log, progress)
        base_file.require_loadable(part, log)
    return remarks


def temporary(sizes: Sequence[int], *, keep_split: bool) -> int:
    """Bytes that a level of these parts needs on disk beside them while it is made."""
    return 0 if keep_split or len(sizes) == 1 else max(sizes)


def _quantize(job: Job, request: dict[str, Any], log: Path, progress: Progress) -> dict[str, Any]:
    with progress.bar(f"quantize {job.output.level}", "tensors") as bar:
        return process.call(quantize.quantize, request, log=log, bar=bar)


def _keep_split(
    job: Job, request: dict[str, Any], names: Sequence[str], log: Path, progress: Progress
) -> dict[str, Any]:
    """llama.cpp names the shards itself, from a prefix."""
    folder = job.workspace.work / f"shards-{job.output.level}"
    with written(folder) as part:
        part.mkdir()
        prefix = part / names[0].rpartition("-00001-of-")[0]
        remarks = _quantize(job, request | {"output": str(prefix)}, log, progress)
        base_file.require_loadable(part / names[0], log)
    _deliver(job, folder, names)
    return remarks


def _split(
    job: Job,
    request: dict[str, Any],
    names: Sequence[str],
    folder: Path,
    limit: int,
    log: Path,
    progress: Progress,
) -> dict[str, Any]:
    """One file, split when it is whole; the folder tells an interrupted run how far it came."""
    for other in folder.parent.glob(f"split-{job.output.level}-*"):
        if other != folder:
            shutil.rmtree(other)
    whole, record = folder / WHOLE, folder / "remarks.json"
    if not whole.is_file() and not all((folder / name).is_file() for name in names):
        shutil.rmtree(folder, ignore_errors=True)
        with written(whole) as part:
            remarks = _quantize(job, request | {"output": str(part)}, log, progress)
            write_text(record, json.dumps(remarks | {"bytes": part.stat().st_size}))
    remarks = json.loads(record.read_text(encoding="utf-8"))
    size = remarks.pop("bytes")
    if whole.is_file():
        parts = {
            "file": str(whole),
            "folder": str(folder),
            "names": list(names),
            "limit": limit,
            "bytes": size,
        }
        with progress.bar(f"split {job.output.level}", "B") as bar:
            process.call(split.split, parts, log=log, bar=bar)
    try:
        base_file.require_loadable(folder / names[0], log)
    except QuantizationError:
        shutil.rmtree(folder)  # nothing to go on with
        raise
    _deliver(job, folder, names)
    shutil.rmtree(folder)
    return dict(remarks)


def _deliver(job: Job, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        link_file(folder / name, job.folder / name)
    for name in names:
        (folder / name).unlink()
