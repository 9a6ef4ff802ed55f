"""The quantization schemes of compressed-tensors: what each writes for a layer, and which layers it is put on.

Names and layouts are those of compressed-tensors 0.19 (``quantization/quant_scheme.py``, ``compressors/``). All this is
decided from safetensors headers: no weights are read and neither torch nor llmcompressor is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import AfterValidator

from quantool.errors import ConfigError, SourceError
from quantool.formats.fused_layers import fused
from quantool.formats.safetensors import TensorHeader
from quantool.formats.safetensors_layout import Stored, as_stored

FLOATS = ("BF16", "F16", "F32")
BLOCK = 128
"""Rows and columns of a block of FP8_BLOCK, and the group of its activations."""

ROUTERS = (
    r"re:.*mlp\.gate$",
    r"re:.*block_sparse_moe\.gate$",
    r"re:.*\.router$",
    r"re:.*shared_expert_gate$",
)
"""Routers of a mixture of experts: small, decisive, and held in full precision by every engine."""

CLASSIFIERS = (r"re:(classifier|score|pre_classifier)(\..*)?$", r"re:(.*\.)?pooler\.dense$")
"""Heads of classifiers and rerankers: small, and each of their numbers is an answer."""

GROUPS = (32, 64, 128)
"""Group sizes that Marlin of vLLM 0.24 multiplies (``marlin_utils.py``, MARLIN_SUPPORTED_GROUP_SIZES); Machete takes the last two."""

EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|\w*embeddings?)$")
SUFFIX = ".weight"
HEAD = "lm_head"


@dataclass(frozen=True)
class WeightScheme:
    """How weights (and, for 8-bit activations, inputs) are represented.

    ``preset`` is the name in compressed-tensors. ``strategy`` says what shares a scale: an output channel, the whole
    tensor, a block of 128 x 128, or ``group`` values of a row. ``stored`` is the dtype of the quantized weights; I32
    means packed, several values a word.
    """

    preset: str
    summary: str
    strategy: Literal["channel", "tensor", "block", "group"]
    bits: int
    stored: Literal["F8_E4M3", "I8", "I32"]
    calibrated: bool = True
    symmetric: bool = True
    static_inputs: bool = False
    group: int = 0

    def grouped(self, size: int) -> WeightScheme:
        """The same with another group size."""
        return replace(self, group=size) if self.strategy == "group" else self

    def tensors(self, layer: TensorHeader) -> list[Stored]:
        """What stands for the weight [out, in] of ``layer`` in a compressed-tensors file."""
        name, (rows, columns), full = layer.name.removesuffix(SUFFIX), layer.shape, layer.dtype
        scale = {
            "channel": (rows, 1),
            "tensor": (1,),
            "block": (-(-rows // BLOCK), -(-columns // BLOCK)),
            "group": (rows, columns // self.group if self.group else 1),
        }[self.strategy]
        found = [Stored(f"{name}.weight_scale", full, scale)]
        if self.stored != "I32":
            found.append(Stored(f"{name}.weight", self.stored, (rows, columns)))
        else:
            found += [
                Stored(f"{name}.weight_packed", "I32", (rows, _words(columns, self.bits))),
                Stored(f"{name}.weight_shape", "I64", (2,)),
            ]
            if not self.symmetric:
                found.append(Stored(f"{name}.weight_zero_point", "I32", (_words(rows, self.bits), scale[1])))
        if self.static_inputs:
            found.append(Stored(f"{name}.input_scale", full, (1,)))
        return found


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


FP8 = {
    "FP8_DYNAMIC": WeightScheme(
        "FP8_DYNAMIC", "E4M3, a scale per output channel, activations per token at run time; no calibration",
        "channel", 8, "F8_E4M3", calibrated=False,
    ),
    "FP8": WeightScheme(
        "FP8", "E4M3, one scale per tensor for weights and, calibrated, for activations",
        "tensor", 8, "F8_E4M3", static_inputs=True,
    ),
    "FP8_BLOCK": WeightScheme(
        "FP8_BLOCK", "E4M3, a scale per 128 x 128 block, activations per 128 at run time; no calibration",
        "block", 8, "F8_E4M3", calibrated=False,
    ),
}  # fmt: skip
W4A16 = WeightScheme("W4A16", "4-bit integers, symmetric, groups of 128", "group", 4, "I32", group=128)
W4A16_ASYM = WeightScheme(
    "W4A16_ASYM",
    "4-bit integers with zero points, groups of 128",
    "group",
    4,
    "I32",
    symmetric=False,
    group=128,
)
W8A16 = WeightScheme("W8A16", "8-bit integers, symmetric, groups of 128", "group", 8, "I32", group=128)
W8A8 = WeightScheme(
    "W8A8", "8-bit integers per output channel, activations per token at run time", "channel", 8, "I8"
)


@dataclass(frozen=True)
class Selection:
    """Which layers are quantized.

    ``ignore`` holds the patterns to record in the artifact, ``left`` the names of the layers that are kept as they are.
    """

    layers: tuple[TensorHeader, ...]
    left: tuple[str, ...]
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    warnings: tuple[str, ...]


def _readable(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_readable)]
"""A name of a layer, or ``re:`` and a regular expression."""


def matches(name: str, pattern: str) -> bool:
    """Whether a module name is meant by a pattern of compressed-tensors: ``re:`` and a regex, or the exact name."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern == name


