"""A quantized checkpoint, or a base and its adapter, as an ordinary checkpoint: sketched for a plan, written for a run.

A sketch is a folder in the user cache with the small files as they will be; the weights are known by their headers alone. A
run writes the weights beside them into ``work/`` of its output folder, once, for everything that is made after.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import INDEX, TensorHeader, check_index, read_header, remote_headers, some
from quantool.formats.safetensors_layout import encode_in_order, index_bytes
from quantool.hub.download import hub_errors
from quantool.ledger import MTP
from quantool.origins import Origin, Prepared, SourceFile
from quantool.records import Source, file_record, fingerprint
from quantool.runtime import process, toolchain
from quantool.runtime.progress import Progress
from quantool.runtime.versions import version_of
from quantool.runtime.workspace import Workspace, written
from quantool.source.adapter import WEIGHTS
from quantool.source.mtp import without_promise
from quantool.source.quantized import SETTINGS
from quantool.source.rewrite import Preparation, preparation_of, rewrite

STAGE = "prepared"
PEAK = 1 << 30
"""Bytes of memory that preparing takes: a slice of a weight in float32 a few times over, and the libraries."""


def sketch(
    source: Source,
    preparation: Preparation,
    origins: tuple[Origin, Origin | None],
    places: Mapping[str, Path],
    *,
    apart: bool = False,
) -> Source:
    """``source`` as ``preparation`` makes it of the ``origins`` (model and adapter): its folder holds all but the weights.

    ``places`` are the folders of its small files by their names; config.json and the index are written anew. ``apart``: the
    adapter stays a file of its own.
    """
    prepared = Prepared(
        origin=origins[0],
        form=preparation.unpacking.form if preparation.unpacking is not None else "",
        adapter=origins[1],
        merged=preparation.adapter.described() if preparation.adapter is not None else "",
        apart=apart,
    )
    places = {name: folder for name, folder in places.items() if name not in ("config.json", INDEX)}
    shards = preparation.shards()
    texts = {"config.json": _config(prepared.origin.folder, headless=MTP in source.absent)}
    if len(shards) > 1:
        texts[INDEX] = index_bytes(shards).decode()
    hashes = {file.name: file.sha256 for file in source.files if file.name in places}
    folder = toolchain.cache_folder() / "sketches" / fingerprint(hashes, texts)[:32]
    _write_sketch(folder, places, texts)
    small = [file_record(folder, name) for name in sorted([*places, *texts])]
    weights = {
        name: len(encode_in_order(stored)[0]) + sum(tensor.bytes for tensor in stored)
        for name, stored in sorted(shards.items())
    }
    return source.model_copy(
        update={
            "folder": folder,
            "tokenizer": None,
            "files": (
                *(SourceFile(**file.model_dump()) for file in small),
                *(SourceFile(name=name, bytes=size) for name, size in weights.items()),
            ),
            "prepared": prepared,
            "notes": (*source.notes, prepared.described(), *_dropped(preparation)),
        }
    )


def _write_sketch(
    folder: Path, places: Mapping[str, Path], texts: Mapping[str, str], *, linked: bool = False
) -> None:
    """Copies of the files in ``places``, or links, and ``texts`` beside them, unless they are there; runs side by side take turns."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        with written(folder) as part:
            for name, place in places.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                if linked:
                    (part / name).symlink_to(place / name)
                else:
                    shutil.copyfile(place / name, part / name)
            for name, text in texts.items():
                (part / name).write_text(text, encoding="utf-8")


def _dropped(preparation: Preparation) -> list[str]:
    """What of a quantized checkpoint becomes no weight."""
    if preparation.unpacking is None or not preparation.unpacking.dropped:
        return []
    names = [tensor.name for tensor in preparation.unpacking.dropped]
    return [
        f"{len(names)} scales of activations or caches are left out, full precision has no use for them: {some(names, 2)}"
    ]


def restated(source: Source, places: Mapping[str, Path]) -> Source:
    """``source`` in a folder of links, but for a config.json that does not promise the parts that the weights lack.

    ``places`` are the folders of its small files by their names. Weights are linked whether they are fetched or not.
    """
    text = _config(source.folder, headless=True)
    linked = {file.name: places.get(file.name, source.folder) for file in source.files}
    del linked["config.json"]
    key = fingerprint({name: str(folder) for name, folder in linked.items()}, text)
    folder = toolchain.cache_folder() / "sketches" / key[:32]
    _write_sketch(folder, linked, {"config.json": text}, linked=True)
    own = SourceFile(**file_record(folder, "config.json").model_dump())
    files = tuple(own if file.name == own.name else file for file in source.files)
    note = f"{source.absent[0]} left out: config.json promises it, the weights have none; what is made promises none"
    return source.model_copy(update={"folder": folder, "files": files, "notes": (*source.notes, note)})


