"""What the GGUF methods share: the rehearsal on headers, the base file, names and exact sizes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from quantool import __version__, process, toolchain
from quantool.errors import ConfigError, DependencyError, QuantizationError, SourceError, nearest
from quantool.headers import headers
from quantool.methods._pretokenizer import known_names
from quantool.progress import Progress
from quantool.records import FileRecord, Source, fingerprint, sha256_of
from quantool.registry import Job, Options
from quantool.source import overlay
from quantool.workspace import write_text, written

ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
F16_MAX = 65504.0
SPACE_KEY = "tokenizer.ggml.add_space_prefix"
GIB = 1 << 30
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


class GgufOptions(Options):
    """Options of every method that writes GGUF."""

    llama_cpp_path: Path | None = Field(None, description="llama.cpp checkout whose converter to use.")
    pre_tokenizer: str | None = Field(
        None,
        description="llama.cpp's name of the BPE pre-tokenizer, for a tokenizer whose hash it does not know.",
    )
    add_space_prefix: bool | None = Field(
        None,
        description="SentencePiece only: whether llama.cpp puts a space before text after a special token. Default: as "
        "its converter has it, but false for a chat model whose tokenizer puts one before the first word only.",
    )
    model_name: str | None = Field(
        None, description="general.name and the start of file names; default: the source's."
    )
    max_shard_size: str | None = Field(
        None, description="Split files at this size, e.g. 45G (decimal, as llama-gguf-split counts)."
    )

    def split_bytes(self) -> int:
        """``max_shard_size`` in bytes, 0 for none."""
        if self.max_shard_size is None:
            return 0
        number, unit = self.max_shard_size[:-1], self.max_shard_size[-1:].upper()
        if unit not in UNITS or not number.isdigit() or not int(number):
            raise ConfigError(f"max_shard_size {self.max_shard_size!r} is not a number with K, M or G")
        return int(number) * UNITS[unit]


@dataclass(frozen=True)
class Tensor:
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
    architecture: str
    headers: tuple[int, ...]
    """Bytes of each shard's header, without the padding that follows."""
    keys: dict[str, Any]
    tensors: dict[str, Tensor]
    space_prefix_dropped: bool = False

    @property
    def header(self) -> Path:
        """The GGUF whose tensor data is a hole: enough for llama.cpp's dry runs."""
        return _first(self.folder / "header.gguf", len(self.headers))

    def elements(self) -> int:
        """Number of weights."""
        return sum(_product(tensor.shape) for tensor in self.tensors.values())


def space_note(rehearsal: Rehearsal) -> str:
    """A sentence where the converter was told to put no space after special tokens though nobody asked."""
    if not rehearsal.space_prefix_dropped:
        return ""
    return (
        f"{SPACE_KEY} is false: the tokenizer puts a space before the first word of a text only, llama.cpp would put one "
        "after every special token; a text without a template starts without that space in llama.cpp"
    )


def model_name(source: Source, options: GgufOptions) -> str:
    """``general.name``; refused where llama.cpp would change its behaviour by it (src/llama-vocab.cpp: phi-3)."""
    name = options.model_name or source.name
    if any(mark in name.lower() for mark in ("phi-3", "phi3")) and not source.facts.model_type.startswith(
        "phi3"
    ):
        raise ConfigError(
            f"a model named {name!r} gets Phi-3's token handling in llama.cpp, but it is {source.facts.architecture}",
            hint="set quantization_config.model_name to another name",
        )
    return name


def file_stem(source: Source, options: GgufOptions) -> str:
    """``BaseName-SizeLabel-FineTune-Version`` (docs/gguf.md of ggml, "GGUF naming convention")."""
    import gguf

    name = model_name(source, options)
    full, _, base, finetune, version, size = gguf.Metadata.get_model_id_components(
        name, source.facts.parameters
    )
    label = size or gguf.size_label(source.facts.parameters, 0, 0, 0)
    return str(gguf.naming_convention(full, base, finetune, version, label, None))


def shard_names(name: str, count: int) -> list[str]:
    """File names of ``count`` shards of ``name`` (which ends in .gguf), as llama.cpp splits them."""
    if count == 1:
        return [name]
    stem = name.removesuffix(".gguf")
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _first(path: Path, count: int) -> Path:
    return path.with_name(shard_names(path.name, count)[0])


