"""Artifacts that quantool did not make in this run: what a path holds, at which level."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from quantool.config.load import load
from quantool.config.schema import Config
from quantool.errors import ConfigError, SourceError
from quantool.formats.gguf_header import SHARD, SIDECARS, GgufTensor, read_shards
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import TensorHeader, check_index
from quantool.plugins import find
from quantool.records import Artifact, file_record

# docs/gguf.md of ggml: ...-<Encoding>[-00001-of-00009].gguf
ENCODING = re.compile(r"(?:^|[-._])(?P<level>[A-Za-z]{0,5}\d?[A-Za-z]*\d+(?:_[A-Za-z0-9]+)*)$")
RECORD = "quantool.json"
MOST_TEXT = 200
"""Characters of a reader's words that a message repeats."""


def artifacts_of(path: Path, level: str | None = None) -> list[tuple[Artifact, str]]:
    """Every artifact at ``path`` with its engine: one, or all GGUF models of a folder, as of a downloaded repository.

    A level is what is said, else what quantool.json beside the files has recorded, else read from the name. Raises
    ConfigError as ``artifact_of`` does, and for one ``level`` said of several.
    """
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return [artifact_of(path, level)]
    found = [file for file in sorted(path.glob("*.gguf")) if _is_model(file)]
    if not found:
        return [artifact_of(path, level)]
    if level is not None and len(found) > 1:
        listed = ", ".join(file.name for file in found)
        raise ConfigError(
            f"--level {level} is one level, but {path} holds {listed}", hint="name one of the files"
        )
    return [artifact_of(file, level) for file in found]


def _is_model(file: Path) -> bool:
    """As llama.cpp's common/download.cpp has it; of a model in shards, the first stands for all."""
    shard = SHARD.match(file.name)
    return not any(mark in file.name for mark in SIDECARS) and (shard is None or int(shard["number"]) == 1)


def engine_for(wanted: str | None, native: str) -> str:
    """The engine to judge with: what the artifact is made for, or vLLM in the place of transformers."""
    fitting = [native, "vllm"] if native == "transformers" else [native]
    if wanted is not None and wanted not in fitting:
        raise ConfigError(f"--engine {wanted} cannot load this artifact; {' and '.join(fitting)} can")
    return wanted or native


def artifact_of(path: Path, level: str | None = None) -> tuple[Artifact, str]:
    """The artifact at ``path`` and its engine: a GGUF file, the first shard of one, or a folder for transformers.

    The level is, unless given, the one of quantool.json beside the file or in the folder, else it is read from the
    name. Raises ConfigError for anything else, SourceError for a GGUF that is damaged or whose shards are not all there.
    """
    if path.suffix == ".gguf" and path.is_file():
        headers = read_shards(path)
        names = [header.path.name for header in headers]
        tensors = [tensor for header in headers for tensor in header.tensors]
        shard = SHARD.match(path.name)
        level = level or _recorded(path.parent, names) or _level(shard["stem"] if shard else path.stem)
        return _artifact(path.parent, names, level, _bits_per_weight(path, tensors)), "llama.cpp"
    if (path / "config.json").is_file():
        names = [name for name in _files(path) if not any(part.startswith(".") for part in Path(name).parts)]
        weights = [name for name in names if name.endswith(".safetensors")]
        level = level or _recorded(path, weights) or _level(path.name)
        return _artifact(
            path, names, level, _bits_per_weight(path, check_index(path).values())
        ), "transformers"
    raise ConfigError(
        f"{path} is no artifact" if path.exists() else f"{path} does not exist",
        hint="give a .gguf file, a folder with .gguf files, or one with config.json and safetensors",
    )


def _files(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]


def _recorded(folder: Path, names: list[str]) -> str | None:
    """The level that quantool.json of a published folder has for these files; None without one that names them."""
    record = folder / RECORD
    if not record.is_file():
        return None
    try:
        made = [report["artifact"] for report in read_json(record)["reports"]]
        levels = [
            str(artifact["level"])
            for artifact in made
            if {*names} <= {file["name"] for file in artifact["files"]}
        ]
    except (SourceError, ValueError, LookupError, TypeError, AttributeError) as error:
        unread = isinstance(error, SourceError)  # it names the file
        reason = str(error).removeprefix(f"{record}: ") if unread else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{record} is damaged ({reason[:MOST_TEXT]})",
            hint="download it again, or remove it: levels are then read from names",
        ) from error
    return levels[0] if levels else None


def _level(stem: str) -> str:
    matched = ENCODING.search(stem)
    if matched is None:
        raise ConfigError(f"no level can be read from the name {stem!r}", hint="say it: --level Q4_K_M")
    return matched["level"].upper()


def _artifact(folder: Path, names: list[str], level: str, bits: float) -> Artifact:
    return Artifact(
        output=f"given/{level}",
        method="given",
        level=level,
        folder=folder,
        files=tuple(file_record(folder, name) for name in names),
        bits_per_weight=bits,
        seconds=0.0,
    )


def _bits_per_weight(path: Path, tensors: Collection[GgufTensor | TensorHeader]) -> float:
    """Bits of tensor data per weight."""
    if not tensors:
        raise SourceError(f"{path} holds no tensors")
    return 8 * sum(tensor.bytes for tensor in tensors) / sum(tensor.elements for tensor in tensors)


def judged_by(artifact: Artifact, engine: str, parameters: int) -> Artifact:
    """The artifact with its bits per weight counted by the reference's ``parameters``: packed weights hide their own."""
    if engine == "llama.cpp":
        return artifact
    data = sum(tensor.bytes for tensor in check_index(artifact.folder).values())
    return artifact.model_copy(update={"bits_per_weight": 8 * data / parameters})


def settings_for(config: Path | None, overrides: list[str] | None, reference: str, output: Path) -> Config:
    """The configuration to judge with: the sections of ``config`` about judging, on ``reference`` and ``output``."""
    if config is None:
        if overrides:
            raise ConfigError("--set changes a configuration, but none is given", hint="add --config FILE")
        return Config(model_id=reference, output_path=output)
    loaded = load(config, overrides or (), find).config
    return loaded.model_copy(update={"model_id": reference, "revision": None, "output_path": output})
