"""The checkpoint in a 16 or 32 bit floating type, as GGUF or as safetensors."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from quantool.methods._llama_cpp import base_file, dry_run
from quantool.methods._safetensors import cast
from quantool.methods._safetensors.cast import plan_header
from quantool.plugins.contract import Job, Outline, Request, method
from quantool.plugins.keys import Depends, key_of
from quantool.records import Artifact, OutputPlan, PlannedFile, Source, StagePlan
from quantool.runtime import process, toolchain
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import written
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
        return Outline(tuple(_outline_safetensors(request, options, level) for level in request.levels))
    drafts = [_outline_gguf(request, options, level) for level in request.levels]
    outputs, stages, notes = zip(*drafts, strict=True)
    return Outline(outputs, stages, tuple(dict.fromkeys(filter(None, notes))))


def _outline_gguf(request: Request, options: Options, level: str) -> tuple[OutputPlan, StagePlan, str]:
    source = request.source
    kind, _ = base_file.choose_type(source, level.lower())
    rehearsal = dry_run.rehearse(source, options, kind)
    types = {name: tensor.type for name, tensor in rehearsal.tensors.items()}
    sizes = dry_run.file_bytes(rehearsal, types, 0)
    names = base_file.shard_names(
        f"{base_file.file_stem(source, options, str(rehearsal.keys['general.size_label']))}-{level}.gguf",
        len(sizes),
    )
    hashed = all(file.sha256 for file in source.files)
    done = (
        hashed
        and request.workspace.recall(f"base-{kind}", base_file.base_key(source, options, kind)) is not None
    )
    stage = StagePlan(
        name=f"base-{kind}", writes=sum(sizes), peak_ram=base_file.export_ram(source), done=done
    )
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
        peak_ram=base_file.export_ram(source),
        gates=request.gates(level),
        needs=("base",),
        done=done
        and request.workspace.recall(f"fp16/{level}", _gguf_key(source, options, kind, names)) is not None,
    )
    return output, stage, dry_run.space_note(rehearsal)


def _gguf_key(source: Source, options: Options, kind: str, names: list[str]) -> str:
    return key_of(base_file.BASE, source, base_file.base_key(source, options, kind), names)


def _weights(source: Source) -> dict[str, dict[str, tuple[str, tuple[int, ...], int]]]:
    """Tensors of each shard: name to dtype, shape and bytes, in file order."""
    shards: dict[str, dict[str, tuple[str, tuple[int, ...], int]]] = {}
    for header in sorted(headers(source).values(), key=lambda h: (h.file, h.start)):
        shards.setdefault(header.file, {})[header.name] = (
            header.dtype,
            header.shape,
            header.end - header.start,
        )
    return shards


def _companions(source: Source) -> list[str]:
    """Everything a loader needs beside the weights; the index is written anew, the card is not ours to repeat."""
    return [
        file.name
        for file in source.files
        if not file.name.endswith((".safetensors", ".safetensors.index.json", ".md"))
        and not Path(file.name).name.startswith(".")
    ]


def _outline_safetensors(request: Request, options: Options, level: str) -> OutputPlan:
    source = request.source
    base_file.choose_type(source, level.lower())
    files, data_bytes = [], 0
    for name, tensors in _weights(source).items():
        header, data = plan_header(tensors, level)
        files.append(PlannedFile(name=name, bytes=len(header) + data))
        data_bytes += data
    return OutputPlan(
        id=f"fp16/{level}-safetensors",
        method="fp16",
        level=level,
        options=options.model_dump(mode="json"),
        engine="transformers",
        repo=request.repo_id.rpartition("/")[2] if request.repo_id else f"{source.name}-{level}",
        repo_id=request.repo_id,
        files=tuple(files),
        bits_per_weight=8 * data_bytes / source.facts.parameters,
        peak_ram=2 * source.facts.largest_tensor * 2 + base_file.GIB,
        gates=request.gates(level),
        done=request.workspace.recall(f"fp16/{level}-safetensors", _tensors_key(source, level)) is not None,
    )


def _tensors_key(source: Source, level: str) -> str:
    return key_of(TENSORS, source, level)


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
        made = base_file.shard_names("base.gguf", len(names))[number]
        base_file.place(base.with_name(made), job.folder / name)
    return _finish(job, key, names, started, {"converter": toolchain.locate(options.llama_cpp_path).origin})


def _export_safetensors(job: Job, options: Options, progress: Progress) -> Artifact:
    source, output = job.plan.source, job.output
    del options
    key = _tensors_key(source, output.level)
    if (kept := job.workspace.recall(output.id, key)) is not None:
        return Artifact.model_validate(kept)
    started = time.monotonic()
    base_file.need_disk(job.workspace.root, sum(file.bytes for file in output.files))
    names = [file.name for file in output.files]
    with written(job.folder) as part, progress.bar(f"export {output.level}", "B") as bar:
        part.mkdir(parents=True)
        request = {"source": str(source.folder), "target": str(part), "files": names, "dtype": output.level}
        log = job.workspace.logs / f"export-{output.level}.log"
        process.call(cast.cast, request, log=log, bar=bar)
        extra = _copy_companions(source, part, output.level)
        if len(names) > 1:
            extra.append(_write_index(source, part, output.level))
    return _finish(job, key, names + extra, started, {})


def _copy_companions(source: Source, folder: Path, level: str) -> list[str]:
    """Copy tokenizer, template and configuration; config.json gets the new dtype and nothing else."""
    names = _companions(source)
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            config = json.loads((source.folder / name).read_text(encoding="utf-8"))
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            config[key] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[level]
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(source.folder / name, target)
    return names


def _write_index(source: Source, folder: Path, level: str) -> str:
    name = "model.safetensors.index.json"
    shards = _weights(source)
    total = sum(plan_header(tensors, level)[1] for tensors in shards.values())
    names = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    (folder / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return name


def _finish(job: Job, key: str, names: list[str], started: float, details: dict[str, Any]) -> Artifact:
    artifact = Artifact(
        output=job.output.id,
        method="fp16",
        level=job.output.level,
        folder=job.folder,
        files=base_file.records(job.folder, names),
        bits_per_weight=job.output.bits_per_weight or 0.0,
        seconds=time.monotonic() - started,
        details=details,
        versions=job.versions(),
    )
    paths = [job.folder / name for name in names]
    job.workspace.keep(job.output.id, key, paths, artifact.model_dump(mode="json"))
    return artifact
