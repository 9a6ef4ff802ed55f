"""What AWQ, FP8, GPTQ and SmoothQuant share: planning from headers, running a worker, and proof from saved headers.

Every level makes one folder in the layout of compressed-tensors (or AutoAWQ) that transformers and vLLM load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from quantool.config.schema import Config
from quantool.errors import ConfigError, DependencyError, SourceError
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import INDEX, TensorHeader
from quantool.formats.safetensors_layout import Stored, as_stored, by_shard, file_size, index_bytes
from quantool.gates import MIN_EXPERT_TOKENS
from quantool.ledger import TensorLine
from quantool.methods._artifacts import account
from quantool.methods._artifacts.files import companions
from quantool.methods._compressed import autoawq as _autoawq
from quantool.methods._compressed import cost
from quantool.methods._compressed.fit.budget import Fit
from quantool.methods._compressed.fit.choose import FitScope, refuse_combination, scope_of
from quantool.methods._compressed.fit.measure import KEPT_BYTES
from quantool.methods._compressed.layers import joined_lines, layers_of
from quantool.methods._compressed.mappings import check, decoder_of
from quantool.methods._compressed.mtp import Treatment, kept_patterns
from quantool.methods._compressed.schemes import (
    FLOATS,
    Pattern,
    Selection,
    WeightScheme,
    check_fusion,
    check_shapes,
    planned,
    select,
)
from quantool.methods._compressed.sizes import max_seq_length, split, workers
from quantool.methods._compressed.stream import SLICE
from quantool.plugins.contract import Options, Outline, Request
from quantool.plugins.keys import Depends, key_of
from quantool.records import OutputPlan, PlannedFile, Source
from quantool.runtime.gpus import capabilities, devices
from quantool.source.experts import coverage_note
from quantool.source.mtp import head_tensors
from quantool.source.shapes import check_config_shapes
from quantool.source.tensor_headers import headers
from quantool.texts import corpus, inputs

STREAMED = Depends(
    fields=("device",),
    libraries=("llmcompressor", "compressed-tensors", "torch", "transformers"),
    without=("workers",),
)
"""A level that is rounded from the files alone."""
CALIBRATED = STREAMED | Depends(
    fields=("sample_size", "shuffle", "dataset_seed", "calibration_config", "seed"),
    inputs=(inputs.calibration_by_name,),
    libraries=("datasets", "tokenizers"),
)
"""A level that is made on calibration text."""
GIB = 1 << 30
CONFIG_GROWTH = 1300
"""About what quantization_config adds to config.json, bytes."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(_listed)]


class CompressedOptions(Options):
    """Options that all methods of this family have."""

    targets: Patterns = Field(
        ("Linear",),
        min_length=1,
        description="Layers to quantize: Linear for all linear layers, names, or patterns that start with re:.",
    )
    ignore: Patterns | None = Field(
        None,
        description="Layers to leave alone, as names or re: patterns. Default: lm_head and a classifier's head. Routers of experts always are.",
    )
    mtp: Treatment = Field(
        "keep",
        description="A multi-token-prediction head: keep it as the source has it, or quantize it (levels without calibration).",
    )
    fit: Fit | None = Field(
        None,
        description="A budget (size: 24GB, or bpw: 5.2) under which measuring picks the layers that keep 16 bits, or get 8"
        " bits at 4-bit levels; needs calibration text.",
    )
    calibrate_all_experts: bool = Field(
        True,
        description="Send the calibration text through every expert of a mixture, wherever the router sends it.",
    )


@dataclass(frozen=True)
class Recipe:
    """One method of the family. ``label`` stands in folder names; ``algorithm`` is ``_calibrated``'s."""

    method: str
    label: str
    algorithm: Literal["rtn", "awq", "gptq"]
    schemes: Mapping[str, WeightScheme]

    def levels(self) -> dict[str, str]:
        """Level to one line of description."""
        return {level: scheme.summary for level, scheme in self.schemes.items()}


