"""GGUF files put together byte by byte, sound or not, for the tests of what reads them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

Info = tuple[str, Sequence[int], int, int]
"""Name, dimensions (ggml's order: columns first), type and offset of a tensor."""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def u16(value: int) -> bytes:
    return struct.pack("<IH", 2, value)


def i32(value: int) -> bytes:
    return struct.pack("<Ii", 5, value)


def string(value: str) -> bytes:
    return struct.pack("<I", 8) + text(value)


def array(inner: int, count: int, content: bytes = b"") -> bytes:
    """An array that says it has ``count`` elements of the type ``inner``."""
    return struct.pack("<IIQ", 9, inner, count) + content


def gguf(
    keys: Mapping[str, bytes] | Sequence[tuple[str, bytes]] = (),
    infos: Sequence[Info] = (("a", (32,), 0, 0),),
    data: int = 128,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file with ``data`` bytes of zeros behind its header; ``counts`` are the tensors and keys that it says it has."""
    pairs = list(keys.items()) if isinstance(keys, Mapping) else list(keys)
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(infos), len(pairs))))
    head += b"".join(text(key) + value for key, value in pairs)
    for name, dimensions, kind, offset in infos:
        head += text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += struct.pack("<IQ", kind, offset)
    return head + bytes(-len(head) % 32) + bytes(data)


def write_shards(folder: Path, stem: str, names: Sequence[Sequence[str]]) -> list[Path]:
    """Shards as llama-gguf-split leaves them, with one float32 row of 32 a tensor."""
    total = sum(map(len, names))
    paths = []
    for number, held in enumerate(names):
        keys = {"split.no": u16(number), "split.tensors.count": i32(total), "split.count": u16(len(names))}
        path = folder / f"{stem}-{number + 1:05d}-of-{len(names):05d}.gguf"
        infos = [(name, (32,), 0, 128 * at) for at, name in enumerate(held)]
        path.write_bytes(gguf(keys, infos, 128 * len(held)))
        paths.append(path)
    return paths
