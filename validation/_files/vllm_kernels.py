"""Which of vLLM's kernels would multiply a layer, on which GPUs, and split over how many.

Read from vLLM 0.24 (``_findings.rules``), below ``vllm/model_executor``: the choice of a scheme in
``layers/quantization/compressed_tensors/compressed_tensors.py`` (``_get_scheme_from_parts``) and, for experts, in
``compressed_tensors_moe/compressed_tensors_moe.py``; AutoAWQ in ``layers/quantization/auto_awq.py``; shapes in
``kernels/linear/mixed_precision/{machete,marlin}.py``, ``layers/quantization/utils/marlin_utils.py`` and
``utils/fp8_utils.py`` (``validate_fp8_block_shape``). Compute capabilities are CUDA's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantool.validation._files.modules import PACKED, Group, LayerScheme, Module

ACTIVATIONS = ("float-quantized", "int-quantized", "naive-quantized")
"""Formats whose activations are quantized too (``is_activation_quantization_format``)."""
MARLIN_GROUPS = (32, 64, 128)
MACHETE_GROUPS = (64, 128)
MACHETE_SHAPE = (64, 128)
"""Inputs and outputs of a layer must be multiples of these."""
TRITON_GROUPS = (256,)
BLOCK = 128
ROWS = frozenset(("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "w2", "wo"))
"""Modules whose inputs are split over GPUs; the outputs of all others are."""
WHOLE = frozenset(("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj"))
"""Modules that every GPU holds whole."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model."""

    queries: int
    keys: int


@dataclass(frozen=True)
class Kernel:
    """A family of kernels. ``problem`` says why there is none."""

    name: str
    gpus: str = ""
    problem: str = ""


def kernel(scheme: LayerScheme, group: Group) -> Kernel:
    """What would run ``group`` on one GPU."""
    weights, inputs = scheme.weights, scheme.inputs
    if scheme.form == "awq" or (scheme.form == PACKED and inputs is None and weights.kind == "int"):
        return _experts_packed(scheme, group) if group.experts else _packed(scheme, group)
    if scheme.form in ACTIVATIONS and weights.bits == 8 and weights.symmetric and not weights.dynamic:
        if weights.kind == "float" and weights.strategy in ("tensor", "channel", "block"):
            return _fp8(scheme, group)
        if weights.kind == "int" and inputs is not None and inputs.kind == "int" and inputs.bits == 8:
            return _int8(scheme, group)
    scheme_text = f"{weights.bits}-bit {weights.kind} weights by {weights.strategy} in format {scheme.form}"
    return Kernel("", problem=f"vLLM has no scheme for {scheme_text}")


def _packed(scheme: LayerScheme, group: Group) -> Kernel:
    bits, size = scheme.weights.bits, scheme.weights.group
    if bits not in (4, 8):
        return Kernel("", problem=f"packed weights of {bits} bits are not read, 4 and 8 are")
    if size is None and scheme.weights.strategy != "channel":
        return Kernel("", problem="packed weights need a group_size or a scale per channel")
    if size is not None and size not in (*MARLIN_GROUPS, *TRITON_GROUPS):
        return Kernel(
            "", problem=f"no kernel takes groups of {size}; {', '.join(map(str, MARLIN_GROUPS))} work"
        )
    if size in TRITON_GROUPS:
        if bits == 4:
            return Kernel("Triton", "any")
        return Kernel("", problem=f"no kernel takes groups of {size} of 8-bit weights")
    inputs, outputs = _size(scheme, group)
    fits = (
        size in (None, *MACHETE_GROUPS) and not inputs % MACHETE_SHAPE[0] and not outputs % MACHETE_SHAPE[1]
    )
    if bits == 8 and not scheme.weights.symmetric:
        if fits:
            return Kernel("Machete", "9.0 only")
        return Kernel(
            "", problem="8-bit weights with zero points run in Machete alone, which cannot take this shape"
        )
    return Kernel("Machete", "9.0; Marlin from 7.5") if fits else Kernel("Marlin", "7.5 and more")


def _experts_packed(scheme: LayerScheme, group: Group) -> Kernel:
    weights = scheme.weights
    if weights.bits not in (4, 8):
        return Kernel("", problem=f"packed experts of {weights.bits} bits are not read, 4 and 8 are")
    if _experts_marlin(scheme, group, 1):
        return Kernel("Marlin for experts", "7.5 and more")
    if scheme.form == "awq":
        return Kernel("Triton for experts", "7.0 and more")
    if weights.strategy != "group" or not weights.symmetric or weights.actorder in ("group", "dynamic"):
        why = "Marlin cannot take the experts' shape, and the other kernel takes symmetric groups alone"
        return Kernel("", problem=why)
    return Kernel("Triton for experts", "7.0 and more")