@dataclass(frozen=True)
class LevelTask:
    """One level, decided: everything that its bytes depend on besides the source and the calibration text."""

    recipe: Recipe
    level: str
    scheme: WeightScheme
    selection: Selection
    calibrated: bool
    autoawq: bool = False
    kv_cache: tuple[int, ...] = ()
    """Shape of a k_scale and v_scale of each layer, for an attention cache in FP8; empty: there are none."""
    carried: tuple[str, ...] = ()
    """Tensors of a multi-token-prediction head, which calibration does not see."""
    kept: tuple[str, ...] = ()
    """Patterns of the head's modules that are not quantized."""
    scope: FitScope | None = None
    """What may be chosen, where layers are chosen by measuring."""
    others: Mapping[str, WeightScheme] = field(default_factory=dict)
    """Layers, by the names of their weights, that measuring gave another scheme than the level's."""

    @property
    def id(self) -> str:
        """``awq/W4A16``; one level can be made in both layouts, and with layers chosen by measuring."""
        kind = "-fit" if self.scope is not None else "-autoawq" if self.autoawq else ""
        return f"{self.recipe.method}/{self.level}{kind}"

    def tensors(self, located: Mapping[str, TensorHeader]) -> list[Stored]:
        """All tensors of the checkpoint to be."""
        stored = planned(located, self.selection, self.scheme, self.others)
        if self.autoawq:
            chosen = {layer.name for layer in self.selection.layers}
            stored = [as_stored(t) for t in located.values() if t.name not in chosen]
            for layer in self.selection.layers:
                stored += _autoawq.tensors(layer, self.scheme.group)
        if self.kv_cache:
            for name, tensor in located.items():
                if name.endswith(".k_proj.weight") and name not in self.carried:
                    module = name.removesuffix(".k_proj.weight")
                    stored += [Stored(f"{module}.{part}_scale", tensor.dtype, self.kv_cache) for part in "kv"]
        return stored


def repo_name(source: str, recipe: Recipe, level: str, *, autoawq: bool = False, fitted: bool = False) -> str:
    """Folder name as vendors name such repositories: ``X-FP8-dynamic``, ``X-AWQ-W4A16-ASYM``; ``fitted``: and ``-fit``."""
    kind = "-fit" if fitted else ""
    if recipe.label == "FP8":
        return "-".join((source, "FP8", *level.lower().split("_")[1:])) + kind
    return f"{source}-{recipe.label}-{level.replace('_', '-')}{'-AutoAWQ' if autoawq else ''}{kind}"


def task_of(recipe: Recipe, level: str, options: Any, source: Source) -> LevelTask:
    """Decide one level; raises what makes it impossible."""
    located = layers_of(source)
    scheme = recipe.schemes[level].grouped(getattr(options, "group_size", 128))
    _check_source(source, located)
    wanted = getattr(options, "kv_cache", None)
    heads = (source.facts.kv_heads, 1, 1)
    cache: tuple[int, ...] = () if wanted is None else heads if wanted == "fp8_head" else (1,)
    calibrated = scheme.calibrated or bool(cache)
    kept = kept_patterns(source, located, options.mtp, calibrated=calibrated)
    selection = select(located, options.targets, options.ignore, tied=source.facts.tied_embeddings, kept=kept)
    check_shapes(selection, scheme)
    check_fusion(selection, scheme)
    _check_loadable(level, scheme, located)
    if cache and not any(name.endswith(".k_proj.weight") for name in located):
        raise SourceError(
            f"kv_cache: {wanted} needs attention layers with a k_proj, and this checkpoint has none"
        )
    autoawq = getattr(options, "format", None) == "autoawq"
    if options.fit is not None:
        refuse_combination(source.facts.task, autoawq=autoawq)
    if autoawq:
        _autoawq.refuse(level, scheme, selection, source)
    head = head_tensors(located, source.facts.layers) if calibrated else ()
    scope = None if options.fit is None else scope_of(options.fit, level, scheme, selection, located)
    return LevelTask(recipe, level, scheme, selection, calibrated, autoawq, cache, head, kept, scope)


def _check_loadable(level: str, scheme: WeightScheme, located: Mapping[str, TensorHeader]) -> None:
    """SourceError for whole integers beside experts: transformers joins experts of FP8 or of packed integers alone."""
    if scheme.stored == "I8" and (experts := [name for name in located if ".experts." in name]):
        raise SourceError(
            f"{level} cannot be judged: transformers {version('transformers')} joins no experts ({experts[0]} …) of a "
            "model whose weights are 8-bit integers",
            hint="fp8 (FP8_DYNAMIC) takes as much room; awq W8A16 keeps 8-bit integers, with activations as they are",
        )


