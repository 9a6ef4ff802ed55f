"""Artifacts that quantool did not make in this run: what a path holds, at which level."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from quantool.errors import ConfigError
from quantool.records import Artifact, FileRecord, sha256_of
from quantool.runtime.toolchain import prefer_own_gguf

if TYPE_CHECKING:
    from gguf import ReaderTensor

# docs/gguf.md of ggml: ...-<Encoding>[-00001-of-00009].gguf
ENCODING = re.compile(r"(?:^|[-._])(?P<level>[A-Za-z]{0,5}\d?[A-Za-z]*\d+(?:_[A-Za-z0-9]+)*)$")
RECORD = "quantool.json"
NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")  # common/download.cpp
SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<total>\d{5})$")


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
    shard = SHARD.search(file.stem)
    return not any(part in file.name for part in NO_MODELS) and (shard is None or int(shard["number"]) == 1)


def engine_for(asked: str | None, native: str) -> str:
    """The engine to judge with: what the artifact is made for, or vLLM in the place of transformers."""
    fitting = [native, "vllm"] if native == "transformers" else [native]
    if asked is not None and asked not in fitting:
        raise ConfigError(f"--engine {asked} cannot load this artifact; {' and '.join(fitting)} can")
    return asked or native


def artifact_of(path: Path, level: str | None = None) -> tuple[Artifact, str]:
    """The artifact at ``path`` and its engine: a GGUF file, the first shard of one, or a folder for transformers.

    The level is, unless given, the one of quantool.json beside the file or in the folder, else it is read from the
    name. Raises ConfigError for anything else, and for a GGUF file that is damaged or whose shards are not all there.
    """
    if path.suffix == ".gguf" and path.is_file():
        names = _shards(path)
        stem = SHARD.sub("", path.stem)
        return _artifact(
            path.parent, names, level or _recorded(path.parent, names) or _level(stem)
        ), "llama.cpp"
    if (path / "config.json").is_file():
        names = [name for name in _files(path) if not any(part.startswith(".") for part in Path(name).parts)]
        weights = [name for name in names if name.endswith(".safetensors")]
        return _artifact(path, names, level or _recorded(path, weights) or _level(path.name)), "transformers"
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
        made = [report["artifact"] for report in json.loads(record.read_bytes())["reports"]]
        levels = [str(one["level"]) for one in made if {*names} <= {file["name"] for file in one["files"]}]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{record} is damaged ({type(error).__name__}: {error})",
            hint="download it again, or remove it: levels are then read from names",
        ) from error
    return levels[0] if levels else None


def _shards(path: Path) -> list[str]:
    shard = SHARD.search(path.stem)
    if not shard:
        return [path.name]
    stem, total = path.stem[: shard.start()], int(shard["total"])
    if int(shard["number"]) != 1:
        raise ConfigError(
            f"{path.name} is not the first shard", hint=f"give {stem}-00001-of-{total:05d}.gguf"
        )
    names = [f"{stem}-{number:05d}-of-{total:05d}.gguf" for number in range(1, total + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ConfigError(f"{path.parent} lacks {', '.join(missing)}")
    return names


def _level(stem: str) -> str:
    matched = ENCODING.search(stem)
    if matched is None:
        raise ConfigError(f"no level can be read from the name {stem!r}", hint="say it: --level Q4_K_M")
    return matched["level"].upper()


def _artifact(folder: Path, names: list[str], level: str) -> Artifact:
    files = tuple(
        FileRecord(name=name, bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in names
    )
    return Artifact(
        output=f"given/{level}",
        method="given",
        level=level,
        folder=folder,
        files=files,
        bits_per_weight=_bits_per_weight(folder, names),
        seconds=0.0,
    )


def _bits_per_weight(folder: Path, names: list[str]) -> float:
    """Bits of tensor data per weight, from headers."""
    if names[0].endswith(".gguf"):
        tensors = [tensor for name in names for tensor in _tensors(folder / name)]
        if not tensors:
            raise ConfigError(f"{folder / names[0]} holds no tensors")
        return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
    from quantool.formats.safetensors import check_index

    found = check_index(folder).values()
    return 8 * sum(t.bytes for t in found) / sum(t.elements for t in found)


def judged_by(artifact: Artifact, engine: str, parameters: int) -> Artifact:
    """The artifact with its bits per weight counted by the reference's ``parameters``: packed weights hide their own."""
    if engine == "llama.cpp":
        return artifact
    from quantool.formats.safetensors import check_index

    data = sum(tensor.bytes for tensor in check_index(artifact.folder).values())
    return artifact.model_copy(update={"bits_per_weight": 8 * data / parameters})


def _tensors(path: Path) -> list[ReaderTensor]:
    prefer_own_gguf()
    from gguf import GGUFReader

    try:
        return GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # all that the reader knows of damage
        raise ConfigError(f"{path} is not a GGUF file, or a damaged one: {error}") from error
