"""GGUF files over the shard limit, split into parts as llama-gguf-split does (tools/gguf-split/gguf-split.cpp).

The first part has all metadata, every part its tensors and the three ``split.`` keys. The limit counts tensor data only, as
upstream; a tensor that is larger gets a part of its own. What is written is byte for byte what upstream writes, without
a tensor in memory, and the whole file shrinks as its parts appear: beside it, one part is all that the disk must hold.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from quantool.errors import QuantizationError
from quantool.runtime.worker import Report
from quantool.runtime.workspace import written

ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
KEYS = (("split.no", 2, "<H"), ("split.tensors.count", 5, "<i"), ("split.count", 2, "<H"))
"""Key, GGUF type and form of the value, in upstream's order (setting a key again moves it to the end)."""
FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of ggml's gguf_type
STRING, ARRAY = 8, 9
FIRST = 4 + 4 + 8 + 8  # magic, version, number of tensors, number of keys
CHUNK = 16 << 20


def padded(size: int) -> int:
    """``size`` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def parts(sizes: Sequence[int], limit: int) -> list[range]:
    """Tensors of each part, given the padded bytes of all in file order; a limit of 0 is none."""
    found, start, filled = [], 0, 0
    for number, size in enumerate(sizes):
        if limit and number > start and filled + size > limit:
            found.append(range(start, number))
            start, filled = number, 0
        filled += size
    return [*found, range(start, len(sizes))]


def split_keys_bytes() -> int:
    """Bytes that the three keys take in a header."""
    return sum(8 + len(key) + 4 + struct.calcsize(form) for key, _, form in KEYS)


def info_bytes(name: str, dimensions: int) -> int:
    """Bytes of a tensor's entry in a header: name, dimensions, type, offset."""
    return 8 + len(name.encode()) + 4 + 8 * dimensions + 4 + 8


def part_bytes(header: int, infos: Sequence[int], sizes: Sequence[int], limit: int) -> list[int]:
    """Exact size of each part of a file with a header of ``header`` bytes (no padding); of one, the file's own."""
    found = parts(sizes, limit)
    if len(found) == 1:
        return [padded(header) + sum(sizes)]
    total = []
    for number, held in enumerate(found):
        own = split_keys_bytes() + sum(infos[i] for i in held)
        own += FIRST if number else header - sum(infos)
        total.append(padded(own) + sum(sizes[i] for i in held))
    return total


@dataclass(frozen=True)
class _Header:
    """The header of a whole file, as bytes to be written again."""

    version: int
    keys: int
    metadata: bytes
    infos: tuple[bytes, ...]
    """Entries without the offset, which is the last 8 bytes."""
    offsets: tuple[int, ...]
    """Of each tensor's data from the beginning of the file; the end of the last one at the end."""


def split(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: split ``file`` into ``names`` in ``folder``, at ``limit`` bytes of tensors; the file is used up.

    Parts appear whole, the last first; after each one the file is cut. Called again after an interruption, it goes on.
    ``bytes`` is the size that the file had. Raises QuantizationError when the parts are not as many as the names.
    """
    whole, folder, names = Path(request["file"]), Path(request["folder"]), request["names"]
    with whole.open("rb") as file:
        header = _read(file, request["bytes"])
    sizes = [end - start for start, end in zip(header.offsets, header.offsets[1:], strict=False)]
    found = parts(sizes, request["limit"])
    if len(found) != len(names):
        raise QuantizationError(f"{whole.name} makes {len(found)} parts, {len(names)} were planned")
    total, done = sum(sizes), 0
    for number, held in reversed([*enumerate(found)]):
        start = header.offsets[held.start]
        if whole.stat().st_size > start:
            _write(whole, header, folder / names[number], number, found)
            os.truncate(whole, start)
        done += sum(sizes[i] for i in held)
        report(done, total)
    whole.unlink()
    return {"parts": len(found)}


def _write(whole: Path, header: _Header, target: Path, number: int, found: Sequence[range]) -> None:
    held = found[number]
    keys = (header.keys if number == 0 else 0) + len(KEYS)
    values = {"split.no": number, "split.tensors.count": len(header.infos), "split.count": len(found)}
    start, end = header.offsets[held.start], header.offsets[held.stop]
    with written(target) as part, part.open("wb") as made, whole.open("rb") as file:
        made.write(b"GGUF" + struct.pack("<IQQ", header.version, len(held), keys))
        if number == 0:
            made.write(header.metadata)
        for key, kind, form in KEYS:
            made.write(struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind))
            made.write(struct.pack(form, values[key]))
        for i in held:
            made.write(header.infos[i] + struct.pack("<Q", header.offsets[i] - start))
        made.write(bytes(padded(made.tell()) - made.tell()))
        _copy(file, made, start, end)


def _copy(source: BinaryIO, target: BinaryIO, start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        block = source.read(min(CHUNK, end - start))
        if not block:
            raise QuantizationError(f"{source.name} ends at byte {start}, tensors go on to {end}")
        target.write(block)
        start += len(block)


def _read(file: BinaryIO, size: int) -> _Header:
    """The header of a file that had ``size`` bytes."""
    magic, version, tensors, keys = struct.unpack("<4sIQQ", file.read(FIRST))
    if magic != b"GGUF" or version < 2:
        raise QuantizationError(f"{file.name} is no GGUF file of version 2 or 3")
    named = [_skip_key(file) for _ in range(keys)]
    end = file.tell()
    file.seek(FIRST)
    metadata = file.read(end - FIRST)
    if b"general.alignment" in named:
        raise QuantizationError(f"{file.name} has an alignment of its own, which cannot be split")
    infos, offsets = [], []
    for _ in range(tensors):
        begun = file.tell()
        _skip_string(file)
        (dimensions,) = struct.unpack("<I", file.read(4))
        file.seek(8 * dimensions + 4, os.SEEK_CUR)
        length = file.tell() - begun
        file.seek(begun)
        infos.append(file.read(length))
        offsets.append(struct.unpack("<Q", file.read(8))[0])
    data = padded(file.tell())
    return _Header(version, keys, metadata, tuple(infos), (*(data + offset for offset in offsets), size))


def _skip_key(file: BinaryIO) -> bytes:
    """Its name."""
    (length,) = struct.unpack("<Q", file.read(8))
    name = file.read(length)
    (kind,) = struct.unpack("<I", file.read(4))
    _skip_value(file, kind)
    return name


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind in FIXED:
        file.seek(FIXED[kind], os.SEEK_CUR)
    elif kind == STRING:
        _skip_string(file)
    elif kind == ARRAY:
        inner, count = struct.unpack("<IQ", file.read(12))
        if inner in FIXED:
            file.seek(FIXED[inner] * count, os.SEEK_CUR)
        else:
            for _ in range(count):
                _skip_value(file, inner)
    else:
        raise QuantizationError(f"{file.name} has a key of the unknown type {kind}")


def _skip_string(file: BinaryIO) -> None:
    (length,) = struct.unpack("<Q", file.read(8))
    file.seek(length, os.SEEK_CUR)