def _check_source(source: Source, located: Mapping[str, TensorHeader]) -> None:
    if not source.facts.architecture.endswith("ForCausalLM") and source.facts.task.generates:
        raise SourceError(
            f"architecture {source.facts.architecture} is not supported",
            hint="text models (…ForCausalLM), embedding models, classifiers and rerankers are; of others the method gguf"
            " makes a text-only file, with drop: [vision]",
        )
    odd = [
        tensor for tensor in located.values() if tensor.name.endswith("weight") and tensor.dtype not in FLOATS
    ]
    if odd:
        raise SourceError(
            f"the checkpoint is already quantized: {odd[0].name} is {odd[0].dtype}",
            hint="start from the bf16 one",
        )
    check_config_shapes(source, located)


def outline(
    recipe: Recipe,
    request: Request,
    options: Any,
    *,
    registries: Sequence[tuple[str, str]] = (),
    warnings: Sequence[str] = (),
) -> Outline:
    """Plan every level: exact file sizes where the layout is ours, memory, and all that can be refused now.

    ``registries`` are llmcompressor's lists of smoothing mappings, for methods that smooth.
    """
    source, config = request.source, request.config
    if not request.levels:
        raise ConfigError(
            "fit chooses layers of a level, and quant_level names none", hint=", ".join(recipe.schemes)
        )
    tasks = [task_of(recipe, level, options, source) for level in request.levels]
    if "group_size" in options.model_fields_set and not any(task.scheme.group for task in tasks):
        levels = ", ".join(task.level for task in tasks)
        raise ConfigError(f"quantization_config.group_size means nothing to {levels}", hint="drop it")
    calibrated = any(task.calibrated for task in tasks)
    asking = [task for task in tasks if task.calibrated or task.scope is not None]
    if "calibrate_all_experts" in options.model_fields_set and not calibrated:
        raise ConfigError(
            "quantization_config.calibrate_all_experts means nothing without calibration", hint="drop it"
        )
    located = layers_of(source)
    if registries:
        modules = sorted({name.rpartition(".")[0] for name in located})
        check(options.mappings, decoder_of(source.facts.architecture), modules, registries)
    if asking and corpus.calibration_corpus(config) is None:
        levels = ", ".join(task.level + " with fit" * (task.scope is not None) for task in asking)
        raise ConfigError(
            f"{recipe.method} {levels} needs calibration text, and the configuration names none",
            hint="set dataset_path (a .txt, .jsonl or .parquet file) or dataset_id",
        )
    if devices(config.device).kind == "cuda" and not capabilities():
        raise DependencyError(
            "device: cuda is asked for, but this machine has no CUDA device",
            hint="set device: auto, or run where there is one",
        )
    outputs = [_output(task, request, options, located) for task in tasks]
    coverage = [] if options.calibrate_all_experts or not calibrated else _coverage(request)
    notes = [
        *warnings,
        *coverage,
        *(note for task in tasks for note in (*task.selection.warnings, *_loading(task))),
    ]
    lines = {output.id: _lines(task, source, located) for output, task in zip(outputs, tasks, strict=True)}
    return Outline(tuple(outputs), warnings=tuple(dict.fromkeys(notes)), lines=lines)


def _lines(task: LevelTask, source: Source, located: Mapping[str, TensorHeader]) -> tuple[TensorLine, ...]:
    """What becomes of each tensor; calibrated levels are saved by transformers."""
    chosen = [layer.name for layer in task.selection.layers]
    absent = account.not_saved(located, chosen, tied=source.facts.tied_embeddings) if task.calibrated else {}
    stored = task.tensors(located)
    found = account.lines(located, stored, chosen, absent, scaled=task.calibrated, carried=task.carried)
    return joined_lines(found, headers(source))


def _coverage(request: Request) -> list[str]:
    """A warning when too little text is asked for to reach all experts."""
    config, least = request.config, request.gates(request.levels[0]).min_expert_tokens
    model = read_json(request.source.folder / "config.json")
    return coverage_note(model, config.sample_size * max_seq_length(config), least or MIN_EXPERT_TOKENS)


