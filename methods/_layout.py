"""The layout of safetensors files, known before a byte of data is: https://huggingface.co/docs/safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantool.weights import BITS

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


def index_bytes(shards: Mapping[str, list[Stored]]) -> bytes:
    """``model.safetensors.index.json`` for shards of the given content."""
    weight_map = {tensor.name: shard for shard, stored in shards.items() for tensor in stored}
    total = sum(tensor.bytes for stored in shards.values() for tensor in stored)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
