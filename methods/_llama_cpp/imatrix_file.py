"""Importance matrices in the GGUF layout of llama.cpp's tools/imatrix: ``<weight>.in_sum2`` and ``<weight>.counts``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError

DATASETS, CHUNKS = "imatrix.datasets", "imatrix.chunk_count"


@dataclass(frozen=True)
class Matrix:
    """What one file holds. ``entries``: weight name to sums of squares, [matrices, columns], and counts, [matrices, 1]."""

    label: str
    chunks: int
    entries: Mapping[str, tuple[Any, Any]]


def read_matrix(path: Path) -> Matrix:
    """Read an importance matrix; ConfigError when the file is none."""
    import numpy as np
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except ValueError as error:
        raise _no_matrix(path) from error
    tensors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in reader.tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    datasets, chunks = reader.get_field(DATASETS), reader.get_field(CHUNKS)
    if (
        datasets is None
        or chunks is None
        or not names
        or any(f"{name}.counts" not in tensors for name in names)
    ):
        raise _no_matrix(path)
    entries = {}
    for name in names:
        counts = tensors[f"{name}.counts"].reshape(-1, 1)
        entries[name] = (tensors[f"{name}.in_sum2"].reshape(len(counts), -1), counts)
    return Matrix(str(datasets.contents()[0]), int(chunks.contents()), entries)


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


def _no_matrix(path: Path) -> ConfigError:
    return ConfigError(f"{path} is not an importance matrix", hint="llama-imatrix writes them as GGUF")
