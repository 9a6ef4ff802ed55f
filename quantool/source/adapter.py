"""A PEFT adapter: what each of its tensors adds to which weight of the base model, by its configuration and headers alone.

LoRA (arXiv 2106.09685) adds ``alpha / r * B @ A`` to a weight, rank-stabilized LoRA (arXiv 2312.03732) ``alpha / sqrt(r) * B @ A``;
DoRA (arXiv 2402.09353) then gives each row of the sum the length that it was trained to have;
names and patterns are those of peft 0.21 (``tuners/lora``, ``utils/save_and_load.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.json_file import brief, read_json
from quantool.formats.safetensors import TensorHeader, some
from quantool.formats.safetensors_layout import Stored

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PAIRS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
"""Ends of the names of DoRA's lengths; the second is that of peft before 0.11."""
MERGE_IT = "merge it with peft where you trained it (merge_and_unload, save_pretrained) and name that folder as model_id"

READ = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
    "revision",
    "peft_type",
    "bias",
    "use_dora",
}
TRAINING = {
    "auto_mapping", "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "runtime_config",
    "target_modules", "task_type", "ensure_weight_tying", "init_lora_weights",
}  # fmt: skip
"""Keys of the configuration that say how it was trained: what came of it lies in the tensors."""
UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal")
"""``init_lora_weights`` that leave the base model as it is; pissa, olora, corda, loftq and lora_ga change it as well."""


@dataclass(frozen=True)
class LowRank:
    """``scale * B @ A`` in the shape of a weight [rows, columns]: A [r, columns], B [rows, r].

    Of an embedding peft stores the transpose: then ``a`` is [r, rows] and ``b`` [columns, r].
    """

    a: TensorHeader
    b: TensorHeader
    scale: float
    transposed: bool
    magnitude: TensorHeader | None = None
    """DoRA: the length of each row of the sum [rows]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight it is added to."""
        outer, inner = self.b.shape[0], self.a.shape[1]
        return (inner, outer) if self.transposed else (outer, inner)


@dataclass(frozen=True)
class LoraAdapter:
    """What an adapter changes of its base, by the name of the weight."""

    added: Mapping[str, LowRank]
    replaced: Mapping[str, TensorHeader]
    """Weights that were trained whole (``modules_to_save``)."""
    base: str | None
    """What it says it was trained on."""
    revision: str | None

    def described(self) -> str:
        """For people: how many weights it changes, and by how much of what rank."""
        ranks = sorted({pair.a.shape[0] for pair in self.added.values()})
        scales = sorted({pair.scale for pair in self.added.values()})
        low = f"rank {_range(ranks)} times {_range(scales)} added to {len(self.added)} weights"
        low += ", their rows of trained length (DoRA)" * any(pair.magnitude for pair in self.added.values())
        return low + (f", {len(self.replaced)} replaced" if self.replaced else "")


