"""Finished files of an output: brought into the folder to publish without touching what is not ours, hashed, recorded."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantool.config.sampling import GENERATION, generation_file
from quantool.errors import DependencyError, SourceError
from quantool.formats.safetensors import INDEX, check_index
from quantool.plugins.contract import Job
from quantool.records import Artifact, FileRecord, PlannedFile, Source, file_record
from quantool.runtime.workspace import PART, Workspace, written


@contextmanager
def checkpoint_folder(job: Job) -> Iterator[Path]:
    """An empty folder to write a checkpoint in; its files go to the job's folder when the block ends without an error.

    They go one by one, each whole, over files of the same name. What else lies in the job's folder stays, but for the
    files that an earlier record of the output names and, so that the weights are clear, weights that any record names.
    Raises DependencyError when the disk is full, SourceError when weights of nobody known lie there.
    """
    part = (
        job.workspace.work / f".{job.output.id.replace('/', '-')}{PART}"
    )  # outputs are made side by side on a cluster
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        names = relative_files(part)
        old = _outdated(job, {job.folder / name for name in names})
        # Recorded under a key that nothing has: what a killed run leaves here is known to be ours.
        job.workspace.keep(job.output.id, "", [*(job.folder / name for name in names), *old], {})
        for path in old:
            path.unlink(missing_ok=True)
        for name in names:
            move(part / name, job.folder / name)
        _refuse_strays(job.folder)
    except OSError as error:
        raise DependencyError(f"cannot write {job.folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _outdated(job: Job, fresh: set[Path]) -> list[Path]:
    """Files in the job's folder that records name and that the checkpoint to come would not overwrite."""
    return sorted(
        path
        for stage, paths in job.workspace.recorded().items()
        for path in paths
        if path.is_relative_to(job.folder)
        and path not in fresh
        and (stage == job.output.id or path.name.endswith((INDEX, ".safetensors")))
    )


def _refuse_strays(folder: Path) -> None:
    """SourceError when files that no record names make it unclear which are the weights."""
    try:
        check_index(folder)
    except SourceError as error:
        raise SourceError(
            f"{folder} holds weights that quantool did not write: {error.message}", hint=error.hint
        ) from error


def is_companion(name: str) -> bool:
    """Tokenizer, template, generation settings, license, code: what is published byte for byte."""
    return name != "config.json" and not name.endswith((".safetensors", INDEX, ".md"))


def companions(source: Source) -> list[PlannedFile]:
    """What ``copy_companions`` brings."""
    sizes = {file.name: file.bytes for file in source.files if is_companion(file.name)}
    if (own := generation_file(source)) is not None:
        sizes[GENERATION] = len(own)
    return [PlannedFile(name=name, bytes=size) for name, size in sizes.items()]


def copy_companions(source: Source, folder: Path) -> None:
    """Bring what a loader needs beside weights and config.json, and the sampling that the user recommends."""
    for file in source.files:
        if is_companion(file.name):
            target = folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / file.name, target)
    if (own := generation_file(source)) is not None:
        (folder / GENERATION).write_bytes(own)


def relative_files(folder: Path) -> list[str]:
    """Names of all files below ``folder``, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def move(source: Path, target: Path) -> None:
    """Rename a file, whole and synced; a copy where the folder to publish lies on another disk."""
    with written(target) as part:
        try:
            source.replace(part)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(source, part)


def finished(
    job: Job,
    key: str,
    names: Sequence[str],
    started: float,
    details: dict[str, Any],
    *,
    bits_per_weight: float | None = None,
    shared: tuple[FileRecord, ...] = (),
    made_from: str | None = None,
) -> Artifact:
    """The artifact of the files ``names`` in the job's folder, kept under ``key``.

    ``started`` is when the work began (``time.monotonic``), ``bits_per_weight`` by default that of the plan.
    """
    output = job.output
    bits = output.bits_per_weight or 0.0 if bits_per_weight is None else bits_per_weight
    artifact = Artifact(
        output=output.id,
        method=output.method,
        level=output.level,
        folder=job.folder,
        files=tuple(file_record(job.folder, name) for name in names),
        shared=shared,
        bits_per_weight=bits,
        seconds=time.monotonic() - started,
        details=details,
        versions=job.versions(),
        made_from=made_from,
    )
    paths = [job.folder / name for name in names]
    job.workspace.keep(output.id, key, paths, artifact.model_dump(mode="json"))
    return artifact


def need_disk(workspace: Workspace, wanted: int) -> None:
    """DependencyError when less than ``wanted`` bytes are free in the output folder."""
    free = shutil.disk_usage(workspace.root).free
    if free < wanted:
        raise DependencyError(
            f"{wanted / 1e9:.2f} GB are needed in {workspace.root}, {free / 1e9:.2f} GB are free"
        )
