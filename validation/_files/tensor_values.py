"""The tensors of an artifact or a checkpoint with their bytes, whatever its format, and whether they hold one value only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from quantool.formats.gguf_header import read_header
from quantool.formats.gguf_keys import ADAPTER
from quantool.formats.safetensors import BITS, TensorHeader, check_index
from quantool.plugins.contract import Case

PIECE = 1 << 16
"""Bytes that are read at first at the beginning, in the middle and at the end of a tensor."""
CHUNK = 1 << 24
GLANCE = 1 << 12
"""Bytes of each part of a tensor that tell most that their values differ."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class HeldTensor:
    """Where a tensor lies; ``dtype`` as its format names it, in upper case, ``shape`` as numpy has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    bytes: int
    unit: int
    """Bytes of one element, or of one block of a quantized GGUF."""

    @property
    def is_float(self) -> bool:
        """Whether its elements are plain floats."""
        return self.dtype in FLOATS

    def part(self, number: int) -> HeldTensor:
        """What stands at ``number`` along the first axis, as a tensor of its own."""
        size = self.bytes // self.shape[0]
        return replace(self, shape=self.shape[1:], start=self.start + number * size, bytes=size)


def gguf_tensors(case: Case) -> dict[str, HeldTensor]:
    """The tensors of all shards of the case's GGUF and of its adapter, by name. Raises SourceError for a file that is damaged or missing."""
    planned = case.output.files if case.output is not None else ()
    shards = [case.artifact.parent / file.name for file in planned if file.name.endswith(".gguf")]
    shards = shards or [case.artifact]
    if name := read_header(shards[0]).value(ADAPTER):
        shards.append(shards[0].with_name(Path(str(name)).name))
    return {
        tensor.name: HeldTensor(
            tensor.name,
            tensor.type.upper(),
            tensor.shape,
            path,
            tensor.start,
            tensor.bytes,
            max(1, tensor.bytes * tensor.block // max(1, tensor.elements)),
        )
        for path in shards
        for tensor in read_header(path).tensors
    }


def safetensors_tensors(folder: Path) -> dict[str, HeldTensor]:
    """The tensors of a checkpoint, by name. Raises SourceError for one that is damaged or not whole."""
    return of_safetensors(folder, check_index(folder).values())


def of_safetensors(folder: Path, headers: Iterable[TensorHeader]) -> dict[str, HeldTensor]:
    """The same for known headers of files in ``folder``."""
    return {
        tensor.name: HeldTensor(
            tensor.name,
            tensor.dtype,
            tensor.shape,
            folder / tensor.file,
            tensor.start,
            tensor.bytes,
            max(1, BITS[tensor.dtype] // 8),
        )
        for tensor in headers
    }


def is_constant(tensor: HeldTensor) -> int | None:
    """0 where all elements (or blocks) are zero bytes, 1 where all are another same value, None where they differ.

    A tensor of one element or block has no other to differ from: None, but for zero.
    """
    import numpy as np

    count = tensor.bytes // tensor.unit
    if not count:
        return None
    data = np.memmap(tensor.path, np.uint8, "r", tensor.start, (count, tensor.unit))
    first = np.array(data[0])
    step = max(1, PIECE // tensor.unit)
    places = [0, max(0, count // 2 - step // 2), max(0, count - step)]
    if any((data[place : place + step] != first).any() for place in places):
        return None
    whole = max(1, CHUNK // tensor.unit)
    if any((data[place : place + whole] != first).any() for place in range(0, count, whole)):
        return None
    if not first.any():
        return 0
    return 1 if count > 1 else None


def constant_parts(tensor: HeldTensor) -> dict[int, int]:
    """Number along the first axis to the answer of ``is_constant``, of those parts that hold one value only."""
    import numpy as np

    count, units = tensor.shape[0], tensor.bytes // tensor.shape[0] // tensor.unit
    data = np.memmap(tensor.path, np.uint8, "r", tensor.start, (count, units, tensor.unit))
    glance = data[:, : max(1, GLANCE // tensor.unit)]
    suspects = np.flatnonzero((glance == glance[:, :1]).all(axis=(1, 2)))
    found = {int(number): is_constant(tensor.part(int(number))) for number in suspects}
    return {number: constant for number, constant in found.items() if constant is not None}
