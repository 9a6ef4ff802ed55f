"""The scheme of every group of layers: candidates from the headers, costs measured, the least sum under the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError
from quantool.formats.fused_layers import fused
from quantool.formats.safetensors import TensorHeader
from quantool.formats.safetensors_layout import Stored, as_stored, by_shard, file_size
from quantool.methods._compressed.fit.budget import Budget, refuse_unmet
from quantool.methods._compressed.fit.measure import TOKENS, costs_of
from quantool.methods._compressed.schemes import SUFFIX, W8A16, Selection, WeightScheme, planned
from quantool.methods._fit.allocation import Choice, allocate, cost_of
from quantool.tasks import Task

WHOLE = "16 bit"
"""The choice that leaves a group as it is."""


@dataclass(frozen=True)
class Candidates:
    """What each group of layers that vLLM runs as one may be. ``schemes`` by name, the level's own first."""

    groups: Mapping[str, tuple[TensorHeader, ...]]
    schemes: Mapping[str, WeightScheme]

    @classmethod
    def of(cls, selection: Selection, level: str, scheme: WeightScheme) -> Candidates:
        """Of the layers that a level quantizes; of 4-bit levels 8 bits are another choice."""
        layers = {layer.name.removesuffix(SUFFIX): layer for layer in selection.layers}
        groups = {
            name: tuple(layers[part] for part in parts)
            for name, parts in fused([*layers, *selection.left]).items()
            if all(part in layers for part in parts)
        }
        more = {"W8A16": W8A16.grouped(scheme.group)} if scheme.bits == 4 else {}
        return cls(groups, {level: scheme, **more})

    def bytes(self, group: str, scheme: str) -> int:
        """What the tensors of a group take."""
        layers = self.groups[group]
        if scheme == WHOLE:
            return sum(as_stored(layer).bytes for layer in layers)
        return sum(tensor.bytes for layer in layers for tensor in self.schemes[scheme].tensors(layer))

    def choices(self, costs: Mapping[tuple[str, str], float]) -> dict[str, list[Choice]]:
        """All choices with their measured costs; what noise puts below nothing costs nothing."""
        return {
            group: [
                Choice(WHOLE, self.bytes(group, WHOLE), 0.0),
                *(
                    Choice(name, self.bytes(group, name), max(0.0, costs[group, name]))
                    for name in self.schemes
                ),
            ]
            for group in self.groups
        }


@dataclass(frozen=True)
class FitScope:
    """What the plan knows of a fitted checkpoint: ``data`` are the bytes that its tensors may take."""

    candidates: Candidates
    data: int
    fixed: int
    """Bytes of the tensors that no choice is about."""

    def operations(self, parameters: int) -> float:
        """Multiplications and additions that measuring takes: a forward pass for each group and scheme."""
        return 2.0 * parameters * TOKENS * (1 + len(self.candidates.groups) * len(self.candidates.schemes))


def refuse_combination(task: Task, *, autoawq: bool) -> None:
    """ConfigError for what choosing by measuring cannot be combined with."""
    if autoawq:
        raise ConfigError(
            "quantization_config.fit makes layers of several kinds, and format: autoawq holds one",
            hint="drop one of the two",
        )
    if not task.generates:
        raise ConfigError(
            f"quantization_config.fit measures predictions of text; this checkpoint is for {task.kind}",
            hint="name layers in quantization_config.ignore",
        )


def scope_of(
    budget: Budget,
    level: str,
    scheme: WeightScheme,
    selection: Selection,
    located: Mapping[str, TensorHeader],
) -> FitScope:
    """Decide what may be chosen; ConfigError for a budget that cannot be met, and for a mixture of experts."""
    if any(".experts." in layer.name for layer in selection.layers):
        raise ConfigError(
            "quantization_config.fit chooses layers of dense models; this one is a mixture of experts",
            hint="leave fit out, or name layers in quantization_config.ignore; the method gguf fits mixtures of experts",
        )
    candidates = Candidates.of(selection, level, scheme)
    smallest = _bytes(planned(located, selection, scheme))
    largest = _bytes(map(as_stored, located.values()))
    data = refuse_unmet(
        budget, level, smallest, largest, sum(tensor.elements for tensor in located.values()),
        _headers(located, selection, scheme),
    )  # fmt: skip
    fixed = smallest - sum(candidates.bytes(group, level) for group in candidates.groups)
    return FitScope(candidates, data, fixed)


def _bytes(stored: Any) -> int:
    return sum(tensor.bytes for tensor in stored)


def _headers(located: Mapping[str, TensorHeader], selection: Selection, scheme: WeightScheme) -> int:
    """Bytes of the files beside their tensors, from above: a quantized layer has most tensors."""
    shards: list[list[Stored]] = [
        planned({tensor.name: tensor for tensor in tensors}, selection, scheme)
        for tensors in by_shard(located).values()
    ]
    return sum(file_size(shard) - _bytes(shard) for shard in shards)


@dataclass(frozen=True)
class LayerChoice:
    """The choice. ``others``: layers (names of weights) with another scheme than the level's; ``whole``: left as they are."""

    others: Mapping[str, WeightScheme]
    whole: tuple[str, ...]
    cost: float
    """Measured costs added up, nats a token."""


def choose(scope: FitScope, costs: Path) -> LayerChoice:
    """The least sum of costs under the budget."""
    choices = scope.candidates.choices(costs_of(costs))
    types = allocate(choices, scope.data - scope.fixed)
    own = next(iter(scope.candidates.schemes))
    others = {
        layer.name: scope.candidates.schemes[kind]
        for group, kind in types.items()
        if kind not in (own, WHOLE)
        for layer in scope.candidates.groups[group]
    }
    whole = tuple(
        layer.name
        for group, kind in types.items()
        if kind == WHOLE
        for layer in scope.candidates.groups[group]
    )
    return LayerChoice(others, whole, cost_of(choices, types))


def request_of(scope: FitScope) -> dict[str, Any]:
    """What the measuring worker is told of the candidates."""
    return {
        "groups": {
            name: [layer.name for layer in layers] for name, layers in scope.candidates.groups.items()
        },
        "schemes": {name: asdict(scheme) for name, scheme in scope.candidates.schemes.items()},
    }
