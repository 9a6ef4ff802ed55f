"""GGUF files over the shard limit, split into parts as llama-gguf-split does (0c1e570, tools/gguf-split/gguf-split.cpp).

The first part has all metadata, every part its tensors and the three ``split.`` keys. The limit counts tensor data only, as
upstream; a tensor that is larger gets a part of its own. What is written is byte for byte what upstream writes, without
a tensor in memory, and the whole file shrinks as its parts appear: beside it, one part is all that the disk must hold.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from quantool.errors import QuantizationError, SourceError
from quantool.formats.gguf_header import (
    FIRST,
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    GgufHeader,
    padded,
    read_header,
)
from quantool.runtime.worker import Report
from quantool.runtime.workspace import written

KEYS = ((SPLIT_NUMBER, 2, "<H"), (SPLIT_TENSORS, 5, "<i"), (SPLIT_COUNT, 2, "<H"))
"""Key, GGUF type and form of the value, in upstream's order (setting a key again moves it to the end)."""
CHUNK = 16 << 20


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


def split(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: split ``file`` into ``names`` in ``folder``, at ``limit`` bytes of tensors; the file is used up.

    Parts appear whole, the last first; after each one the file is cut. Called again after an interruption, it goes on.
    ``bytes`` is the size that the file had. Raises QuantizationError when the parts are not as many as the names.
    """
    whole, folder, names = Path(request["file"]), Path(request["folder"]), request["names"]
    header = _splittable(whole, request["bytes"])
    starts = [*(tensor.start for tensor in header.tensors), request["bytes"]]
    sizes = [end - start for start, end in pairwise(starts)]
    found = parts(sizes, request["limit"])
    if len(found) != len(names):
        raise QuantizationError(f"{whole.name} makes {len(found)} parts, {len(names)} were planned")
    total, done = sum(sizes), 0
    for number, held in reversed([*enumerate(found)]):
        start = starts[held.start]
        if whole.stat().st_size > start:
            _write(header, starts, folder / names[number], number, found)
            os.truncate(whole, start)
        done += sum(sizes[i] for i in held)
        report(done, total)
    whole.unlink()
    return {"parts": len(found)}


def _splittable(whole: Path, size: int) -> GgufHeader:
    """The header of the file, which had ``size`` bytes; QuantizationError for one that cannot be split."""
    try:
        header = read_header(whole, size)
    except SourceError as error:
        raise QuantizationError(error.message) from error
    if "general.alignment" in header.spans:
        raise QuantizationError(f"{whole} has an alignment of its own, which cannot be split")
    return header


def _write(
    header: GgufHeader, starts: Sequence[int], target: Path, number: int, found: Sequence[range]
) -> None:
    """Write part ``number``; ``starts`` is where each tensor's data begins in the whole file, and its end."""
    held = found[number]
    keys = (len(header.spans) if number == 0 else 0) + len(KEYS)
    values = {SPLIT_NUMBER: number, SPLIT_TENSORS: len(header.infos), SPLIT_COUNT: len(found)}
    start, end = starts[held.start], starts[held.stop]
    with written(target) as part, part.open("wb") as out, header.path.open("rb") as file:
        out.write(b"GGUF" + struct.pack("<IQQ", header.version, len(held), keys))
        if number == 0:
            out.write(header.raw)
        for key, kind, form in KEYS:
            out.write(struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind))
            out.write(struct.pack(form, values[key]))
        for i in held:
            out.write(header.infos[i] + struct.pack("<Q", starts[i] - start))
        out.write(bytes(padded(out.tell()) - out.tell()))
        _copy(file, out, start, end)


def _copy(source: BinaryIO, target: BinaryIO, start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        block = source.read(min(CHUNK, end - start))
        if not block:
            raise QuantizationError(f"{source.name} ends at byte {start}, tensors go on to {end}")
        target.write(block)
        start += len(block)
