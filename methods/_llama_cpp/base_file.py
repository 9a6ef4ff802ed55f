"""What the GGUF methods share: names, metadata and the base file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from quantool import __version__
from quantool.errors import ConfigError, QuantizationError
from quantool.formats.gguf_keys import ADAPTER, SAMPLING_KEYS, origin_keys
from quantool.methods._llama_cpp import convert, lora, quantize
from quantool.methods._llama_cpp.pooled import gguf_pooling
from quantool.plugins.contract import Job, Options, Request
from quantool.plugins.keys import Depends, key_of
from quantool.records import Source, StagePlan, sha256_of
from quantool.runtime import process, toolchain
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import write_text, written

F16_MAX = 65504.0
GIB = 1 << 30
MOST_BYTES = 4.4  # a weight of a converted file: float32, and what a conversion may add
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


class GgufOptions(Options):
    """Options of every method that writes GGUF."""

    llama_cpp_path: Path | None = Field(None, description="llama.cpp checkout whose converter to use.")
    pre_tokenizer: str | None = Field(
        None,
        description="llama.cpp's name of the BPE pre-tokenizer, for a tokenizer whose hash it does not know; default: the "
        "name whose steps tokenizer.json has.",
    )
    add_space_prefix: bool | None = Field(
        None,
        description="SentencePiece only: whether llama.cpp puts a space before text after a special token. Default: as "
        "its converter has it, but false for a chat model whose tokenizer puts one before the first word only.",
    )
    model_name: str | None = Field(
        None, description="general.name and the start of file names; default: the source's."
    )
    max_shard_size: str = Field(
        "45G",
        description="Split files at this size of tensors, e.g. 20G (decimal, as llama-gguf-split counts).",
    )

    def split_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        number, unit = self.max_shard_size[:-1], self.max_shard_size[-1:].upper()
        if unit not in UNITS or not number.isdigit() or not int(number):
            raise ConfigError(f"max_shard_size {self.max_shard_size!r} is not a number with K, M or G")
        return int(number) * UNITS[unit]

    def base_split_bytes(self, source: Source) -> int:
        """Where the converter splits the unquantized file; 0 where that is smaller than a part in any case."""
        limit = self.split_bytes()
        return limit if MOST_BYTES * source.facts.parameters > limit else 0


def model_name(source: Source, options: GgufOptions) -> str:
    """``general.name``; refused where llama.cpp would change its behaviour by it (0c1e570, src/llama-vocab.cpp: phi-3)."""
    name = options.model_name or source.name
    if any(mark in name.lower() for mark in ("phi-3", "phi3")) and not source.facts.model_type.startswith(
        "phi3"
    ):
        raise ConfigError(
            f"a model named {name!r} gets Phi-3's token handling in llama.cpp, but it is {source.facts.architecture}",
            hint="set quantization_config.model_name to another name",
        )
    return name


def file_stem(source: Source, options: GgufOptions, size_label: str) -> str:
    """``BaseName-SizeLabel-FineTune-Version`` (docs/gguf.md of ggml, "GGUF naming convention").

    ``size_label`` is the converter's (``8x1.1M`` for experts), used where the name says none.
    """
    import gguf

    name = model_name(source, options)
    full, _, base, finetune, version, size = gguf.Metadata.get_model_id_components(
        name, source.facts.parameters
    )
    return str(gguf.naming_convention(full, base, finetune, version, size or size_label, None))


def metadata(source: Source, options: GgufOptions) -> dict[str, Any]:
    """Authorship and sampling keys that override what the converter would take (0c1e570, gguf-py/gguf/metadata.py)."""
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
    return found | {SAMPLING_KEYS[name]: value for name, value in source.sampling.items()}


def conversion(
    source: Source, options: GgufOptions, kind: str, tools: toolchain.Toolchain, override: Path
) -> dict[str, Any]:
    """What the converter's child needs besides the places to read and write."""
    write_text(override, json.dumps(metadata(source, options)))
    extra = {"quantool.version": __version__, **origin_keys(source)}
    if tools.commit:
        extra["quantool.llama_cpp.commit"] = tools.commit
    if lora.apart(source):
        lora.script_of(tools)  # the plan finds that it is missing
        extra[ADAPTER] = lora.adapter_file(model_name(source, options))
    return {
        "toolchain": str(tools.folder),
        "type": kind,
        "metadata": str(override),
        "folder_name": _folder_name(source),
        "pre_tokenizer": options.pre_tokenizer,
        "chat_template": source.facts.chat_template,
        "named_templates": source.facts.named_templates,
        "add_space_prefix": options.add_space_prefix,
        "pooling": gguf_pooling(source),
        "extra": extra,
        "split_bytes": options.base_split_bytes(source),
        "rehearse": False,
    }


