"""Importance matrices in the GGUF layout of llama.cpp's tools/imatrix: ``<weight>.in_sum2`` and ``<weight>.counts``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError, SourceError
from quantool.formats.gguf_header import read_header

DATASETS, CHUNKS = "imatrix.datasets", "imatrix.chunk_count"
SUMS, COUNTS = ".in_sum2", ".counts"
EXPERTS = "_exps."
MADE_BY = "llama-imatrix writes them as GGUF"


@dataclass(frozen=True)
class ImportanceMatrix:
    """What one file holds. ``entries``: weight name to sums of squares, [matrices, columns], and counts, [matrices, 1]."""

    label: str
    chunks: int
    entries: Mapping[str, tuple[Any, Any]]


def read_matrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix; ConfigError when the file is none."""
    import numpy as np

    try:
        header = read_header(path)
        label, chunks = header.value(DATASETS), header.value(CHUNKS)
    except SourceError as error:
        raise ConfigError(f"{path} is not an importance matrix: {error.message}", hint=MADE_BY) from error
    tensors = {
        tensor.name: header.read_data(tensor).view(np.float32).reshape(tensor.shape)
        for tensor in header.tensors
        if tensor.type == "f32"
    }
    names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
    sound = isinstance(label, list) and label and isinstance(label[0], str) and isinstance(chunks, int)
    if not sound or not names or any(f"{name}{COUNTS}" not in tensors for name in names):
        raise ConfigError(f"{path} is not an importance matrix", hint=MADE_BY)
    entries = {}
    for name in names:
        counts, sums = tensors[f"{name}{COUNTS}"].reshape(-1, 1), tensors[f"{name}{SUMS}"]
        if sums.size % len(counts):
            raise ConfigError(f"{path}: {name} has {sums.size} sums for {len(counts)} counts", hint=MADE_BY)
        entries[name] = (np.array(sums.reshape(len(counts), -1)), np.array(counts))
    return ImportanceMatrix(label[0], chunks, entries)


def expert_tokens(matrix: ImportanceMatrix) -> dict[str, list[int]]:
    """Tokens that each expert saw, by layer (``blk.3``): its matrices are all counted alike."""
    found: dict[str, list[int]] = {}
    for name, (_, counts) in matrix.entries.items():
        if EXPERTS in name and len(counts) > 1:
            found.setdefault(name.partition(".ffn_")[0], [round(float(count)) for count in counts.ravel()])
    return found


def check_matrix(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ConfigError when a matrix was computed on another model than one with tensors of ``shapes`` (rows first).

    llama.cpp itself would quantize the tensors that such a file does not cover as if there were no matrix.
    """
    for name, (sums, _) in read_matrix(path).entries.items():
        shape = shapes.get(name)
        if shape is None or sums.size != math.prod(shape[:-2]) * shape[-1]:
            found = "has no such tensor" if shape is None else f"has {list(shape)}"
            raise ConfigError(
                f"imatrix: {path} is of another model: it has {sums.size} columns for {name}, this one {found}",
                hint="compute one on this model: imatrix: true with calibration text",
            )
