"""By what kept results know an artifact and its engine again: files by name, size and time, libraries by version."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quantool import __version__
from quantool.runtime.arithmetic import native

Stamp = list[tuple[str, int, int]]


def stamp(artifact: Path) -> Stamp:
    """Name below the artifact's folder, bytes and modification time (ns) of every file; of a split GGUF every shard.

    The folder's own place is no part of it, so that an output folder that was moved keeps its results.
    """
    top = artifact if artifact.is_dir() else artifact.parent
    stem, _, total = artifact.stem.rpartition("-00001-of-")
    pattern = f"{stem}-?????-of-{total}.gguf" if stem else artifact.name
    files = artifact.rglob("*") if artifact.is_dir() else top.glob(pattern)
    return sorted(
        (str(file.relative_to(top)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    )


def versions(libraries: Iterable[str]) -> list[str]:
    """Quantool's version, those of ``libraries``, and torch's arithmetic here where it computes.

    Empty for a library that is missing, which opening the engine reports.
    """
    libraries = tuple(libraries)
    found = [__version__, *(native() if {"torch", "transformers"} & set(libraries) else ())]
    for library in libraries:
        try:
            found.append(version(library))
        except PackageNotFoundError:
            found.append("")
    return found
