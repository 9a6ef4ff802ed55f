"""Safetensors files: their headers, the index that names them, and copies without data.

Format: 8 bytes little-endian length, a JSON header of that length, then the data of all tensors without holes
(the README of the safetensors library). Only safetensors are read; pickles can run code and are refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.json_file import TENSORS, JsonError, brief, parse_json, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_RANK, MAX_SIZE = 64, 1 << 63
"""Dimensions that a tensor has at most, and elements of one."""
REMOTE_REQUESTS = 8

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of one element, by the dtype names of safetensors."""


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies. ``start`` and ``end`` are byte offsets in the file ``file`` (a name, not a path)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Bytes of the data."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)


def read_headers(files: Sequence[Path]) -> dict[str, TensorHeader]:
    """The tensors of all ``files``, in file order, then by offset. No data is read.

    Raises SourceError for a header that is not sane, offsets with holes, a byte count other than shape and dtype
    say, a file shorter or longer than its header says, and a tensor that two files hold.
    """
    return _join(tensor for file in files for tensor in read_header(file))


def read_header(file: Path) -> list[TensorHeader]:
    """The tensors of one file by offset; see ``read_headers`` for the errors."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if head.startswith(b"version "):
                raise SourceError(
                    f"{file} is a Git LFS pointer, not the weights",
                    hint="fetch the file itself: git lfs pull",
                )
            if size < 8 or not 2 <= length <= TENSORS.bytes:
                raise SourceError(f"{file}: not a safetensors file (it says its header has {length} bytes)")
            text = stream.read(length)
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror}") from error
    if len(text) < length:
        raise _truncated(file, 8 + length, size, "at least ")
    entries = _parse_header(text, file)
    tensors = [_tensor(name, entry, file, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_contiguous(tensors, 8 + length, file)
    expected = tensors[-1].end if tensors else 8 + length
    if size < expected:
        raise _truncated(file, expected, size)
    if size > expected:
        raise SourceError(f"{file}: {expected} bytes expected, {size} found: data that no tensor claims")
    return tensors


def _truncated(file: Path, expected: int, size: int, at_least: str = "") -> SourceError:
    return SourceError(
        f"{file} is truncated: {at_least}{expected} bytes expected, {size} found",
        hint="delete the file and fetch it again",
    )


def _parse_header(text: bytes, file: Path) -> dict[str, Any]:
    try:
        entries = parse_json(text, TENSORS)
    except JsonError as error:
        raise SourceError(f"{file}: the header is not sound JSON: {error}") from error
    if not isinstance(entries, dict):
        raise SourceError(f"{file}: the header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries


def _tensor(name: str, entry: Any, file: Path, data: int) -> TensorHeader:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if len(
            shape
        ) <= MAX_RANK and all(type(size) is int and 0 <= size <= MAX_SIZE for size in (*shape, start, end)):
            tensor = TensorHeader(name, dtype, tuple(shape), file.name, data + start, data + end)
        case _:
            raise SourceError(
                f"{file}: the header's entry for {brief(name)} is not dtype, shape and data_offsets"
            )
    if dtype not in BITS:
        raise SourceError(f"{file}: tensor {brief(name)} has the unknown dtype {brief(dtype)}")
    bits = tensor.elements * BITS[dtype]
    if tensor.bytes * 8 != bits:
        raise SourceError(
            f"{file}: tensor {brief(name)} of {dtype} {brief(shape)} needs {brief(bits / 8 if bits % 8 else bits // 8)} bytes, "
            f"its offsets give {tensor.bytes}"
        )
    return tensor


def _check_contiguous(tensors: Iterable[TensorHeader], start: int, file: Path) -> None:
    for tensor in tensors:
        if tensor.start != start:
            what = "overlaps the one before" if tensor.start < start else "leaves a hole before it"
            raise SourceError(
                f"{file}: tensor {brief(tensor.name)} {what} (starts at {tensor.start}, expected {start})"
            )
        start = tensor.end


def _join(tensors: Iterable[TensorHeader]) -> dict[str, TensorHeader]:
    joined: dict[str, TensorHeader] = {}
    for tensor in tensors:
        other = joined.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise SourceError(f"tensor {brief(tensor.name)} is in {other.file} and again in {tensor.file}")
    return joined


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard name, of a ``model.safetensors.index.json``."""
    weight_map = read_json(path, TENSORS).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: no weight_map in it")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
            raise SourceError(
                f"{path}: {brief(tensor)} is said to be in {brief(shard)}, which is no safetensors file beside it"
            )
    return weight_map


