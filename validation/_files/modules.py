"""What a quantized folder says of itself: its modules by safetensors headers, and the scheme that config.json promises.

Names and meanings follow compressed-tensors 0.19 (``quantization/quant_config.py``; layouts: ``compressors/``; patterns:
``utils/match.py``) and AutoAWQ 0.2.9. No weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantool.formats.fused_layers import EXPERT, fused
from quantool.formats.int4_layouts import PER_WORD
from quantool.formats.safetensors import TensorHeader

PARTS = frozenset(
    (
        *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        *("input_scale", "input_zero_point", "qweight", "qzeros", "scales"),
    )
)
QUANTIZED = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "F4"})
EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|\w*embeddings?)$")
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
HEAD = "lm_head"
PACKED = "pack-quantized"


@dataclass(frozen=True)
class Module:
    """A linear layer as it is stored: part (``weight_packed``, ``weight_scale`` …) to its tensor."""

    name: str
    parts: Mapping[str, TensorHeader]

    @property
    def quantized(self) -> bool:
        """Whether its weights are stored in a quantized form."""
        weight = self.parts.get("weight")
        return weight is None or weight.dtype in QUANTIZED

    @property
    def last(self) -> str:
        """The last part of the name: ``q_proj``."""
        return self.name.rpartition(".")[2]

    def shape(self, bits: int) -> tuple[int, int]:
        """Outputs and inputs; ``bits`` of a packed weight."""
        if "weight_packed" in self.parts:
            rows, words = self.parts["weight_packed"].shape
            return rows, words * 32 // bits
        if "qweight" in self.parts:
            columns, words = self.parts["qweight"].shape
            return words * PER_WORD, columns
        rows, columns = self.parts["weight"].shape
        return rows, columns


@dataclass(frozen=True)
class Group:
    """Modules that vLLM runs as one: fused ones, all experts of a layer, or one alone (then its name is its own)."""

    name: str
    modules: tuple[Module, ...]
    experts: bool = False


def modules(headers: Mapping[str, TensorHeader]) -> list[Module]:
    """All linear layers, the output head included, in the order of the headers."""
    found: dict[str, dict[str, TensorHeader]] = {}
    for name, tensor in headers.items():
        module, _, part = name.rpartition(".")
        if part in PARTS:
            found.setdefault(module, {})[part] = tensor
    return [Module(name, parts) for name, parts in found.items() if _is_linear(name, parts)]


def _is_linear(name: str, parts: Mapping[str, TensorHeader]) -> bool:
    if EMBEDDING.search(name):
        return False
    weight = parts.get("weight", parts.get("weight_packed", parts.get("qweight")))
    return weight is not None and len(weight.shape) == 2


def groups(found: Sequence[Module]) -> list[Group]:
    """The modules as vLLM joins them."""
    named = {module.name: module for module in found}
    return [
        Group(name, tuple(named[part] for part in parts), EXPERT.match(parts[0]) is not None)
        for name, parts in fused(named).items()
    ]


@dataclass(frozen=True)
class Numbers:
    """How numbers are represented: ``QuantizationArgs`` of compressed-tensors."""

    bits: int
    kind: Literal["int", "float"]
    strategy: str
    """``tensor``, ``channel``, ``group``, ``block``, ``token`` or what comes later."""
    group: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    block: tuple[int, ...] = ()
    actorder: str | None = None

    @classmethod
    def of(cls, found: Any) -> Numbers | None:
        """From its JSON; None for null. Raises ValueError for what is no such record."""
        if found is None:
            return None
        match found:
            case {"num_bits": int(bits)}:
                pass
            case _:
                raise ValueError(f"{found!r} does not say num_bits")
        kind = found.get("type", "int")
        if kind not in ("int", "float"):
            raise ValueError(f"type {kind!r} is neither int nor float")
        size = found.get("group_size")
        return cls(
            bits,
            kind,
            str(found.get("strategy") or ("group" if size and size > 0 else "channel" if size else "tensor")),
            size if isinstance(size, int) and size > 0 else None,
            bool(found.get("symmetric", True)),
            bool(found.get("dynamic", False)),
            tuple(found.get("block_structure") or ()),
            found.get("actorder"),
        )


@dataclass(frozen=True)
class LayerScheme:
    """One group of ``config_groups``, or all that an AutoAWQ configuration says."""

    targets: tuple[str, ...]
    form: str
    """``pack-quantized``, ``float-quantized``, ``int-quantized`` …; ``awq`` for AutoAWQ."""
    weights: Numbers
    inputs: Numbers | None = None

    @property
    def is_covered(self) -> bool:
        """Whether this is of the kinds that the rules here are about: 8-bit floats, packed and 8-bit integers."""
        weights, inputs = self.weights, self.inputs
        if weights.kind == "float":
            return weights.bits == 8 and weights.strategy in ("tensor", "channel", "block")
        return inputs is None or weights.bits == 8


FLOATS = ("BF16", "F16", "F32")


def matches(name: str, pattern: str) -> bool:
    """Whether a layer is meant by a pattern of ``targets`` or ``ignore``: a name, or behind ``re:`` an expression."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern == name


