"""The header of a GGUF file: keys, tensors and where their data lies, read within bounds and checked.

Format: docs/gguf.md of ggml, versions 2 and 3. What is refused is what ``gguf_init_from_file`` (ggml/src/gguf.cpp of llama.cpp
0c1e570) refuses: arrays in arrays, more than four dimensions, data that is not one tensor after another. A header is at
most ``MOST_BYTES`` long, so that a count of 2^64 in a file of 100 bytes, or of 40 GB, costs neither time nor memory.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quantool.errors import DependencyError, SourceError
from quantool.runtime.toolchain import GgmlType, ggml_types, prefer_own_gguf

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALIGNMENT = 32  # gguf.h: GGUF_DEFAULT_ALIGNMENT
MAX_DIMENSIONS = 4  # ggml.h: GGML_MAX_DIMS
MAX_NAME = 63  # ggml.h: GGML_MAX_NAME, without the final zero
MOST_BYTES = 1 << 28
"""Longest header that is read; that of a vocabulary of a million tokens takes a fifth of it."""
MOST_STRINGS = 1 << 23
"""Strings of one array."""
MOST_ENTRIES = 1 << 17
"""Keys, and tensors, of one file."""
FIRST = 4 + 4 + 8 + 8
"""Bytes of magic, version, number of tensors, number of keys."""
CHUNK = 1 << 20
LENGTH = struct.Struct("<Q")
"""Of a string, before its bytes."""
SHOWN = 60
"""Characters of a name in messages."""

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""``enum gguf_type`` to the form of ``struct``."""
STRING, ARRAY = 8, 9
UINT32 = (4).to_bytes(4, "little")
SHARD = re.compile(
    r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf$"
)  # src/llama.cpp: llama_split_path
SIDECARS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""What the name of a GGUF holds that is no model by itself (llama.cpp 0c1e570, common/download.cpp)."""
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. ``shape`` is numpy's (rows before columns); ``start`` and ``end`` are byte offsets in the file."""

    name: str
    type: str
    """As ggml names it, in lower case (``q4_k``)."""
    number: int
    """In ``enum ggml_type``."""
    shape: tuple[int, ...]
    block: int
    """Weights that share scales; 1 for floats."""
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Bytes of the data, padding not counted."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the data of one file."""

    path: Path
    version: int
    spans: Mapping[str, tuple[int, int]]
    """Key to where its type and value begin and end in ``raw``."""
    tensors: tuple[GgufTensor, ...]
    """In file order."""
    infos: tuple[bytes, ...]
    """The tensors' entries as they stand in the file, without the offset, which is their last 8 bytes."""
    data: int
    """Where the data begins: the header's length, padded."""
    raw: bytes
    """From the first key to the last, as it stands in the file."""

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key: a scalar, a text or a list of them. Raises SourceError for text that is not UTF-8."""
        if key not in self.spans:
            return default
        start, end = self.spans[key]
        return _decode(self.raw[start:end], self.path, key)

    def keys(self, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """All keys with their values, but those that begin like one of ``without``."""
        return {key: self.value(key) for key in self.spans if not key.startswith(without)}

    def read_data(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """The bytes of a tensor, mapped from the file."""
        import numpy as np

        return np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.bytes,))


class _Cursor:
    """Reads forward, never beyond the file or ``MOST_BYTES``, whatever a file says of its own sizes."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path = file, path
        self.raw = bytearray()
        self.at = 0
        self.limit = min(size, MOST_BYTES)

    def skip(self, count: int) -> int:
        """Go ``count`` bytes on; returns where they began."""
        start, end = self.at, self.at + count
        if end > self.limit:
            raise _damaged(
                self.path, f"its header wants {count} bytes at {start}, the file has {self.limit - start}"
            )
        while len(self.raw) < end:
            block = self.file.read(max(CHUNK, end - len(self.raw)))
            if not block:
                raise _damaged(self.path, f"it ends at byte {len(self.raw)}, in the middle of its header")
            self.raw += block
        self.at = end
        return start

    def number(self, form: str) -> int:
        """One little-endian integer."""
        value: int = struct.unpack_from(f"<{form}", self.raw, self.skip(struct.calcsize(form)))[0]
        return value

    def text(self, what: str) -> str:
        """A string; ``what`` stands in messages."""
        start = self.skip(self.number("Q"))
        return _utf8(bytes(self.raw[start : self.at]), self.path, what)

    def skip_value(self, kind: int, key: str) -> None:
        """Pass over a value of the GGUF type ``kind``."""
        if kind in SCALARS:
            self.skip(struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in SCALARS:
                self.skip(struct.calcsize(SCALARS[inner]) * count)
            elif inner == STRING and count <= MOST_STRINGS:
                self._skip_strings(count)
            elif inner == STRING:
                raise _damaged(self.path, f"{key} is said to have {count} strings, more than {MOST_STRINGS}")
            else:
                what = "arrays" if inner == ARRAY else f"values of the unknown type {inner}"
                raise _damaged(self.path, f"{key} is an array of {what}, which llama.cpp does not read")
        else:
            raise _damaged(self.path, f"{key} has the unknown type {kind}")

    def _skip_strings(self, count: int) -> None:
        """Pass over the strings of an array: of a vocabulary, a quarter of a million and their merges."""
        for _ in range(count):
            start = self.at + LENGTH.size
            end = start + LENGTH.unpack_from(self.raw, self.at)[0] if start <= len(self.raw) else start
            if start < end <= min(len(self.raw), self.limit):
                self.at = end
            else:  # more has to be read, or must not be
                self.skip(self.number("Q"))


def read_header(path: Path, size: int | None = None) -> GgufHeader:
    """The header of one GGUF file; no tensor data is read.

    ``size`` is the file's size where it was cut since (splitting uses a file up). Raises SourceError for a file that is
    no GGUF, and for one that is damaged or that llama.cpp would not load for what its header says.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size if size is None else size
            return _read(_Cursor(file, path, size), size)
    except OSError as error:
        raise SourceError(f"cannot read {path.name}: {error.strerror}") from error


def _read(cursor: _Cursor, size: int) -> GgufHeader:
    path = cursor.path
    if size < FIRST or cursor.raw[cursor.skip(4) : 4] != b"GGUF":
        raise SourceError(f"{path.name} is not a GGUF file")
    version, tensors, keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        what = "is for big-endian machines" if not version & 0xFFFF else f"is of GGUF version {version}"
        raise SourceError(f"{path.name} {what}; versions 2 and 3 are read")
    if max(tensors, keys) > MOST_ENTRIES:
        raise _damaged(
            path, f"{tensors} tensors and {keys} keys are said to be there; at most {MOST_ENTRIES} are read"
        )
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(keys):
        key = cursor.text("the name of a key")
        start = cursor.at
        cursor.skip_value(cursor.number("I"), repr(key[:SHOWN]))
        if not key or key in spans:
            raise _damaged(path, f"the key {key[:SHOWN]!r} occurs twice" if key else "a key has no name")
        spans[key] = (start - FIRST, cursor.at - FIRST)
    raw = bytes(cursor.raw[FIRST : cursor.at])
    entries, infos = [], []
    for _ in range(tensors):
        start = cursor.at
        entries.append(_entry(cursor))
        infos.append(bytes(cursor.raw[start : cursor.at - 8]))
    alignment = _alignment(path, raw, spans)
    data = padded(cursor.at, alignment)
    return GgufHeader(
        path, version, spans, _placed(path, entries, data, size, alignment), tuple(infos), data, raw
    )


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    name = cursor.text("the name of a tensor")
    dimensions = cursor.number("I")
    if not name or len(name.encode()) > MAX_NAME:
        raise _damaged(
            cursor.path, f"a tensor's name has {len(name.encode())} bytes, 1 to {MAX_NAME} are allowed"
        )
    if dimensions > MAX_DIMENSIONS:
        raise _damaged(cursor.path, f"{name!r} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))
    if 0 in shape:
        raise _damaged(cursor.path, f"{name!r} has a dimension of 0: {list(shape)}")
    return name, shape[::-1], cursor.number("I"), cursor.number("Q")


def _alignment(path: Path, raw: bytes, spans: Mapping[str, tuple[int, int]]) -> int:
    if "general.alignment" not in spans:
        return ALIGNMENT
    start, _ = spans["general.alignment"]
    alignment = struct.unpack_from("<I", raw, start + 4)[0] if raw[start : start + 4] == UINT32 else 0
    if alignment < 1 or alignment & (alignment - 1):
        raise _damaged(path, "general.alignment is not a power of two in an unsigned integer")
    return int(alignment)


def _placed(
    path: Path, entries: Sequence[tuple[str, tuple[int, ...], int, int]], data: int, size: int, alignment: int
) -> tuple[GgufTensor, ...]:
    """The tensors with the places of their data, which must follow each other and end with the file at the latest."""
    kinds = _types_by_number()
    expected = 0
    found: dict[str, GgufTensor] = {}
    for name, shape, number, offset in entries:
        if number not in kinds:
            raise _damaged(path, f"{name!r} has the type {number}, which this llama.cpp does not know")
        label, kind = kinds[number]
        if name in found:
            raise _damaged(path, f"the tensor {name!r} occurs twice")
        row = shape[-1] if shape else 1
        if row % kind.block:
            raise _damaged(path, f"{name!r} has rows of {row} weights, no multiple of {label}'s {kind.block}")
        if offset != expected:
            raise _damaged(path, f"the data of {name!r} begins at {offset}, expected {expected}")
        length = math.prod(shape) // kind.block * kind.size
        if data + offset + length > size:
            raise _damaged(path, f"{name!r} ends at byte {data + offset + length}, the file at {size}")
        found[name] = GgufTensor(
            name, label, number, shape, kind.block, data + offset, data + offset + length
        )
        expected = padded(offset + length, alignment)
    return tuple(found.values())


def _types_by_number() -> dict[int, tuple[str, GgmlType]]:
    try:
        kinds = ggml_types()
    except DependencyError:  # no toolchain: the package index's list, which lacks the newest types
        prefer_own_gguf()
        from gguf.constants import GGML_QUANT_SIZES

        kinds = {kind.name.lower(): GgmlType(int(kind), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    return {kind.number: (name, kind) for name, kind in kinds.items()}


def _decode(raw: bytes, path: Path, key: str) -> Any:
    """A key's type and value to Python's."""
    (kind,) = struct.unpack_from("<I", raw)
    if kind in SCALARS:
        return struct.unpack_from(f"<{SCALARS[kind]}", raw, 4)[0]
    if kind == STRING:
        return _utf8(raw[12:], path, key)
    inner, count = struct.unpack_from("<IQ", raw, 4)
    if inner in SCALARS:
        return list(struct.unpack_from(f"<{count}{SCALARS[inner]}", raw, 16))
    values, at = [], 16
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, at)
        values.append(_utf8(raw[at + 8 : at + 8 + length], path, key))
        at += 8 + length
    return values


def _utf8(raw: bytes, path: Path, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, f"{what} is not UTF-8") from error


def _damaged(path: Path, reason: str) -> SourceError:
    return SourceError(f"{path.name} is damaged or cut off: {reason}", hint="fetch or make the file again")


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """``size`` rounded up to the alignment."""
    return -(-size // alignment) * alignment


def shard_names(name: str, count: int) -> list[str]:
    """File names of ``count`` shards of ``name`` (which ends in .gguf), as llama.cpp splits them; of one, ``name``."""
    if count == 1:
        return [name]
    stem = name.removesuffix(".gguf")
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def present_shards(first: Path) -> list[Path]:
    """The files of the GGUF whose first (or only) file is ``first``, as far as they are there."""
    stem, _, total = first.stem.rpartition("-00001-of-")
    return sorted(first.parent.glob(f"{stem}-?????-of-{total}.gguf" if stem else first.name))


def read_shards(first: Path) -> list[GgufHeader]:
    """The headers of the GGUF whose first (or only) file is ``first``, shard by shard.

    Raises SourceError for what ``read_header`` refuses, for a file that is not the first shard, for shards that are not
    all there, and for shards that do not belong together by their ``split.`` keys or by a tensor that two of them hold.
    """
    names = _shard_files(first)
    headers = [read_header(first.with_name(name)) for name in names]
    if len(headers) > 1:
        _check_split(headers)
    return headers


def _shard_files(first: Path) -> list[str]:
    shard = SHARD.match(first.name)
    if shard is None:
        return [first.name]
    number, names = int(shard["number"]), shard_names(f"{shard['stem']}.gguf", int(shard["total"]))
    if not 1 <= number <= len(names):
        raise SourceError(f"{first.name}: no file is number {number} of {len(names)}", hint="was it renamed?")
    if number != 1:
        raise SourceError(f"{first.name} is not the first shard", hint=f"give {names[0]}")
    if missing := [name for name in names if not first.with_name(name).is_file()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise SourceError(f"beside {first.name} there is no {', '.join(missing[:3])}{more}")
    return names


def _check_split(headers: Sequence[GgufHeader]) -> None:
    """SourceError unless each shard says that it is what its name says."""
    for number, header in enumerate(headers):
        recorded, count = header.value(SPLIT_NUMBER), header.value(SPLIT_COUNT)
        if (recorded, count) != (number, len(headers)):
            raise SourceError(
                f"{header.path.name} is number {number + 1} of {len(headers)} by its name, but its {SPLIT_NUMBER} is "
                f"{str(recorded)[:20]} (from 0) and its {SPLIT_COUNT} {str(count)[:20]}",
                hint="shards of several models may have been mixed; fetch them again",
            )
    holders: dict[str, Path] = {}
    for header in headers:
        for tensor in header.tensors:
            if (other := holders.setdefault(tensor.name, header.path)) != header.path:
                raise SourceError(f"{other.name} and {header.path.name} both hold the tensor {tensor.name!r}")
    if (promised := headers[0].value(SPLIT_TENSORS)) != len(holders):
        raise SourceError(
            f"{headers[0].path.name}: {len(holders)} tensors in all shards, {SPLIT_TENSORS} is {promised}"
        )
