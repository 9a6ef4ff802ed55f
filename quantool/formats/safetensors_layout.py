"""The layout of safetensors files, known before a byte of data is: https://huggingface.co/docs/safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantool.formats.safetensors import BITS, INDEX, TensorHeader, check_index

SLICE = 1 << 26

ORDER = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16",
    "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
"""The enum Dtype of safetensors' Rust library, whose files begin with the last of these; as 0.8.0 writes them (F6 by its place)."""


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


def as_stored(tensor: TensorHeader) -> Stored:
    """A tensor that is written as it was read."""
    return Stored(tensor.name, tensor.dtype, tensor.shape)


def encode(tensors: Iterable[Stored]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file (length and header) and the offset of each tensor in the file.

    As the safetensors library writes it: by dtype, then by name, the header padded with spaces to 8 bytes.
    """
    return encode_in_order(sorted(tensors, key=lambda tensor: (-ORDER.index(tensor.dtype), tensor.name)))


def encode_in_order(tensors: Iterable[Stored], length: int = 0) -> tuple[bytes, dict[str, int]]:
    """The same with the tensors in the order given; the header is padded to ``length`` bytes at least."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for tensor in tensors:
        starts[tensor.name] = position
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.bytes],
        }
        position += tensor.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(max(length, -(-len(text) // 8) * 8))
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def file_size(tensors: Sequence[Stored]) -> int:
    """Bytes of the file that ``encode`` begins."""
    return len(encode(tensors)[0]) + sum(tensor.bytes for tensor in tensors)


def index_bytes(shards: Mapping[str, Sequence[Stored]]) -> bytes:
    """``model.safetensors.index.json`` for shards of the given content."""
    weight_map = {tensor.name: shard for shard, stored in shards.items() for tensor in stored}
    total = sum(tensor.bytes for stored in shards.values() for tensor in stored)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def write_index(folder: Path, shards: Mapping[str, Sequence[Stored]]) -> None:
    """Write the index of ``shards``; a checkpoint of one file has none."""
    if len(shards) > 1:
        (folder / INDEX).write_bytes(index_bytes(shards))
    else:
        (folder / INDEX).unlink(missing_ok=True)


def by_shard(headers: Mapping[str, TensorHeader]) -> dict[str, list[TensorHeader]]:
    """The tensors of each file by offset."""
    shards: dict[str, list[TensorHeader]] = {}
    for tensor in sorted(headers.values(), key=lambda tensor: (tensor.file, tensor.start, tensor.end)):
        shards.setdefault(tensor.file, []).append(tensor)
    return shards


def write_skeleton(headers: Mapping[str, TensorHeader], folder: Path) -> None:
    """Write the files of ``headers`` without their data: sparse, of the true size, every value reads as zero.

    A converter can be rehearsed on them. More than one file gets an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for name, tensors in by_shard(headers).items():
        shards[name] = [as_stored(tensor) for tensor in tensors]
        head, _ = encode_in_order(shards[name], length=tensors[0].start - 8)
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(tensor.bytes for tensor in tensors))
    write_index(folder, shards)


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
            copy_tensors(folder, [found[tensor.name] for tensor in stored], folder / f"{shard}.arranged")
        for name in {tensor.file for tensor in found.values()}:
            (folder / name).unlink()
        for shard in shards:
            (folder / f"{shard}.arranged").rename(folder / shard)
    write_index(folder, shards)


def copy_tensors(source: Path, tensors: Sequence[TensorHeader], target: Path) -> None:
    """Write ``tensors`` of the checkpoint in the folder ``source``, byte for byte, to the new file ``target``."""
    head, starts = encode(map(as_stored, tensors))
    with target.open("wb") as writing:
        writing.write(head)
        for tensor in sorted(tensors, key=lambda tensor: starts[tensor.name]):
            with (source / tensor.file).open("rb") as reading:
                reading.seek(tensor.start)
                left = tensor.bytes
                while left:
                    left -= writing.write(reading.read(min(left, SLICE)))