def _range(numbers: list[Any]) -> str:
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"{numbers[0]:g} to {numbers[-1]:g}"


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter names, and its revision; SourceError when it names none."""
    settings = read_json(folder / CONFIG)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise SourceError(
            f"{folder / CONFIG} does not say on what model the adapter was trained",
            hint="name that model as model_id, and the adapter as adapter",
        )
    return base, revision if isinstance(revision, str) else None


def read_adapter(path: Path, headers: Mapping[str, TensorHeader]) -> LoraAdapter:
    """The adapter whose adapter_config.json is ``path``; SourceError for one that is no plain LoRA or lacks a part."""
    settings = read_json(path)
    _refuse_other_kinds(path, settings)
    left = dict(headers)
    added: dict[str, LowRank] = {}
    for name in headers:
        for first, second in PAIRS.items():
            if not name.endswith(first) or name not in left:
                continue
            module, other = name.removesuffix(first), name.removesuffix(first) + second
            if other not in left:
                raise SourceError(
                    f"{path.parent}: {name} without {other}", hint="the adapter is damaged: fetch it again"
                )
            pair = left.pop(name), left.pop(other)
            target = module.removeprefix(PREFIX)
            made = _pair(path, settings, target, pair, transposed="embedding" in first)
            added[f"{target}.weight"] = (
                _with_magnitude(path, made, module, left) if settings.get("use_dora") else made
            )
    if strange := [name for name in left if "lora_" in name or not name.startswith(PREFIX)]:
        raise SourceError(
            f"{path.parent}: {some(sorted(strange))}: no part of a plain LoRA adapter", hint=MERGE_IT
        )
    replaced = {
        name.removeprefix(PREFIX).replace(".modules_to_save", ""): tensor for name, tensor in left.items()
    }
    if not added:
        raise SourceError(f"{path.parent / WEIGHTS} has no pair of lora_A and lora_B", hint=MERGE_IT)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    return LoraAdapter(
        added,
        replaced,
        base if isinstance(base, str) else None,
        revision if isinstance(revision, str) else None,
    )


def _refuse_other_kinds(path: Path, settings: Mapping[str, Any]) -> None:
    kind, bias = settings.get("peft_type"), settings.get("bias", "none")
    if kind != "LORA":
        raise SourceError(f"{path}: peft_type is {brief(kind)}; quantool merges LORA", hint=MERGE_IT)
    if bias not in ("none", None):
        raise SourceError(f"{path}: bias {brief(bias)}: trained biases are not merged", hint=MERGE_IT)
    start = settings.get("init_lora_weights", True)
    if start not in UNCHANGED:
        raise SourceError(
            f"{path}: init_lora_weights {brief(start)} has changed the base model's weights as well",
            hint=MERGE_IT,
        )
    for key, value in settings.items():
        if key not in READ | TRAINING and value not in (None, False, "", [], {}, 0):
            raise SourceError(
                f"{path}: {key} {brief(value)}: quantool merges plain LoRA alone", hint=MERGE_IT
            )


def _pair(
    path: Path,
    settings: Mapping[str, Any],
    module: str,
    pair: tuple[TensorHeader, TensorHeader],
    *,
    transposed: bool,
) -> LowRank:
    a, b = pair
    rank, alpha = (_number(path, settings, key, pattern, module) for key, pattern in RANKS)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise SourceError(
            f"{path.parent}: {a.name} {list(a.shape)} and {b.name} {list(b.shape)} are no matrices of one rank"
        )
    if a.shape[0] != rank:
        raise SourceError(f"{path} says rank {rank:g} for {module}, but {a.name} has {a.shape[0]}")
    divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
    return LowRank(a, b, alpha / divisor, transposed)


def _with_magnitude(path: Path, pair: LowRank, module: str, left: dict[str, TensorHeader]) -> LowRank:
    """The pair with the lengths of its rows, taken from what is ``left``; SourceError where they are lost or do not fit."""
    name = next((module + end for end in MAGNITUDES if module + end in left), None)
    if name is None or pair.transposed:
        what = "an embedding" if pair.transposed else f"no {module}{MAGNITUDES[0]}"
        raise SourceError(f"{path.parent}: use_dora with {what}", hint=MERGE_IT)
    magnitude = left.pop(name)
    if magnitude.elements != pair.shape[0]:
        raise SourceError(f"{path.parent}: {name} has {magnitude.elements} lengths for {pair.shape[0]} rows")
    return replace(pair, magnitude=magnitude)


RANKS = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))


def _number(path: Path, settings: Mapping[str, Any], key: str, pattern: str, module: str) -> float:
    """``r`` or ``lora_alpha`` of a module: the first entry of its pattern that fits, as ``get_pattern_key`` of peft."""
    listed = settings.get(pattern) or {}
    if not isinstance(listed, dict):
        raise SourceError(f"{path}: {pattern} is {brief(listed)}, expected an object")
    try:
        fitting = next((name for name in listed if re.match(rf"(.*\.)?({name})$", module)), None)
    except re.error as error:
        raise SourceError(f"{path}: {pattern}: {error}") from error
    value: Any = settings.get(key) if fitting is None else listed[fitting]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise SourceError(f"{path}: {key} of {module} is {brief(value)}, expected a positive number")
    return float(value)


def require_fit(adapter: LoraAdapter, weights: Mapping[str, Stored], place: str) -> None:
    """SourceError for a weight that the base at ``place`` lacks or has in another shape."""
    changed = {name: pair.shape for name, pair in adapter.added.items()}
    changed |= {name: tensor.shape for name, tensor in adapter.replaced.items()}
    for name, shape in changed.items():
        if name not in weights:
            raise SourceError(
                f"the adapter changes {name}, which {place} does not have",
                hint=f"is it the model that the adapter was trained on ({adapter.base})? Otherwise: {MERGE_IT}",
            )
        if weights[name].shape != shape:
            raise SourceError(
                f"the adapter's part of {name} is {list(shape)}, but {place} has {list(weights[name].shape)}",
                hint=f"it was trained on {adapter.base}" if adapter.base else MERGE_IT,
            )