def _config(folder: Path, *, headless: bool = False) -> str:
    """config.json without its quantization, and where ``headless`` without the promise of a head."""
    config = read_json(folder / "config.json")
    if headless:
        config = without_promise(config)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop(SETTINGS, None)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def found_headers(origin: Origin) -> dict[str, TensorHeader]:
    """The headers of a checkpoint or adapter as it was found, read from its files or by range requests."""
    sizes = {file.name: file.bytes for file in origin.files if file.name.endswith(".safetensors")}
    if origin.commit is None or all((origin.folder / name).exists() for name in sizes):
        if WEIGHTS in sizes:
            return {tensor.name: tensor for tensor in read_header(origin.folder / WEIGHTS)}
        return check_index(origin.folder)
    return committed_headers(origin.model_id, origin.commit, tuple(sizes.items()))


def committed_headers(repo: str, commit: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, TensorHeader]:
    """The headers of files (name and bytes) of a commit on the Hub, by range requests; asked once."""
    return {**_remote(repo, commit, sizes)}


@lru_cache(maxsize=4)
def _remote(repo: str, commit: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, TensorHeader]:
    """A commit never changes, and every method asks."""
    with hub_errors(repo, commit):
        return remote_headers(repo, commit, dict(sizes))


def preparation_for(prepared: Prepared) -> Preparation:
    """The preparation that a prepared source is made by, from the headers of its origins."""
    return _preparation(prepared, fingerprint(prepared.identity()))


@lru_cache(maxsize=2)
def _preparation(prepared: Prepared, _identity: str) -> Preparation:
    """Every method asks; of a hundred thousand tensors it takes seconds."""
    adapter = prepared.adapter
    parts = (adapter.folder, found_headers(adapter)) if adapter is not None else None
    return preparation_of(prepared.origin.folder, found_headers(prepared.origin), parts)


def to_fetch(source: Source) -> int:
    """Bytes of weights that are not on this machine."""
    places = [(source.folder, source.files)]
    if source.prepared is not None:
        origins = (source.prepared.origin, source.prepared.adapter)
        places = [(origin.folder, origin.files) for origin in origins if origin is not None]
    return sum(file.bytes for folder, files in places for file in files if not (folder / file.name).exists())


def is_prepared(source: Source) -> bool:
    """Whether the weights lie in the source's folder; they do for one that needs no preparation."""
    return source.prepared is None or all((source.folder / file.name).exists() for file in source.files)


def recall(source: Source, workspace: Workspace) -> Source:
    """The source in the folder that an earlier run prepared; as it is when there is none."""
    if source.prepared is None or workspace.recall(STAGE, _key(source)) is None:
        return source
    return source.model_copy(update={"folder": workspace.work / STAGE})


def forget(workspace: Workspace) -> None:
    """Let the weights be prepared again, whatever their sizes and times say."""
    workspace.forget(STAGE)


def prepare(source: Source, workspace: Workspace, progress: Progress) -> Source:
    """The source with its weights, written unless an earlier run has; the same source when there is nothing to prepare.

    Raises SourceError for values that the target cannot hold, and for merged weights that are not base and adapter.
    """
    prepared = source.prepared
    if prepared is None:
        return source
    folder = workspace.work / STAGE

    def produce() -> tuple[list[Path], dict[str, Any]]:
        with written(folder) as part, progress.bar(_title(prepared), "B") as bar:
            shutil.copytree(source.folder, part)
            request: Mapping[str, Any] = {
                "folder": str(prepared.origin.folder),
                "target": str(part),
                "adapter": str(prepared.adapter.folder) if prepared.adapter is not None else None,
            }
            result = process.call(
                rewrite, dict(request), log=workspace.logs / "prepare.log", bar=bar, failure=SourceError
            )
        return [folder / file.name for file in source.files], result

    workspace.stage(STAGE, _key(source), produce)
    return source.model_copy(update={"folder": folder})


def _title(prepared: Prepared) -> str:
    return "merge the adapter" if prepared.adapter is not None else "dequantize"


def _key(source: Source) -> str:
    if source.prepared is None:
        raise AssertionError
    small = [[file.name, file.bytes, file.sha256] for file in source.files]
    versions = [version_of(name) for name in ("quantool", "torch", "safetensors")]
    return fingerprint(source.prepared.identity(), small, versions)
