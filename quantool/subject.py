"""Artifacts that quantool did not make in this run: what a path holds, at which level."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from quantool.errors import ConfigError
from quantool.records import Artifact, FileRecord, sha256_of
from quantool.toolchain import prefer_own_gguf

if TYPE_CHECKING:
    from gguf import ReaderTensor

# docs/gguf.md of ggml: ...-<Encoding>[-00001-of-00009].gguf
ENCODING = re.compile(r"(?:^|[-._])(?P<level>[A-Za-z]{0,5}\d?[A-Za-z]*\d+(?:_[A-Za-z0-9]+)*)$")
SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<total>\d{5})$")


def artifact_of(path: Path, level: str | None = None) -> tuple[Artifact, str]:
    """The artifact at ``path`` and its engine: a GGUF file, the first shard of one, or a folder for transformers.

    The level is read from the file name (GGUF) or the folder's name unless given. Raises ConfigError for anything
    else, and for a GGUF file that is damaged or whose shards are not all there.
    """
    if path.suffix == ".gguf" and path.is_file():
        names = _shards(path)
        stem = SHARD.sub("", path.stem)
        return _artifact(path.parent, names, level or _level(stem)), "llama.cpp"
    if (path / "config.json").is_file():
        names = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
        return _artifact(path, names, level or _level(path.name)), "transformers"
    if path.is_dir() and (found := sorted(path.glob("*.gguf"))):
        listed = ", ".join(file.name for file in found)
        raise ConfigError(f"{path} is no artifact but holds {listed}", hint="name one of the files")
    raise ConfigError(
        f"{path} is no artifact" if path.exists() else f"{path} does not exist",
        hint="give a .gguf file, or a folder with config.json and safetensors",
    )


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
    from quantool.weights import check_index

    found = check_index(folder).values()
    return 8 * sum(t.bytes for t in found) / sum(t.elements for t in found)


def judged_by(artifact: Artifact, engine: str, parameters: int) -> Artifact:
    """The artifact with its bits per weight counted by the reference's ``parameters``: packed weights hide their own."""
    if engine == "llama.cpp":
        return artifact
    from quantool.weights import check_index

    data = sum(tensor.bytes for tensor in check_index(artifact.folder).values())
    return artifact.model_copy(update={"bits_per_weight": 8 * data / parameters})


def _tensors(path: Path) -> list[ReaderTensor]:
    prefer_own_gguf()
    from gguf import GGUFReader

    try:
        return GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # all that the reader knows of damage
        raise ConfigError(f"{path} is not a GGUF file, or a damaged one: {error}") from error