def _experts_marlin(scheme: LayerScheme, group: Group, gpus: int) -> bool:
    """``check_moe_marlin_supports_layer``: the hidden size by 128, a GPU's share of the inner size by its group."""
    size = scheme.weights.group or 0
    for module in group.modules:
        outputs, inputs = module.shape(scheme.weights.bits)
        hidden, inner = (outputs, inputs) if _by_rows(module) else (inputs, outputs)
        if hidden % 128 or inner % gpus or (inner // gpus) % max(64, size):
            return False
    return size in (0, *MARLIN_GROUPS)


def _fp8(scheme: LayerScheme, group: Group) -> Kernel:
    weights, inputs = scheme.weights, scheme.inputs
    if weights.strategy == "block":
        if weights.block != (BLOCK, BLOCK):
            return Kernel("", problem=f"blocks of {weights.block}, and only {BLOCK} x {BLOCK} are multiplied")
        odd = [] if group.experts else [m for m in group.modules[:-1] if m.shape(8)[0] % BLOCK]
        if odd:
            why = f"{odd[0].last} has {odd[0].shape(8)[0]} outputs, and what stands before others in a fused module must fill blocks of {BLOCK}"
            return Kernel("", problem=why)
    if inputs is None:
        return Kernel("Marlin (weights alone)", "7.5 and more")
    if inputs.kind != "float" or (
        not inputs.dynamic and (inputs.strategy != "tensor" or not inputs.symmetric)
    ):
        return Kernel("", problem=f"FP8 weights with {inputs.kind} activations by {inputs.strategy}")
    if group.experts and weights.strategy != "block":
        pair = (weights.strategy, inputs.strategy)
        if pair not in (("tensor", "tensor"), ("channel", "token")):
            return Kernel("", problem=f"experts with weights by {pair[0]} and activations by {pair[1]}")
    name = "CUTLASS or DeepGEMM FP8 by block" if weights.strategy == "block" else "CUTLASS FP8"
    return Kernel(name, "8.9 and more; Marlin (weights alone) from 7.5")


def _int8(scheme: LayerScheme, group: Group) -> Kernel:
    inputs = scheme.inputs
    pair = (scheme.weights.strategy, inputs.strategy if inputs else "")
    if pair[0] not in ("tensor", "channel") or pair[1] not in ("tensor", "token"):
        return Kernel("", problem=f"8-bit integers with weights by {pair[0]} and activations by {pair[1]}")
    if group.experts and pair != ("channel", "token"):
        return Kernel(
            "",
            problem=f"experts in 8-bit integers need scales by channel and token, not {pair[0]} and {pair[1]}",
        )
    return Kernel("CUTLASS INT8", "7.5 to 9.0")


def _size(scheme: LayerScheme, group: Group) -> tuple[int, int]:
    """Inputs of a group, and the outputs of all its modules together."""
    shapes = [module.shape(scheme.weights.bits) for module in group.modules]
    return shapes[0][1], sum(outputs for outputs, _ in shapes)


def _by_rows(module: Module) -> bool:
    return module.last in ROWS


def unsplittable(scheme: LayerScheme, group: Group, gpus: int, heads: Heads) -> str:
    """Why ``group`` cannot be split over ``gpus``; empty when it can."""
    if group.experts and scheme.form in ("awq", PACKED) and _experts_marlin(scheme, group, gpus):
        return ""
    return next(_unsplittable(scheme, group, gpus, heads), "")


def _unsplittable(scheme: LayerScheme, group: Group, gpus: int, heads: Heads) -> Iterator[str]:
    weights = scheme.weights
    packed = 32 // weights.bits if scheme.form in ("awq", PACKED) else 1
    for module in group.modules:
        outputs, inputs = module.shape(weights.bits)
        if module.last in WHOLE:
            continue
        if module.last in ("k_proj", "v_proj") and heads.keys < gpus:
            outputs *= gpus // heads.keys  # every GPU holds a whole head
        width, what = (inputs, "inputs") if _by_rows(module) else (outputs, "outputs")
        unit = packed if what == "inputs" or scheme.form == "awq" else 1
        if weights.strategy == "group" and what == "inputs" and weights.group and weights.group < inputs:
            unit = weights.group
        if weights.strategy == "block":
            unit = BLOCK
        if width % gpus or (width // gpus) % unit:
            yield f"{module.last}: {width} {what} in {gpus} parts are no multiples of {unit}"