def weight_files(names: Iterable[str], index: Mapping[str, str] | None, place: str) -> tuple[str, ...]:
    """Which of the file ``names`` of a checkpoint hold its weights, sorted.

    ``index`` is that of ``read_index``, None when there is none; ``place`` stands in messages. These are the files
    that transformers loads; it is refused when llama.cpp's converter, which takes every ``model*.safetensors``,
    would read others. Raises SourceError, also when there are only pickles.
    """
    present = {name for name in names if "/" not in name}
    ours = {name for name in present if name.startswith("model") and name.endswith(".safetensors")}
    if index is not None:
        shards = set(index.values())
        if missing := sorted(shards - present):
            raise SourceError(
                f"{place}: {len(missing)} of {len(shards)} shards are missing: {some(missing)}",
                hint="fetch them, or the index is of another checkpoint",
            )
        if stray := sorted(ours - shards):
            raise SourceError(
                f"{place}: {some(stray)} beside shards that {INDEX} names: unclear which are the weights",
                hint="remove what does not belong to the checkpoint",
            )
        return tuple(sorted(shards))
    if ours == {SINGLE}:
        return (SINGLE,)
    if ours:
        raise SourceError(
            f"{place}: shards without {INDEX}: {some(sorted(ours))}", hint="fetch the index as well"
        )
    raise _no_weights(present, place)


def _no_weights(present: set[str], place: str) -> SourceError:
    if "adapter_model.safetensors" in present:
        return SourceError(f"{place} is an adapter, not a model", hint="merge it into its base model first")
    if pickles := sorted(name for name in present if name.endswith(PICKLES)):
        return SourceError(
            f"{place}: the weights are pickles ({some(pickles)}), which can run code and are never read",
            hint="convert to safetensors: load with transformers where you trust them, then save_pretrained",
        )
    if gguf := sorted(name for name in present if name.endswith(".gguf")):
        return SourceError(f"{place} holds GGUF ({some(gguf)})", hint="name the checkpoint it was made from")
    if other := sorted(name for name in present if name.endswith(".safetensors")):
        return SourceError(
            f"{place}: {some(other)} found", hint=f"weights are {SINGLE}, or shards that {INDEX} names"
        )
    return SourceError(f"{place}: no weights ({SINGLE} or {INDEX})")


def some(names: Sequence[str], shown: int = 4) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def check_index(folder: Path) -> dict[str, TensorHeader]:
    """The headers of the checkpoint in ``folder`` after comparing its index with its shards.

    Raises SourceError for everything ``weight_files``, ``read_headers`` and ``compare`` refuse.
    """
    index = read_index(folder / INDEX) if (folder / INDEX).exists() else None
    names = weight_files((path.name for path in folder.iterdir()), index, str(folder))
    headers = read_headers([folder / name for name in names])
    if index is not None:
        compare(index, headers, str(folder))
    return _some_tensors(headers, str(folder))


def _some_tensors(headers: dict[str, TensorHeader], place: str) -> dict[str, TensorHeader]:
    if not any(tensor.bytes for tensor in headers.values()):
        raise SourceError(f"{place}: the weight files hold no weights")
    return headers


def compare(index: Mapping[str, str], headers: Mapping[str, TensorHeader], place: str) -> None:
    """Raise SourceError where an index disagrees with its shards."""
    for name, shard in index.items():
        tensor = headers.get(name)
        if tensor is None or tensor.file != shard:
            found = f"it is in {tensor.file}" if tensor else "no shard has it"
            raise SourceError(f"{place}: {INDEX} puts tensor {brief(name)} in {shard}, but {found}")
    for name, tensor in headers.items():
        if name not in index:
            raise SourceError(
                f"{place}: {tensor.file} holds tensor {brief(name)}, which {INDEX} does not name"
            )


def remote_headers(
    repo: str, revision: str, files: Mapping[str, int], token: str | None = None
) -> dict[str, TensorHeader]:
    """The headers of ``files`` (name to bytes) of a Hub repository, by range requests; checked like local ones.

    ``token`` None means the one of HF_TOKEN or of the login. The caller maps the Hub's errors.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    api = HfApi(token=token)

    def ask(name: str) -> list[TensorHeader]:
        file = Path(f"{repo}@{revision}") / name
        try:
            found = api.parse_safetensors_file_metadata(repo, name, revision=revision).tensors
            entries: dict[str, dict[str, Any]] = {
                key: {"dtype": info.dtype, "shape": [*info.shape], "data_offsets": [*info.data_offsets]}
                for key, info in found.items()
            }
            data = files[name] - max((info.data_offsets[1] for info in found.values()), default=0)
        except SafetensorsParsingError as error:
            raise SourceError(f"{file}: not a safetensors file: {error}") from error
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise SourceError(f"{file}: the header is not sound ({type(error).__name__})") from error
        if data < 10:
            raise _truncated(file, files[name] - data, files[name], "more than ")
        tensors = [_tensor(key, entry, file, data) for key, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
        _check_contiguous(tensors, data, file)
        return tensors

    with ThreadPoolExecutor(REMOTE_REQUESTS) as pool:
        joined = _join(tensor for tensors in pool.map(ask, sorted(files)) for tensor in tensors)
    return _some_tensors(joined, f"{repo}@{revision}")