def _folder_name(source: Source) -> str:
    """The name of the source's own folder, whatever folder of links it is read from: the converter guesses by it."""
    return source.commit or source.name


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


CODE = ("convert.py", "convert_ahead.py", "name_pre_tokenizer.py", "pooled.py", "pre_tokenizer.py")
"""Files of this folder that decide what is written."""
BASE = Depends(libraries=("numpy", "torch", "transformers", "tokenizers"))
"""A converted file; converter, names and options count by what ``recipe`` says of them."""


def base_key(source: Source, options: GgufOptions, kind: str) -> str:
    """The key of a converted file."""
    tools = toolchain.locate(options.llama_cpp_path)
    return key_of(BASE, source, recipe(source, options, tools, kind))


def recipe(source: Source, options: GgufOptions, tools: toolchain.Toolchain, kind: str) -> list[Any]:
    """Everything beside the checkpoint that decides the bytes of a converted file."""
    chosen = options.model_dump(include={"pre_tokenizer", "add_space_prefix"})
    chosen["max_shard_size"] = options.max_shard_size if options.base_split_bytes(source) else None
    code = [
        toolchain.fingerprint_of(tools),
        tools.commit,
        *(sha256_of(Path(__file__).with_name(name)) for name in CODE),
    ]
    keys = [*sorted(origin_keys(source)), gguf_pooling(source), *[ADAPTER] * bool(lora.apart(source))]
    templates = [source.facts.chat_template, source.facts.named_templates]
    return [metadata(source, options), _folder_name(source), keys, templates, chosen, code, kind]


def base(job: Job, options: GgufOptions, kind: str, progress: Progress) -> tuple[Path, str]:
    """The unquantized GGUF of the source (first shard) and its stage key; made once a run, kept for reruns."""
    source, workspace = job.plan.source, job.workspace
    key = base_key(source, options, kind)
    folder = workspace.work / f"base-{kind}"

    def produce() -> tuple[list[Path], dict[str, Any]]:
        tools = toolchain.locate(options.llama_cpp_path)
        with written(folder) as part, progress.bar(f"convert to {kind.upper()}", "B") as bar:
            part.mkdir()
            request = conversion(source, options, kind, tools, workspace.work / "metadata.json")
            prepared, model = lora.apart(source), source.folder
            if prepared is not None:
                model = lora.base_model(source, prepared, workspace.work / "unmerged")
                beside = part / lora.adapter_file(model_name(source, options))
                lora.convert(source, prepared, model, beside, tools, workspace.logs / "adapter.log")
            request |= {"model": str(model), "output": str(part / "base.gguf")}
            result = process.call(
                convert.convert,
                request,
                log=workspace.logs / "converter.log",
                bar=bar,
            )
            require_loadable(Path(result["files"][0]), workspace.logs / "converter.log")
            names = [Path(file).name for file in result["files"]]
        adapters = folder.glob(lora.adapter_file("*"))
        return [*(folder / name for name in names), *adapters], {"files": names}

    result = workspace.stage(f"base-{kind}", key, produce)
    return folder / result["files"][0], key


def is_converted(request: Request, options: GgufOptions, kind: str) -> bool:
    """Whether an earlier run left the converted file; not known while the weights have not been hashed."""
    source = request.source
    hashed = all(file.sha256 for file in source.files)
    return hashed and request.workspace.recall(f"base-{kind}", base_key(source, options, kind)) is not None


def base_stage(request: Request, kind: str, size: int, ram: int, options: GgufOptions) -> StagePlan:
    """The step that converts, which writes ``size`` bytes and takes ``ram`` at most."""
    return StagePlan(
        name=f"base-{kind}", writes=size, peak_ram=ram, done=is_converted(request, options, kind)
    )


def require_loadable(path: Path, log: Path) -> None:
    """Let llama.cpp load a file; QuantizationError with its reason when it does not."""
    process.call(quantize.probe, {"path": str(path), "vocabulary_only": False}, log=log)
