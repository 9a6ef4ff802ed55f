"""A GGUF's header, read in a worker: llama.cpp's own ``gguf`` package knows types that the package index's lacks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import QuantizationError, SourceError
from quantool.formats.gguf_header import GgufHeader, GgufTensor, read_header
from quantool.plugins.contract import Case
from quantool.runtime import toolchain
from quantool.runtime.process import call
from quantool.runtime.worker import Report
from quantool.validation._engines.vocabulary import UnloadableError
from quantool.validation._files.gguf_blocks import StoredTensor, alike, inspect

MATRIX_FILE = "quantize.imatrix.file"
TWINS = ("token_embd.weight", "output.weight")
LAYER = re.compile(r"^blk\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor; ``shape`` as numpy has it, rows before columns; ``type`` as ggml names it (``Q4_K``)."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    block: int
    """Weights that share a scale; 1 for floats."""

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / max(1, self.elements)


@dataclass(frozen=True)
class Header:
    """What the header of a GGUF (all shards) says."""

    keys: Mapping[str, Any]
    """Of the first shard, without the tokenizer's."""
    tensors: tuple[InspectedTensor, ...]
    level: str | None
    """By ``general.file_type``."""
    levels: tuple[str, ...]
    """All that there are."""
    blocks: int
    read: int
    broken: tuple[str, ...]
    """What is wrong with numbers in blocks."""
    twins: bool | None
    """Whether output.weight is token_embd.weight; None where one is not there or their types differ."""
    matrix: Mapping[str, int] | None
    """Weights that the importance matrix beside the file covers, and its columns for each; None without one."""
    matrix_keys: Mapping[str, Any]


def read(case: Case, shards: Sequence[str]) -> Header:
    """The header of the case's GGUF; raises UnloadableError for a file that is damaged."""
    log = case.workspace.logs / f"headers-{case.name.replace('/', '-')}.log"
    request = {
        "paths": [str(case.artifact.parent / name) for name in shards],
        "largest": case.source.max_abs,
    }
    try:
        found = call(read_headers, request, log=log)
    except QuantizationError as error:
        raise UnloadableError(f"llama.cpp: {error.message}", case) from error
    tensors = tuple(
        InspectedTensor(**fields | {"shape": tuple(fields["shape"])}) for fields in found.pop("tensors")
    )
    return Header(
        **found | {"tensors": tensors, "levels": tuple(found["levels"]), "broken": tuple(found["broken"])}
    )


def read_headers(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: the header of a GGUF in ``paths`` (its shards in order); ``largest`` as in ``_blocks.inspect``.

    Result: the fields of ``Header``. Raises QuantizationError for a file that is not a whole GGUF.
    """
    toolchain.prefer_own_gguf()
    keys: dict[str, Any] = {}
    tensors: list[dict[str, Any]] = []
    seen: dict[str, Any] = {"blocks": 0, "read": 0, "problems": []}
    pair: dict[str, Any] = {}
    for number, path in enumerate(request["paths"]):
        header = _open(Path(path))
        if number == 0:
            keys = _keys(header)
        tensors += [
            {
                "name": tensor.name,
                "type": tensor.type.upper(),
                "shape": list(tensor.shape),
                "bytes": tensor.bytes,
                "block": tensor.block,
            }
            for tensor in header.tensors
        ]
        present = [stored(header, tensor) for tensor in header.tensors]
        pair |= {tensor.name: tensor for tensor in present if tensor.name in TWINS}
        found = inspect(present, request["largest"])
        seen = {name: seen[name] + found[name] for name in seen}
        report(number + 1, len(request["paths"]))
    matrix, matrix_keys = _matrix(Path(request["paths"][0]).parent, keys.get(MATRIX_FILE))
    return {
        "keys": keys,
        "tensors": tensors,
        "level": _level_of(keys.get("general.file_type")),
        "levels": levels(),
        "blocks": seen["blocks"],
        "read": seen["read"],
        "broken": seen["problems"],
        "twins": alike(*pair.values()) if len(pair) == len(TWINS) else None,
        "matrix": matrix,
        "matrix_keys": matrix_keys,
    }


def read_keys(request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Worker: ``keys`` of the GGUF at ``path``, without the tokenizer's; raises like ``read_headers``."""
    return {"keys": _keys(_open(Path(request["path"])))}


def _open(path: Path) -> GgufHeader:
    try:
        return read_header(path)
    except SourceError as error:
        raise QuantizationError(error.message, hint=error.hint) from error


def _keys(header: GgufHeader) -> dict[str, Any]:
    return header.keys(without=("tokenizer.",))


def stored(header: GgufHeader, tensor: GgufTensor) -> StoredTensor:
    """A tensor with its data, mapped from the file."""
    from gguf.constants import GGMLQuantizationType

    return StoredTensor(
        tensor.name, GGMLQuantizationType(tensor.number), tensor.shape, tensor.bytes, header.read_data(tensor)
    )


def _matrix(folder: Path, name: object) -> tuple[dict[str, int] | None, dict[str, Any]]:
    """What the importance matrix ``name`` in ``folder`` covers, and its keys, when it is there."""
    path = folder / Path(str(name)).name
    if not isinstance(name, str) or path.suffix != ".gguf" or not path.is_file():
        return None, {}
    header = _open(path)
    covered = {
        tensor.name.removesuffix(".in_sum2"): tensor.elements
        for tensor in header.tensors
        if tensor.name.endswith(".in_sum2")
    }
    return covered, _keys(header)


def levels() -> list[str]:
    """Names of all levels of ``enum llama_ftype``."""
    from gguf import LlamaFileType

    return [kind.name.partition("_")[2] for kind in LlamaFileType if "_" in kind.name]


def _level_of(file_type: int | None) -> str | None:
    from gguf import LlamaFileType

    known = {kind.value: kind.name.partition("_")[2] for kind in LlamaFileType}
    return known.get(file_type) if file_type is not None else None
