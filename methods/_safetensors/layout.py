"""The layout of safetensors files, known before a byte of data is: https://huggingface.co/docs/safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantool.formats.safetensors import BITS, INDEX, TensorHeader, check_index

SLICE = 1 << 26

# The order of the enum Dtype of safetensors' Rust library, which files are laid out by, largest first.
_RANK = {
    name: rank
    for rank, name in enumerate(
        (
            "BOOL",
            "U8",
            "I8",
            "F8_E5M2",
            "F8_E4M3",
            "I16",
            "U16",
            "F16",
            "BF16",
            "I32",
            "U32",
            "F32",
            "F64",
            "I64",
            "U64",
        )
    )
}


@dataclass(frozen=True)
class Stored:
    """A tensor as it is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def encode(tensors: Iterable[Stored]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file (length and header) and the offset of each tensor in the file.

    As the safetensors library writes it: by dtype, then by name, the header padded with spaces to 8 bytes.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_RANK[tensor.dtype], tensor.name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for tensor in ordered:
        starts[tensor.name] = position
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.bytes],
        }
        position += tensor.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, {
        name: 8 + len(text) + start for name, start in starts.items()
    }


def file_size(tensors: Sequence[Stored]) -> int:
    """Bytes of a safetensors file that holds ``tensors``."""
    return len(encode(tensors)[0]) + sum(tensor.bytes for tensor in tensors)


def index_bytes(shards: Mapping[str, Sequence[Stored]]) -> bytes:
    """``model.safetensors.index.json`` for shards of the given content."""
    weight_map = {tensor.name: shard for shard, stored in shards.items() for tensor in stored}
    total = sum(tensor.bytes for stored in shards.values() for tensor in stored)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def arrange(folder: Path, shards: Mapping[str, Sequence[Stored]]) -> None:
    """Bring the tensors of the checkpoint in ``folder`` into ``shards``, byte for byte, with their index.

    Libraries cut a checkpoint where they like; this makes it what was planned. A checkpoint with other tensors than
    ``shards`` is left as it is. Takes the size of the checkpoint once more while it works.
    """
    found = check_index(folder)
    wanted = {tensor.name: shard for shard, stored in shards.items() for tensor in stored}
    if found.keys() != wanted.keys():
        return
    if {name: tensor.file for name, tensor in found.items()} != wanted:
        for shard, stored in shards.items():
            _gather(folder, f"{shard}.arranged", [found[tensor.name] for tensor in stored])
        for name in {tensor.file for tensor in found.values()}:
            (folder / name).unlink()
        for shard in shards:
            (folder / f"{shard}.arranged").rename(folder / shard)
    if len(shards) > 1:
        (folder / INDEX).write_bytes(index_bytes(shards))
    else:
        (folder / INDEX).unlink(missing_ok=True)


def _gather(folder: Path, name: str, tensors: Sequence[TensorHeader]) -> None:
    head, starts = encode([Stored(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
    with (folder / name).open("wb") as writing:
        writing.write(head)
        for tensor in sorted(tensors, key=lambda tensor: starts[tensor.name]):
            with (folder / tensor.file).open("rb") as reading:
                reading.seek(tensor.start)
                left = tensor.bytes
                while left:
                    left -= writing.write(reading.read(min(left, SLICE)))
