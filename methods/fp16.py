"""The checkpoint in a 16 or 32 bit floating type, as GGUF or as safetensors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from quantool.formats.gguf_header import shard_names
from quantool.formats.safetensors_layout import Stored, as_stored, by_shard, encode_in_order, write_index
from quantool.ledger import TensorLine
from quantool.methods._artifacts import account as safetensors_account
from quantool.methods._artifacts.files import (
    checkpoint_folder,
    companions,
    copy_companions,
    finished,
    need_disk,
    relative_files,
)
from quantool.methods._llama_cpp import account as gguf_account
from quantool.methods._llama_cpp import base_file, dry_run
from quantool.methods._safetensors import cast
from quantool.methods._safetensors.cast import cast_tensors
from quantool.plugins.contract import Job, Outline, Request, method
from quantool.plugins.keys import Depends, key_of
from quantool.records import Artifact, OutputPlan, PlannedFile, Source, StagePlan
from quantool.runtime import process, toolchain
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import link_file
from quantool.source.shapes import check_config_shapes
from quantool.source.tensor_headers import headers

LEVELS = {
    "F16": "IEEE half precision; refused where weights overflow it",
    "BF16": "bfloat16",
    "F32": "single precision",
}


TENSORS = Depends(libraries=("numpy", "torch", "safetensors"))
"""An export as safetensors."""


class Options(base_file.GgufOptions):
    """``quantization_config`` of the method fp16."""

    format: Literal["gguf", "safetensors"] = Field("gguf", description="File format of the export.")


def levels() -> dict[str, str]:
    """The floating types."""
    return LEVELS


def outline(request: Request, options: Options) -> Outline:
    """Plan one export a level; sizes are exact in both formats."""
    options.split_bytes()
    if options.format == "safetensors":
        plans = tuple(_outline_safetensors(request, options, level) for level in request.levels)
        lines = {output.id: _safetensors_lines(request.source, output.level) for output in plans}
        return Outline(plans, lines=lines)
    drafts = [_outline_gguf(request, options, level) for level in request.levels]
    outputs, stages, notes, accounts = zip(*drafts, strict=True)
    lines = {output.id: account for output, account in zip(outputs, accounts, strict=True)}
    return Outline(
        outputs, stages, tuple(dict.fromkeys(note for remarks in notes for note in remarks)), lines
    )


def _outline_gguf(
    request: Request, options: Options, level: str
) -> tuple[OutputPlan, StagePlan, list[str], tuple[TensorLine, ...]]:
    source = request.source
    kind, _ = base_file.choose_type(source, level.lower())
    rehearsal = dry_run.rehearse(source, options, kind)
    types = {name: tensor.type for name, tensor in rehearsal.tensors.items()}
    sizes = dry_run.file_bytes(rehearsal, types, 0)
    names = shard_names(
        f"{base_file.file_stem(source, options, str(rehearsal.keys['general.size_label']))}-{level}.gguf",
        len(sizes),
    )
    stage = base_file.base_stage(request, kind, sum(sizes), dry_run.conversion_ram(rehearsal), options)
    output = OutputPlan(
        id=f"fp16/{level}",
        method="fp16",
        level=level,
        options=options.model_dump(mode="json"),
        engine="llama.cpp",
        repo=request.repo_id.rpartition("/")[2] if request.repo_id else f"{source.name}-GGUF",
        repo_id=request.repo_id,
        files=tuple(PlannedFile(name=n, bytes=b) for n, b in zip(names, sizes, strict=True)),
        bits_per_weight=dry_run.bits_per_weight(rehearsal, types),
        peak_ram=stage.peak_ram,
        gates=request.gates(level),
        needs=("base",),
        done=stage.done
        and request.workspace.recall(f"fp16/{level}", _gguf_key(source, options, kind, names)) is not None,
    )
    return output, stage, dry_run.notes(rehearsal, source), gguf_account.lines(source, rehearsal, types)


def _gguf_key(source: Source, options: Options, kind: str, names: list[str]) -> str:
    return key_of(base_file.BASE, source, base_file.base_key(source, options, kind), names)


def _shards(source: Source, level: str) -> dict[str, list[Stored]]:
    """What each shard of the export holds, in file order."""
    return {
        shard: cast_tensors(map(as_stored, tensors), level)
        for shard, tensors in by_shard(headers(source)).items()
    }


def _safetensors_lines(source: Source, level: str) -> tuple[TensorLine, ...]:
    stored = [tensor for tensors in _shards(source, level).values() for tensor in tensors]
    return safetensors_account.lines(headers(source), stored)


def _outline_safetensors(request: Request, options: Options, level: str) -> OutputPlan:
    source = request.source
    base_file.choose_type(source, level.lower())
    check_config_shapes(source, headers(source))
    shards = _shards(source, level)
    data = {name: sum(tensor.bytes for tensor in tensors) for name, tensors in shards.items()}
    files = [
        PlannedFile(name=name, bytes=len(encode_in_order(tensors)[0]) + data[name])
        for name, tensors in shards.items()
    ]
    files += companions(source)
    return OutputPlan(
        id=f"fp16/{level}-safetensors",
        method="fp16",
        level=level,
        options=options.model_dump(mode="json"),
        engine="transformers",
        repo=request.repo_id.rpartition("/")[2] if request.repo_id else f"{source.name}-{level}",
        repo_id=request.repo_id,
        files=tuple(files),
        bits_per_weight=8 * sum(data.values()) / source.facts.parameters,
        peak_ram=2 * source.facts.largest_tensor * 2 + base_file.GIB,
        gates=request.gates(level),
        done=all(file.sha256 for file in source.files)
        and request.workspace.recall(f"fp16/{level}-safetensors", _tensors_key(source, level)) is not None,
    )


def _tensors_key(source: Source, level: str) -> str:
    return key_of(TENSORS, source, level, source.sampling)


@method("fp16", options=Options, levels=levels, outline=outline, depends=base_file.BASE | TENSORS)
def quantize(job: Job, options: Options, progress: Progress) -> Artifact:
    """Export the source at one level."""
    export = _export_gguf if options.format == "gguf" else _export_safetensors
    return export(job, options, progress)


def _export_gguf(job: Job, options: Options, progress: Progress) -> Artifact:
    source, output = job.plan.source, job.output
    kind, _ = base_file.choose_type(source, output.level.lower())
    names = [file.name for file in output.files]
    key = _gguf_key(source, options, kind, names)
    if (kept := job.workspace.recall(output.id, key)) is not None:
        return Artifact.model_validate(kept)
    started = time.monotonic()
    base, _ = base_file.base(job, options, kind, progress)
    for number, name in enumerate(names):
        made = shard_names("base.gguf", len(names))[number]
        link_file(base.with_name(made), job.folder / name)
    return finished(job, key, names, started, {"converter": toolchain.locate(options.llama_cpp_path).origin})


def _export_safetensors(job: Job, options: Options, progress: Progress) -> Artifact:
    source, output = job.plan.source, job.output
    del options
    key = _tensors_key(source, output.level)
    if (kept := job.workspace.recall(output.id, key)) is not None:
        return Artifact.model_validate(kept)
    started = time.monotonic()
    need_disk(job.workspace, sum(file.bytes for file in output.files))
    shards = _shards(source, output.level)
    with checkpoint_folder(job) as part, progress.bar(f"export {output.level}", "B") as bar:
        request = {
            "source": str(source.folder),
            "target": str(part),
            "files": [*shards],
            "dtype": output.level,
        }
        log = job.workspace.logs / f"export-{output.level}.log"
        process.call(cast.cast, request, log=log, bar=bar)
        copy_companions(source, part)
        _write_config(source, part, output.level)
        write_index(part, shards)
        names = relative_files(part)
    return finished(job, key, names, started, {})


def _write_config(source: Source, folder: Path, level: str) -> None:
    """config.json with the new dtype, else the source's own."""
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[level]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