def linears(headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Module name to weight of everything that is a ``Linear``: two dimensions, not an embedding."""
    found = {}
    for name, tensor in headers.items():
        module = name.removesuffix(SUFFIX)
        if name.endswith(SUFFIX) and len(tensor.shape) == 2 and not EMBEDDING.search(module):
            found[module] = tensor
    return found


def select(
    headers: Mapping[str, TensorHeader],
    targets: Sequence[str],
    ignore: Sequence[str] | None,
    *,
    tied: bool,
    kept: Sequence[str] = (),
) -> Selection:
    """Apply ``targets`` and ``ignore`` (None: the output head, and a classifier's) to the tensors of a checkpoint.

    Routers are always left alone, and so is what the patterns ``kept`` mean. ``tied`` says that the output head is the
    embedding. Raises ConfigError naming patterns that match nothing, SourceError for experts stored as one 3-D tensor.
    """
    fused = [
        name
        for name, tensor in headers.items()
        if len(tensor.shape) == 3 and "conv" not in name and not any(matches(name, p) for p in kept)
    ]
    if fused:
        raise SourceError(
            f"{fused[0]} and {len(fused) - 1} more hold all experts of a layer in one tensor, which is not supported",
            hint="a checkpoint with a tensor per expert can be quantized",
        )
    found = linears(headers)
    heads = tuple(p for p in CLASSIFIERS if any(matches(m, p) for m in found))
    wanted = (HEAD, *heads) if ignore is None else tuple(ignore)
    modules = [*found, *([HEAD] if tied else [])]
    lost = [p for p in wanted if not any(matches(m, p) for m in modules)] if ignore is not None else []
    lost += [t for t in targets if t != "Linear" and not any(matches(m, t) for m in modules)]
    if lost:
        raise ConfigError(
            f"quantization_config: {', '.join(map(repr, lost))} in targets or ignore matches no linear layer",
            hint=f"layers are named like {', '.join(list(found)[:3])}; a regular expression starts with re:",
        )
    if tied and not any(matches(HEAD, p) for p in wanted):
        raise ConfigError(
            "lm_head shares its weights with the embeddings and cannot be quantized alone",
            hint="keep lm_head in quantization_config.ignore",
        )
    routers = tuple(p for p in ROUTERS if any(matches(m, p) for m in found))
    added = tuple(p for p in routers if p not in wanted)
    everything = (*wanted, *added, *(p for p in kept if p not in wanted))
    layers: list[TensorHeader] = []
    left: list[TensorHeader] = []
    for module, tensor in found.items():
        hit = any(t == "Linear" or matches(module, t) for t in targets)
        skip = any(matches(module, p) for p in everything)
        (layers if hit and not skip else left).append(tensor)
    if not layers:
        raise ConfigError("quantization_config: targets and ignore together leave no layer to quantize")
    if any(t.name.removesuffix(SUFFIX) == HEAD for t in layers) and not any(
        matches(HEAD, t) for t in targets
    ):
        targets = (*targets, HEAD)  # the output head of vLLM 0.24 is of no class that Linear means
    warnings = (
        (f"routers of the experts stay in full precision ({', '.join(added)})",)
        if added and ignore is not None
        else ()
    )
    return Selection(
        tuple(layers), tuple(t.name.removesuffix(SUFFIX) for t in left), tuple(targets), everything, warnings
    )


def check_shapes(selection: Selection, scheme: WeightScheme) -> None:
    """ConfigError naming the layers whose input width the group size does not divide."""
    size = BLOCK if scheme.strategy == "block" else scheme.group
    if not size:
        return
    odd = [layer for layer in selection.layers if layer.shape[1] % size]
    if odd:
        named = ", ".join(f"{layer.name} ({layer.shape[1]} inputs)" for layer in odd[:3])
        widths = math.gcd(*(layer.shape[1] for layer in selection.layers))
        fits = [str(s) for s in (128, 64, 32) if widths % s == 0]
        raise ConfigError(
            f"{scheme.preset}: groups of {size} do not divide {len(odd)} layers: {named}",
            hint=f"quantization_config.group_size: {' or '.join(fits)}"
            if fits and scheme.strategy == "group"
            else "put those layers into quantization_config.ignore, or choose another level",
        )
    if scheme.strategy == "group" and size not in GROUPS:
        raise ConfigError(
            f"no kernel of vLLM multiplies groups of {size}",
            hint=f"quantization_config.group_size: {' or '.join(map(str, GROUPS))}",
        )


def check_fusion(selection: Selection, scheme: WeightScheme) -> None:
    """ConfigError where vLLM, which runs some layers as one (``formats.fused_layers``), would refuse what is selected."""
    chosen = [layer.name.removesuffix(SUFFIX) for layer in selection.layers]
    rows = {layer.name.removesuffix(SUFFIX): layer.shape[0] for layer in selection.layers}
    for parts in fused([*chosen, *selection.left]).values():
        out = [part for part in parts if part not in rows]
        if out and len(out) < len(parts):
            quantized = next(part for part in parts if part in rows)
            raise ConfigError(
                f"{quantized} would be quantized and {out[0]} would not, but vLLM runs them as one",
                hint="let quantization_config.ignore name all of them or none",
            )
        odd = [part for part in parts[:-1] if scheme.strategy == "block" and rows.get(part, 0) % BLOCK]
        if odd and ".experts." not in odd[0]:
            raise ConfigError(
                f"{scheme.preset}: {odd[0]} has {rows[odd[0]]} outputs, which blocks of {BLOCK} do not fill, and "
                "vLLM runs it as one with others",
                hint="choose FP8_DYNAMIC, or put these layers into quantization_config.ignore",
            )


def planned(
    headers: Mapping[str, TensorHeader],
    selection: Selection,
    scheme: WeightScheme,
    others: Mapping[str, WeightScheme] = MappingProxyType({}),
) -> list[Stored]:
    """All tensors of the quantized checkpoint; ``others`` are schemes of single layers, by the names of their weights."""
    chosen = {layer.name for layer in selection.layers}
    found: list[Stored] = []
    for tensor in headers.values():
        if tensor.name in chosen:
            found += others.get(tensor.name, scheme).tensors(tensor)
        else:
            found.append(as_stored(tensor))
    return found
