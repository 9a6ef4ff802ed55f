"""Make one level: run the worker into a temporary folder, bring the companions, prove, rename, remember."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quantool.config.schema import Config
from quantool.formats.safetensors import TensorHeader
from quantool.formats.safetensors_layout import arrange
from quantool.methods._artifacts.files import (
    checkpoint_folder,
    copy_companions,
    finished,
    is_companion,
    relative_files,
)
from quantool.methods._compressed import autoawq, calibrate, stream, torchrun
from quantool.methods._compressed.fit.choose import WHOLE, FitScope, LayerChoice, choose, request_of
from quantool.methods._compressed.fit.measure import measure
from quantool.methods._compressed.layers import layers_of
from quantool.methods._compressed.mappings import decoder_of
from quantool.methods._compressed.mtp import carry
from quantool.methods._compressed.outline import (
    CALIBRATED,
    CompressedOptions,
    LevelTask,
    Recipe,
    task_key,
    task_of,
)
from quantool.methods._compressed.proof import verify
from quantool.methods._compressed.schemes import SUFFIX, WeightScheme
from quantool.methods._compressed.sizes import max_seq_length, split, workers
from quantool.plugins.contract import Draft, Job, Method, method
from quantool.records import Artifact, Source
from quantool.runtime import process
from quantool.runtime.gpus import devices
from quantool.runtime.progress import Progress, amount
from quantool.runtime.worker import Work
from quantool.source.mtp import head_tensors
from quantool.source.resolve import overlay
from quantool.source.tensor_headers import headers
from quantool.tasks import Task, TaskKind


def compressed_method(recipe: Recipe, options: type[CompressedOptions], outline: Draft) -> Method:
    """Register a method of the family: what it is made with and how it is made is the same for all."""

    def quantize(job: Job, chosen: Any, progress: Progress) -> Artifact:
        return make(recipe, job, chosen, progress)

    registered = method(
        recipe.method,
        options=options,
        levels=recipe.levels,
        outline=outline,
        needs=("llmcompressor",),
        extra="compressed",
        depends=CALIBRATED,
    )
    return registered(quantize)


def make(recipe: Recipe, job: Job, options: Any, progress: Progress) -> Artifact:
    """Make one level in its folder, or recall it."""
    output, workspace, config = job.output, job.workspace, job.config
    task = task_of(recipe, output.level, options, job.plan.source)
    key = task_key(task, config, options, job.plan.source)
    if (kept := workspace.recall(output.id, key)) is not None:
        return Artifact.model_validate(kept)
    started = time.monotonic()
    log = workspace.logs / f"{output.id.replace('/', '-')}.log"
    source = overlay(job.plan.source, workspace.work / "source")
    located = layers_of(source)
    with checkpoint_folder(job) as part:
        chosen: dict[str, Any] = {}
        if task.scope is not None:
            task, chosen = _choose(task, task.scope, job, options, source, key, progress)
        result = _recalled(task, job, options, part)
        if result is None:
            work, request = _work(task, job, options, source, part, progress)
            with progress.bar(f"quantize {output.id}", "layers" if task.calibrated else "B") as bar:
                variables = devices(config.device).variables()
                result = process.call(work, request, log=log, bar=bar, variables=variables)
            if task.carried:
                carry(source.folder, part, task.carried, task.kept)
        if task.autoawq:
            rewrite = _rewrite(task, source.facts.tied_embeddings, part)
            with progress.bar("AutoAWQ layout", "layers") as bar:
                process.call(autoawq.convert, rewrite, log=log, bar=bar)
        if task.calibrated:
            arrange(part, split(task.tensors(located)))
        copy_companions(source, part)
        verify(part, task.tensors(located), task.selection, streamed=not task.calibrated)
        names = relative_files(part)
    details = {"layers": len(task.selection.layers), "ignored": list(task.selection.left), **result, **chosen}
    bits = 8 * sum(tensor.bytes for tensor in task.tensors(located)) / source.facts.parameters
    return finished(job, key, names, started, details, bits_per_weight=bits)


def _choose(
    task: LevelTask, scope: FitScope, job: Job, options: Any, source: Source, key: str, progress: Progress
) -> tuple[LevelTask, dict[str, Any]]:
    """Measure what each group of layers costs, where that is not known yet, and choose; the details to record of it."""
    costs, located = job.workspace.work / f"fit-{key[:16]}.jsonl", layers_of(source)
    request = {
        "source": str(source.folder),
        "config": job.config.model_dump(mode="json"),
        "loader": loader(source.facts.task, located),
        "max_seq_length": max_seq_length(job.config),
        "device": devices(job.config.device).kind,
        "seed": job.plan.seed,
        "costs": str(costs),
        **request_of(scope),
    }
    log = job.workspace.logs / f"{job.output.id.replace('/', '-')}-measure.log"
    with progress.bar(f"measure layers for {job.output.id}", "measurements") as bar:
        found = process.call(
            measure, request, log=log, bar=bar, variables=devices(job.config.device).variables()
        )
    choice = choose(scope, costs)
    made = _fitted(task, located, choice)
    kinds = {layer.name: task.level for layer in made.selection.layers}
    kinds |= {name: scheme.preset for name, scheme in choice.others.items()}
    kinds |= dict.fromkeys(choice.whole, WHOLE)
    details = {
        "fit": options.fit.describe(),
        "schemes": {name.removesuffix(SUFFIX): kinds[name] for name in located if name in kinds},
        "predicted": choice.cost,
        "measured": {key: found[key] for key in ("tokens", "positions")},
    }
    return made, details


def _recalled(task: LevelTask, job: Job, options: Any, part: Path) -> dict[str, Any] | None:
    """Bring what the AutoAWQ layout is converted from, if the same level was made in the other layout; its details."""
    if not task.autoawq:
        return None
    sibling = replace(task, autoawq=False)
    plain = options.model_copy(update={"format": "compressed-tensors"})
    kept = job.workspace.recall(sibling.id, task_key(sibling, job.config, plain, job.plan.source))
    if kept is None:
        return None
    artifact = Artifact.model_validate(kept)
    names = [file.name for file in artifact.files]
    own = [name for name in names if not is_companion(name) or name == "recipe.yaml"]
    if not all((artifact.folder / name).is_file() for name in own):  # published and deleted since
        return None
    for name in own:
        shutil.copyfile(artifact.folder / name, part / name)
    return {key: artifact.details[key] for key in artifact.details.keys() - {"layers", "ignored"}}


def _work(
    task: LevelTask, job: Job, options: Any, source: Source, part: Path, progress: Progress
) -> tuple[Work, dict[str, Any]]:
    """The worker that makes the weights and its request."""
    request: dict[str, Any] = {
        "source": str(source.folder),
        "output": str(part),
        "scheme": asdict(task.scheme),
        "targets": list(task.selection.targets),
        "ignore": list(task.selection.ignore),
        "others": _groups(task),
        "device": devices(job.config.device).kind,
    }
    located = layers_of(source)
    if task.calibrated:
        plain = replace(task, autoawq=False)  # that layout is converted from this one
        fused = located.keys() != headers(source).keys()
        count = _processes(job.config, source, progress, fused=fused)
        return torchrun.quantize if count > 1 else calibrate.quantize, request | {
            "processes": count,
            "dtypes": {tensor.name: tensor.dtype for tensor in plain.tensors(located)},
            "fused": fused,
            "config": job.config.model_dump(mode="json"),
            "algorithm": task.recipe.algorithm,
            "architecture": decoder_of(source.facts.architecture),
            "loader": loader(source.facts.task, located),
            "options": options.model_dump(mode="json"),
            "max_seq_length": max_seq_length(job.config),
            "seed": job.plan.seed,
        }
    return stream.quantize, request | {
        "shards": sorted({tensor.file for tensor in located.values()}),
        "layers": [layer.name for layer in task.selection.layers],
        "head": list(head_tensors(located, source.facts.layers)),
        "workers": workers(options, located),
    }


def _processes(config: Config, source: Source, progress: Progress, *, fused: bool) -> int:
    """How many share the calibration samples: one for each GPU, if memory that processes share holds the weights.

    Experts that are ``fused`` in the checkpoint are calibrated by one: they are taken apart before, in its own memory.
    """
    count = min(len(devices(config.device).each()), config.sample_size)
    if count == 1:
        return 1
    if fused:
        progress.warn(f"calibration uses one of {count} GPUs: the experts of this checkpoint are fused")
        return 1
    weights = sum(file.bytes for file in source.files if file.name.endswith(".safetensors"))
    room = shutil.disk_usage(torchrun.SHARED_MEMORY).total
    if room < weights + torchrun.SPARE:
        progress.warn(
            f"calibration uses one of {count} GPUs: {torchrun.SHARED_MEMORY} has {amount(room, 'B')}, and the weights that "
            f"their processes share take {amount(weights, 'B')}"
        )
        return 1
    return count


def _fitted(task: LevelTask, located: Mapping[str, TensorHeader], choice: LayerChoice) -> LevelTask:
    """The level with what measuring chose: layers left whole are ignored by name, and so are targets with two schemes."""
    whole, chosen = set(choice.whole), task.selection
    layers = tuple(layer for layer in chosen.layers if layer.name not in whole)
    names = tuple(name.removesuffix(SUFFIX) for name in located if name in whole)
    own = tuple(layer.name.removesuffix(SUFFIX) for layer in layers if layer.name not in choice.others)
    selection = replace(
        chosen,
        layers=layers,
        left=(*chosen.left, *names),
        ignore=(*chosen.ignore, *names),
        # By class vLLM would find the first group for fused layers of the second (``find_matched_target``).
        targets=own if choice.others else chosen.targets,
    )
    return replace(task, selection=selection, others=choice.others)


def _groups(task: LevelTask) -> list[dict[str, Any]]:
    """Schemes beside the level's own with the modules that get them."""
    groups: dict[WeightScheme, list[str]] = {}
    for name, scheme in task.others.items():
        groups.setdefault(scheme, []).append(name.removesuffix(SUFFIX))
    return [{"scheme": asdict(scheme), "targets": names} for scheme, names in groups.items()]


def loader(task: Task, names: Iterable[str]) -> str:
    """The class of transformers whose tensors have the ``names`` of the checkpoint: an embedding model may have no head."""
    if task.kind in (TaskKind.RERANKING, TaskKind.CLASSIFICATION):
        return "AutoModelForSequenceClassification"
    headless = task.kind is TaskKind.EMBEDDING and not any(name.startswith("model.") for name in names)
    return "AutoModel" if headless else "AutoModelForCausalLM"


def _rewrite(task: LevelTask, tied: bool, part: Path) -> dict[str, Any]:
    """The request of the worker that converts to AutoAWQ's layout."""
    return {
        "folder": str(part),
        "layers": [layer.name.removesuffix(".weight") for layer in task.selection.layers],
        "ignore": sorted({*task.selection.left, *(["lm_head"] if tied else [])}),
        "group": task.scheme.group,
    }