def rehearse(source: Source, options: GgufOptions, kind: str) -> Rehearsal:
    """Run the real converter on the checkpoint's headers; the result is kept in the user cache.

    Finds what would fail after hours: an architecture or tokenizer that llama.cpp does not know, a vocabulary that does
    not fit the embeddings, a sliding window that llama.cpp would ignore. ``kind`` is f16, bf16 or f32.
    """
    tools = toolchain.locate(options.llama_cpp_path)
    key = fingerprint(_shape(source), _recipe(source, options, tools, kind))
    folder = toolchain.cache_folder() / "rehearsals" / key[:32]
    with alone(folder):
        if not (folder / "summary.json").is_file():
            _rehearse(source, options, kind, tools, folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    tensors = {
        name: Tensor(tuple(entry["shape"]), entry["type"], entry["bytes"], entry["shard"])
        for name, entry in summary["tensors"].items()
    }
    return Rehearsal(
        folder,
        summary["keys"]["general.architecture"],
        tuple(summary["headers"]),
        summary["keys"],
        tensors,
        summary["space_prefix_dropped"],
    )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
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
    with written(folder) as part:
        part.mkdir(parents=True)
        model = _with_weights(source, part / "model")
        request = _request(source, options, kind, tools, part / "metadata.json")
        request |= {"model": str(model), "output": str(part / "header.gguf"), "rehearse": True}
        summary = process.call(
            "quantool.methods._converter:convert", request, log=part / "converter.log", failure=SourceError
        )
        _check_rehearsal(source, summary)
        for number, file in enumerate(summary["files"]):
            data = sum(_pad(t["bytes"]) for t in summary["tensors"].values() if t["shard"] == number)
            os.truncate(file, _pad(summary["headers"][number]) + data)
        _require_vocabulary(Path(summary["files"][0]), options, tools, part / "converter.log")
        shutil.rmtree(part / "model", ignore_errors=True)
        write_text(part / "summary.json", json.dumps(summary))


def _require_vocabulary(path: Path, options: GgufOptions, tools: toolchain.Toolchain, log: Path) -> None:
    """Let llama.cpp load the vocabulary of a rehearsed file; what it refuses is the tokenizer or its name."""
    try:
        process.call(
            "quantool.methods._quantizer:probe", {"path": str(path), "vocabulary_only": True}, log=log
        )
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


def _with_weights(source: Source, folder: Path) -> Path:
    """The source's folder, or links to its small files (and another tokenizer's) beside weights without data."""
    from quantool.weights import write_skeleton

    source = overlay(source, folder / "links")
    weights = [file.name for file in source.files if file.name.endswith(".safetensors")]
    if all((source.folder / name).is_file() for name in weights):
        return source.folder
    folder.mkdir(exist_ok=True)
    for file in source.files:
        if not file.name.endswith(".safetensors") and (source.folder / file.name).is_file():
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.name).symlink_to((source.folder / file.name).resolve())
    write_skeleton(headers(source), folder)
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
    window = source.facts.sliding_window
    if window and window < source.facts.context and f"{architecture}.attention.sliding_window" not in keys:
        raise SourceError(
            f"the model attends to a sliding window of {window} tokens, which llama.cpp's {architecture} ignores: "
            f"beyond {window} tokens it would compute something else",
            hint=f"set sliding_window to null in config.json if the model was not trained with it, or "
            f"max_position_embeddings to {window}",
        )


def metadata(source: Source, options: GgufOptions) -> dict[str, Any]:
    """Authorship keys that override what the converter would guess (gguf-py/gguf/metadata.py)."""
    found: dict[str, Any] = {
        "general.name": model_name(source, options),
        "general.quantized_by": f"quantool {__version__}",
    }
    if source.card.license:
        found["general.license"] = source.card.license
    if source.card.languages:
        found["general.languages"] = list(source.card.languages)
    if source.commit:
        found["general.source.huggingface.repository"] = source.model_id
        found["general.source.repo_url"] = f"https://huggingface.co/{source.model_id}"
    return found


def _request(
    source: Source, options: GgufOptions, kind: str, tools: toolchain.Toolchain, override: Path
) -> dict[str, Any]:
    """What the converter's child needs besides the places to read and write."""
    write_text(override, json.dumps(metadata(source, options)))
    extra = {"quantool.version": __version__}
    if source.commit:
        extra["quantool.source.commit"] = source.commit
    if tools.commit:
        extra["quantool.llama_cpp.commit"] = tools.commit
    return {
        "toolchain": str(tools.folder),
        "type": kind,
        "metadata": str(override),
        "pre_tokenizer": options.pre_tokenizer,
        "chat_template": source.facts.chat_template,
        "add_space_prefix": options.add_space_prefix,
        "extra": extra,
        "split_bytes": options.split_bytes(),
        "rehearse": False,
    }