def expected_parts(
    scheme: LayerScheme, outputs: int, inputs: int
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """What a module of ``scheme`` is stored as: part, dtypes that it may have, shape."""
    weights = scheme.weights
    if scheme.form == "awq":
        groups_of_inputs = inputs // (weights.group or inputs)
        yield "qweight", ("I32",), (inputs, outputs // PER_WORD)
        yield "qzeros", ("I32",), (groups_of_inputs, outputs // PER_WORD)
        yield "scales", ("F16", "BF16"), (groups_of_inputs, outputs)
        return
    scale = _scale_shape(weights, outputs, inputs)
    if scheme.form == PACKED:
        yield "weight_packed", ("I32",), (outputs, -(-inputs * weights.bits // 32))
        yield "weight_shape", ("I64", "I32"), (2,)
    else:
        yield "weight", ("F8_E4M3",) if weights.kind == "float" else ("I8",), (outputs, inputs)
    yield "weight_scale", FLOATS, scale
    if not weights.symmetric:
        packed = (-(-outputs * weights.bits // 32), *scale[1:])
        yield (
            "weight_zero_point",
            *((("I32",), packed) if scheme.form == PACKED else (tuple(QUANTIZED), scale)),
        )
    if weights.actorder in ("group", "dynamic"):
        yield "weight_g_idx", ("I32", "I64"), (inputs,)
    if scheme.inputs is not None and not scheme.inputs.dynamic:
        yield "input_scale", FLOATS, (1,)
        if not scheme.inputs.symmetric:
            yield "input_zero_point", (*FLOATS, *QUANTIZED), (1,)


def _scale_shape(weights: Numbers, outputs: int, inputs: int) -> tuple[int, ...]:
    if weights.strategy == "channel":
        return (outputs, 1)
    if weights.strategy == "group":
        return (outputs, inputs // (weights.group or inputs))
    if weights.strategy == "block":
        height, width = weights.block or (128, 128)
        return (-(-outputs // height), -(-inputs // width))
    return (1,)


@dataclass(frozen=True)
class Promise:
    """``quantization_config``: schemes, what is left alone, and the attention cache."""

    method: Literal["compressed-tensors", "awq"]
    schemes: tuple[LayerScheme, ...]
    ignore: tuple[str, ...]
    cache: Numbers | None = None
    head: bool = False
    """AutoAWQ only: whether the output head is said to be quantized."""
    problems: tuple[str, ...] = ()
    """What is wrong with it as a whole."""
    version: object = None
    """Of the compressed-tensors that wrote it."""


def promise(found: Mapping[str, Any]) -> Promise | None:
    """Read a ``quantization_config``; None for methods other than compressed-tensors and AutoAWQ.

    Raises ValueError for a scheme that cannot be read.
    """
    method = str(found.get("quant_method", "")).lower()
    if method == "awq":
        return _autoawq(found)
    if method != "compressed-tensors":
        return None
    schemes = []
    for part in (found.get("config_groups") or {}).values():
        weights = Numbers.of(part.get("weights"))
        if weights is None:
            continue  # a group for the attention cache alone
        form = str(part.get("format") or found.get("format"))
        targets = tuple(part.get("targets") or ())
        schemes.append(LayerScheme(targets, form, weights, Numbers.of(part.get("input_activations"))))
    problems = [f"{key} is set" for key in ("sparsity_config",) if (found.get(key) or {}).get("targets")]
    if not schemes:
        problems.append("config_groups quantizes nothing")
    cache = Numbers.of(found.get("kv_cache_scheme"))
    return Promise(
        "compressed-tensors",
        tuple(schemes),
        tuple(found.get("ignore") or ()),
        cache,
        problems=tuple(problems),
        version=found.get("version"),
    )


def _autoawq(found: Mapping[str, Any]) -> Promise:
    match found.get("bits", found.get("w_bit")), found.get("group_size", found.get("q_group_size")):
        case int(bits), int(size):
            pass
        case bits, size:
            raise ValueError(f"bits are {bits!r} and group_size is {size!r}")
    strategy = "group" if size > 0 else "channel"
    weights = Numbers(bits, "int", strategy, size if size > 0 else None, symmetric=False)
    version = str(found.get("version", "gemm")).lower()
    problems = [f"version is {version!r}, and only the words of gemm are read"] if version != "gemm" else []
    if bits != 4:
        problems.append(f"{bits} bits, and only 4 are read")
    left = tuple(found.get("modules_to_not_convert") or ())
    head = bool(found.get("lm_head", False))
    return Promise("awq", (LayerScheme(("Linear",), "awq", weights),), left, None, head, tuple(problems))
