"""The rehearsal: llama.cpp's converter run on headers alone, and the exact sizes that follow from it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError, QuantizationError, SourceError, nearest
from quantool.formats.gguf_header import FIRST, padded, shard_names
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import TensorHeader
from quantool.formats.safetensors_layout import write_skeleton
from quantool.methods._llama_cpp import convert, convert_ahead, split
from quantool.methods._llama_cpp.base_file import GgufOptions, conversion, recipe, require_loadable
from quantool.methods._llama_cpp.pre_tokenizer import known_names
from quantool.records import Source, fingerprint
from quantool.runtime import process, toolchain
from quantool.runtime.workspace import write_text, written
from quantool.source.resolve import overlay
from quantool.source.shapes import check_config_shapes
from quantool.source.tensor_headers import headers

LIBRARIES = 700 << 20
"""Bytes that torch and transformers take."""
DIMENSION = 8
"""Bytes of a dimension in a tensor's entry of the header."""
SPACE_KEY = "tokenizer.ggml.add_space_prefix"


@dataclass(frozen=True)
class ConvertedTensor:
    """One tensor of a converted file: ``shape`` as numpy has it (rows first), ``shard`` counts from 0."""

    shape: tuple[int, ...]
    type: str
    bytes: int
    shard: int


@dataclass(frozen=True)
class Rehearsal:
    """What the converter will write, found by running it on headers alone."""

    folder: Path
    """Holds the header file and the dry runs made on it."""
    headers: tuple[int, ...]
    """Bytes of each shard's header, without the padding that follows."""
    keys: dict[str, Any]
    tensors: dict[str, ConvertedTensor]
    sources: dict[str, list[str]]
    """Name of a converted tensor to the names of the checkpoint's that it is made of."""
    space_prefix_dropped: bool = False
    equal_steps: str | None = None
    """llama.cpp's name of the pre-tokenizer where the steps in tokenizer.json gave it, not the user and no hash."""

    @property
    def header(self) -> Path:
        """The GGUF whose tensor data is a hole: enough for llama.cpp's dry runs."""
        return self.folder / shard_names("header.gguf", len(self.headers))[0]

    def elements(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def notes(rehearsal: Rehearsal, source: Source) -> list[str]:
    """What the converter decided though nobody asked (pre-tokenizer, no space after special tokens), and rounded positions."""
    found = _rounded_yarn(read_json(source.folder / "config.json"))
    if rehearsal.equal_steps is not None:
        found.append(
            f"pre-tokenizer {rehearsal.equal_steps}: llama.cpp's converter does not know this vocabulary, but the steps in "
            "tokenizer.json are those that it calls so; the tokenizer check proves it"
        )
    if rehearsal.space_prefix_dropped:
        found.append(
            f"{SPACE_KEY} is false: the tokenizer puts a space before the first word of a text only, llama.cpp would put one "
            "after every special token; a text without a template starts without that space in llama.cpp"
        )
    return found


def _rounded_yarn(config: Mapping[str, Any]) -> list[str]:
    """A note on YaRN without ``truncate``, as gpt-oss has it: llama.cpp rounds its range (ggml.c, ``ggml_rope_yarn_corr_dims``).

    On a random model of two layers that is a divergence of 0.001 to 0.01; with rounded bounds in the reference it is
    0.000000. vLLM did the same before 0.11.1 (its issue 27722).
    """
    inner = config.get("text_config")
    parts = (config, inner) if isinstance(inner, dict) else (config,)
    scalings = [part.get(key) for part in parts for key in ("rope_parameters", "rope_scaling")]
    if not any(isinstance(scaling, dict) and scaling.get("truncate") is False for scaling in scalings):
        return []
    text = (
        "config.json: truncate: false: llama.cpp rounds the range of dimensions that YaRN corrects, the model was trained "
        "without: positions differ a little in every GGUF of it, which conversion_kld measures"
    )
    return [text]


def rehearse(source: Source, options: GgufOptions, kind: str) -> Rehearsal:
    """Run the real converter on the checkpoint's headers; the result is kept in the user cache.

    Finds what would fail after hours: an architecture or tokenizer that llama.cpp does not know, a vocabulary that does
    not fit the embeddings, a sliding window that llama.cpp would ignore. ``kind`` is f16, bf16 or f32.
    """
    tools = toolchain.locate(options.llama_cpp_path)
    key = fingerprint(_shape(source), recipe(source, options, tools, kind))
    folder = toolchain.cache_folder() / "rehearsals" / key[:32]
    with locked(folder):
        if not (folder / "summary.json").is_file():
            _rehearse(source, options, kind, tools, folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    tensors = {
        name: ConvertedTensor(tuple(entry["shape"]), entry["type"], entry["bytes"], entry["shard"])
        for name, entry in summary["tensors"].items()
    }
    return Rehearsal(
        folder,
        tuple(summary["headers"]),
        summary["keys"],
        tensors,
        summary["sources"],
        summary["space_prefix_dropped"],
        summary["equal_steps"],
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock beside ``folder``: runs with other output folders share the user cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _shape(source: Source) -> list[Any]:
    """Everything that the converter reads of a checkpoint but the values of its weights."""
    small = [(file.name, file.sha256) for file in source.files if not file.name.endswith(".safetensors")]
    if source.commit:
        return [source.commit, small]
    return [small, [(tensor.name, tensor.dtype, tensor.shape) for tensor in headers(source).values()]]


def _rehearse(
    source: Source,
    options: GgufOptions,
    kind: str,
    tools: toolchain.Toolchain,
    folder: Path,
) -> None:
    tensors = headers(source)
    check_config_shapes(source, tensors)
    log = folder.with_suffix(".log")  # stays where it is when the rehearsal fails
    log.unlink(missing_ok=True)
    with written(folder) as part:
        part.mkdir(parents=True)
        model = _with_weights(source, tensors, part / "model")
        request = conversion(source, options, kind, tools, part / "metadata.json")
        request |= {"model": str(model), "output": str(part / "header.gguf"), "rehearse": True}
        summary = process.call(convert.convert, request, log=log, failure=SourceError)
        _check_rehearsal(source, summary)
        for number, file in enumerate(summary["files"]):
            data = sum(padded(t["bytes"]) for t in summary["tensors"].values() if t["shard"] == number)
            os.truncate(file, padded(summary["headers"][number]) + data)
        _refuse_unloadable(Path(summary["files"][0]), options, tools, log)
        shutil.rmtree(part / "model", ignore_errors=True)
        write_text(part / "summary.json", json.dumps(summary))
    log.unlink(missing_ok=True)


def _refuse_unloadable(path: Path, options: GgufOptions, tools: toolchain.Toolchain, log: Path) -> None:
    """Let llama.cpp load a rehearsed file, whose weights are a hole: vocabulary, parameters and every tensor's shape."""
    try:
        require_loadable(path, log)
    except QuantizationError as error:
        name = options.pre_tokenizer
        if name and "unknown pre-tokenizer" in error.message:
            raise ConfigError(
                f"quantization_config.pre_tokenizer: llama.cpp knows no pre-tokenizer {name!r}",
                hint=nearest(name, known_names(tools.folder)),
            ) from error
        raise SourceError(
            f"llama.cpp would convert this checkpoint and then not load it: {error.message}", hint=error.hint
        ) from error


def _with_weights(source: Source, tensors: Mapping[str, TensorHeader], folder: Path) -> Path:
    """The source's folder, or links to its small files (and another tokenizer's) beside weights without data."""
    source = overlay(source, folder / "links")
    weights = [file.name for file in source.files if file.name.endswith(".safetensors")]
    if all((source.folder / name).is_file() for name in weights):
        return source.folder
    folder.mkdir(exist_ok=True)
    for file in source.files:
        if not file.name.endswith(".safetensors") and (source.folder / file.name).is_file():
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.name).symlink_to((source.folder / file.name).resolve())
    write_skeleton(tensors, folder)
    return folder


def _check_rehearsal(source: Source, summary: dict[str, Any]) -> None:
    """Refuse what llama.cpp would convert, and then run wrongly or not at all."""
    keys, architecture = summary["keys"], summary["keys"]["general.architecture"]
    rows = summary["tensors"].get("token_embd.weight", {"shape": [summary["tokens"]]})["shape"][0]
    if summary["tokens"] != rows:
        raise SourceError(
            f"the tokenizer gives {summary['tokens']} tokens for {rows} embedding rows; llama.cpp would not load the file",
            hint=""
            if source.facts.has_sentencepiece
            else "tokenizer.model is missing: copy it from the original checkpoint",
        )
    if source.facts.task.generates and f"{architecture}.pooling_type" in keys:
        raise SourceError(
            f"llama.cpp's converter takes {source.name} for a reranker and keeps two rows of its head, so the file would "
            "write no text, which is what it would be compared by",
            hint="the methods for transformers and vLLM (fp8, awq) keep the whole head",
        )
    window = source.facts.sliding_window
    if window and window < source.facts.context and f"{architecture}.attention.sliding_window" not in keys:
        raise SourceError(
            f"the model attends to a sliding window of {window} tokens, which llama.cpp's {architecture} ignores: "
            f"beyond {window} tokens it would compute something else",
            hint=f"set sliding_window to null in config.json if the model was not trained with it, or "
            f"max_position_embeddings to {window}",
        )


def file_bytes(rehearsal: Rehearsal, types: dict[str, str], extra: int) -> list[int]:
    """Exact size of each shard when tensors get ``types`` (ggml type names) and ``extra`` bytes of metadata join."""
    sizes = [
        padded(header + (extra if number == 0 else 0)) for number, header in enumerate(rehearsal.headers)
    ]
    for name, tensor in rehearsal.tensors.items():
        sizes[tensor.shard] += padded(tensor_bytes(tensor, types[name]))
    return sizes


def tensor_bytes(tensor: ConvertedTensor, type_name: str) -> int:
    """Bytes of a tensor stored as ``type_name``."""
    kind = toolchain.ggml_types()[type_name.lower()]
    return math.prod(tensor.shape) // kind.block * kind.size


def padded_bytes(tensor: ConvertedTensor, type_name: str) -> int:
    """Bytes of a tensor in a file, the padding behind it counted."""
    return padded(tensor_bytes(tensor, type_name))


def conversion_ram(rehearsal: Rehearsal) -> int:
    """Peak memory of the conversion: what is prepared ahead of the writer, and the libraries."""
    largest = max(rehearsal.tensors.values(), key=lambda tensor: tensor.bytes)
    return convert_ahead.room(math.prod(largest.shape), largest.bytes) + LIBRARIES


def bits_per_weight(rehearsal: Rehearsal, types: dict[str, str]) -> float:
    """Bits of tensor data per weight."""
    total = sum(tensor_bytes(tensor, types[name]) for name, tensor in rehearsal.tensors.items())
    return 8 * total / rehearsal.elements()


def split_bytes(rehearsal: Rehearsal, types: dict[str, str], extra: int, limit: int) -> list[int]:
    """Sizes of the parts that one file with ``types`` (in the file's order) makes when split at ``limit`` bytes."""
    tensors = {name: rehearsal.tensors[name] for name in types}
    sizes = [padded(tensor_bytes(tensor, types[name])) for name, tensor in tensors.items()]
    infos = [
        split.info_bytes(name, len(tensor.shape) - _needless(tensor)) for name, tensor in tensors.items()
    ]
    needless = DIMENSION * sum(map(_needless, tensors.values()))
    return split.part_bytes(_merged_header(rehearsal) - needless + extra, infos, sizes, limit)


def _needless(tensor: ConvertedTensor) -> int:
    """Dimensions that llama.cpp does not write: rows, where there is one (ggml.c, ``ggml_n_dims``), as of a reranker's head."""
    rows = tensor.shape[:-1]
    return next((number for number, size in enumerate(rows) if size != 1), len(rows))


def _merged_header(rehearsal: Rehearsal) -> int:
    """Bytes of the header when a base in shards becomes one file: llama.cpp drops the split keys, joins the lists."""
    further = len(rehearsal.headers) - 1
    if not further:
        return rehearsal.headers[0]
    keys = split.split_keys_bytes()
    return sum(rehearsal.headers) - keys - (FIRST + keys) * further
