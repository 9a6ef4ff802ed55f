"""Experts that a checkpoint holds in one tensor a layer, as the matrices of single experts that lie in it end to end.

transformers 5 keeps the experts of a layer as ``gate_up_proj`` [experts, 2 x width, hidden] and ``down_proj`` [experts,
hidden, width] (``integrations/moe.py``); some checkpoints are stored so. A slice along the first axis is a matrix of its own
in the file, so headers are enough to tell them apart.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from quantool.formats.safetensors import TensorHeader

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def split_experts(headers: Mapping[str, TensorHeader], kept: Container[str] = ()) -> dict[str, TensorHeader]:
    """``headers`` with fused experts as single ones: ``experts.0.gate_proj.weight`` and so on.

    Left as they are: names in ``kept``, layouts with biases or with the axes the other way round (gpt-oss, Llama 4).
    """
    found: dict[str, TensorHeader] = {}
    for name, tensor in headers.items():
        place = name.removesuffix(GATE_UP if name.endswith(GATE_UP) else DOWN)
        pair = headers.get(f"{place}{GATE_UP}"), headers.get(f"{place}{DOWN}")
        if (
            place == name
            or name in kept
            or None in pair
            or f"{name}_bias" in headers
            or not _is_regular(*pair)
        ):
            found[name] = tensor
        else:
            parts = ("gate_proj", "up_proj") if name.endswith(GATE_UP) else ("down_proj",)
            found |= {single.name: single for single in _singles(tensor, f"{place}.experts", parts)}
    return found


def origin_of(name: str) -> str:
    """The tensor that a single expert's weight, named by ``split_experts``, lies in."""
    place, _, rest = name.partition(".experts.")
    return f"{place}{DOWN if 'down_proj' in rest else GATE_UP}"


def _is_regular(joined: TensorHeader | None, down: TensorHeader | None) -> bool:
    """Whether the two tensors of a layer have the shapes of the module's docstring."""
    if joined is None or down is None or len(joined.shape) != 3 or len(down.shape) != 3:
        return False
    experts, hidden, width = down.shape
    return joined.shape == (experts, 2 * width, hidden)


def _singles(tensor: TensorHeader, place: str, parts: tuple[str, ...]) -> list[TensorHeader]:
    experts, rows, columns = tensor.shape
    each = tensor.bytes // (experts * len(parts))
    singles = []
    for number in range(experts * len(parts)):
        name = f"{place}.{number // len(parts)}.{parts[number % len(parts)]}.weight"
        start = tensor.start + number * each
        shape = (rows // len(parts), columns)
        singles.append(replace(tensor, name=name, shape=shape, start=start, end=start + each))
    return singles