def _loading(task: LevelTask) -> Iterator[str]:
    """What the installed transformers cannot load, although vLLM can."""
    experts = any(".experts." in layer.name for layer in task.selection.layers)
    if task.autoawq:
        yield (
            "transformers loads the AutoAWQ layout through AutoAWQ only, which is archived; vLLM, TGI and LMDeploy read "
            "it, and it is judged with its weights unpacked"
        )
    elif experts and task.scheme.stored == "I32" and not task.scheme.symmetric:
        yield (
            f"transformers {version('transformers')} cannot load packed experts with zero points; vLLM can, and "
            f"{task.level} is judged with its weights unpacked"
        )


def _output(
    task: LevelTask, request: Request, options: Any, located: Mapping[str, TensorHeader]
) -> OutputPlan:
    source, repo_id = request.source, request.repo_id
    tensors = task.tensors(located)
    data = task.scope.data if task.scope is not None else sum(tensor.bytes for tensor in tensors)
    hashed = all(file.sha256 for file in source.files)  # before that it has another key
    name = repo_name(
        source.name, task.recipe, task.level, autoawq=task.autoawq, fitted=task.scope is not None
    )
    work = cost.operations(task.recipe.algorithm, request.config, source) if task.calibrated else 0.0
    work += 0.0 if task.scope is None else task.scope.operations(source.facts.parameters)
    return OutputPlan(
        id=task.id,
        method=task.recipe.method,
        level=task.level,
        options=options.model_dump(mode="json"),
        engine="transformers",
        repo=repo_id.rpartition("/")[2] if repo_id else name,
        repo_id=repo_id,
        files=tuple(_files(task, source, located, tensors)),
        bits_per_weight=8 * data / source.facts.parameters,
        peak_ram=_peak_ram(task, request.config, options, source, located),
        operations=work,
        gates=request.gates(task.level),
        done=hashed
        and request.workspace.recall(task.id, task_key(task, request.config, options, source)) is not None,
    )


def _files(
    task: LevelTask, source: Source, located: Mapping[str, TensorHeader], tensors: Sequence[Stored]
) -> list[PlannedFile]:
    """Weights and companions.

    config.json grows by about 1.3 kB; recipe.yaml of calibrated levels is not counted.
    """
    files = companions(source)
    shards = _streamed(located, task) if not task.calibrated else split(tensors)
    weights = {name: file_size(stored) for name, stored in shards.items()}
    if task.scope is not None:  # which shard grows is known when the layers are chosen
        largest = max(weights, key=lambda name: weights[name])
        weights[largest] += task.scope.data - sum(tensor.bytes for tensor in tensors)
    files += [PlannedFile(name=name, bytes=size) for name, size in weights.items()]
    if len(shards) > 1:
        files.append(PlannedFile(name=INDEX, bytes=len(index_bytes(shards))))
    size = next(file.bytes for file in source.files if file.name == "config.json")
    files.append(PlannedFile(name="config.json", bytes=size + CONFIG_GROWTH))
    return sorted(files, key=lambda file: file.name)


def _streamed(located: Mapping[str, TensorHeader], task: LevelTask) -> dict[str, list[Stored]]:
    """The source's own shards, with what stands for their tensors."""
    return {
        shard: planned({tensor.name: tensor for tensor in tensors}, task.selection, task.scheme)
        for shard, tensors in by_shard(located).items()
    }


def _peak_ram(
    task: LevelTask, config: Config, options: Any, source: Source, located: Mapping[str, TensorHeader]
) -> int:
    """An estimate, from above: libraries and slices of streamed levels, ``cost.ram`` of calibrated ones."""
    if not task.calibrated:
        made = GIB + workers(options, located) * 32 * SLICE
    else:
        made = cost.ram(
            task.recipe.algorithm, config, source, sum(tensor.bytes for tensor in located.values())
        )
    if task.scope is None:
        return made
    return max(made, 2 * GIB + 4 * source.facts.parameters + KEPT_BYTES)


def task_key(task: LevelTask, config: Config, options: Any, source: Source) -> str:
    """The key of a level."""
    depends = CALIBRATED if task.calibrated or task.scope is not None else STREAMED
    parts = (task.recipe.method, task.level, source.sampling)
    return key_of(depends, source, *parts, config=config, options=options)