def choose_type(source: Source, wanted: str) -> tuple[str, str]:
    """The base's type for ``wanted`` (auto, f16, bf16, f32) and a sentence when it is not the expected one.

    f16 holds 11 significant bits to bf16's 8, so llama.cpp's users expect it, but nothing beyond 65504.
    """
    overflow = source.max_abs is not None and source.max_abs > F16_MAX
    if wanted == "auto":
        if not overflow:
            return "f16", ""
        return "bf16", f"weights reach {source.max_abs:g}, beyond f16's {F16_MAX:g}: the base is bf16"
    if wanted == "f16" and overflow:
        raise QuantizationError(
            f"weights reach {source.max_abs:g}, which f16 cannot hold (at most {F16_MAX:g})",
            hint="use BF16, or base_type: auto",
        )
    return wanted, ""


def base_key(source: Source, options: GgufOptions, kind: str) -> str:
    """Fingerprint of everything that a converted file depends on."""
    tools = toolchain.locate(options.llama_cpp_path)
    return fingerprint(
        {file.name: file.sha256 for file in source.files}, _recipe(source, options, tools, kind)
    )


def _recipe(source: Source, options: GgufOptions, tools: toolchain.Toolchain, kind: str) -> list[Any]:
    """Everything beside the checkpoint that decides the bytes of a converted file."""
    chosen = options.model_dump(include={"pre_tokenizer", "add_space_prefix", "max_shard_size"})
    code = [
        toolchain.fingerprint_of(tools),
        sha256_of(Path(__file__).with_name("_converter.py")),
        __version__,
    ]
    return [metadata(source, options), source.commit, source.facts.chat_template, chosen, code, kind]


def base(job: Job, options: GgufOptions, kind: str, progress: Progress) -> tuple[Path, str]:
    """The unquantized GGUF of the source (first shard) and its stage key; made once a run, kept for reruns."""
    source, workspace = job.plan.source, job.workspace
    key = base_key(source, options, kind)
    folder = workspace.work / f"base-{kind}"

    def produce() -> tuple[list[Path], dict[str, Any]]:
        tools = toolchain.locate(options.llama_cpp_path)
        with written(folder) as part, progress.bar(f"convert to {kind.upper()}", "B") as bar:
            part.mkdir()
            request = _request(source, options, kind, tools, workspace.work / "metadata.json")
            request |= {"model": str(source.folder), "output": str(part / "base.gguf")}
            result = process.call(
                "quantool.methods._converter:convert", request, log=workspace.logs / "converter.log", bar=bar
            )
            load(Path(result["files"][0]), workspace.logs / "converter.log")
            names = [Path(file).name for file in result["files"]]
        return [folder / name for name in names], {"files": names}

    result = workspace.stage(f"base-{kind}", key, produce)
    return folder / result["files"][0], key


def load(path: Path, log: Path) -> None:
    """Let llama.cpp load a file; QuantizationError with its reason when it does not."""
    process.call("quantool.methods._quantizer:probe", {"path": str(path), "vocabulary_only": False}, log=log)


def file_bytes(rehearsal: Rehearsal, types: dict[str, str], extra: int) -> list[int]:
    """Exact size of each shard when tensors get ``types`` (ggml type names) and ``extra`` bytes of metadata join."""
    sizes = [_pad(header + (extra if number == 0 else 0)) for number, header in enumerate(rehearsal.headers)]
    for name, tensor in rehearsal.tensors.items():
        sizes[tensor.shard] += _pad(tensor_bytes(tensor, types[name]))
    return sizes


def tensor_bytes(tensor: Tensor, type_name: str) -> int:
    """Bytes of a tensor stored as ``type_name``."""
    kind = toolchain.ggml_types()[type_name.lower()]
    return _product(tensor.shape) // kind.block * kind.size


def bits_per_weight(rehearsal: Rehearsal, types: dict[str, str]) -> float:
    """Bits of tensor data per weight."""
    total = sum(tensor_bytes(tensor, types[name]) for name, tensor in rehearsal.tensors.items())
    return 8 * total / rehearsal.elements()


def records(folder: Path, names: list[str]) -> tuple[FileRecord, ...]:
    """Size and hash of finished files."""
    return tuple(
        FileRecord(name=name, bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in names
    )


def place(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a hard link, or a copy where the file system has none."""
    with written(target) as part:
        try:
            part.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, part)


def need_disk(folder: Path, wanted: int) -> None:
    """DependencyError when less than ``wanted`` bytes are free where ``folder`` is."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise DependencyError(f"{wanted / 1e9:.2f} GB are needed in {folder}, {free / 1e9:.2f} GB are free")


def export_ram(source: Source) -> int:
    """Peak memory of the conversion: two copies of the largest tensor in float32, and the libraries."""
    widening = {"F32": 1, "F64": 1}.get(source.facts.dtype, 2)
    return 2 * widening * source.facts.largest_tensor + GIB


def _pad(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
