"""By what kept results know an artifact again: its files by their hashes, or by name, size and time where nobody hashed them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantool.formats.gguf_header import present_shards
from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends, own_files

ANSWERS = Depends(fields=("device",), engine=True)
"""Whatever an engine computes of an artifact."""
REFERENCE_ANSWERS = Depends(fields=("device",), libraries=("torch", "transformers", "tokenizers"))
"""Whatever transformers computes of the source."""

Stamp = list[tuple[str, int, int]]


def artifact_key(case: Case, depends: Depends, *parts: Any) -> str:
    """The key of a result about the case's artifact, in its engine."""
    return case.key(depends, own_files(case.files) or stamp(case.artifact), *parts)


def stamp(artifact: Path) -> Stamp:
    """Name below the artifact's folder, bytes and modification time (ns) of every file; of a split GGUF every shard.

    The folder's own place is no part of it, so that an output folder that was moved keeps its results.
    """
    top = artifact if artifact.is_dir() else artifact.parent
    files = artifact.rglob("*") if artifact.is_dir() else present_shards(artifact)
    return sorted(
        (str(file.relative_to(top)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    )
