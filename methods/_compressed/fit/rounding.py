"""What a scheme leaves of a weight: rounded to nearest and back, as compressed-tensors does without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantool.methods._compressed.schemes import BLOCK, WeightScheme

if TYPE_CHECKING:
    from torch import Tensor

FP8_MAX = 448.0
"""Largest number of E4M3."""


def rounded(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """The weight [out, in] after it was quantized and dequantized, float32.

    Scales are those of compressed-tensors 0.19 (``quantization/utils/helpers.py``, ``calculate_qparams``): the largest
    magnitude over half the span of the integers, or over 448 for E4M3; with zero points the span from least to largest.
    """
    import torch
    from torch.nn.functional import pad

    rows, columns = weight.shape
    full = weight.to(torch.float32)
    if scheme.strategy == "block":
        full = pad(full, (0, -columns % BLOCK, 0, -rows % BLOCK))
        high, wide = full.shape
        tiles = full.reshape(high // BLOCK, BLOCK, wide // BLOCK, BLOCK).transpose(1, 2)
        back = _grid(tiles.flatten(2), scheme).view_as(tiles).transpose(1, 2)
        return back.reshape(high, wide)[:rows, :columns]
    if scheme.strategy == "tensor":
        return _grid(full.reshape(1, -1), scheme).view_as(full)
    parts = full.reshape(rows, -1, scheme.group) if scheme.strategy == "group" else full
    return _grid(parts, scheme).view_as(full)


def _grid(values: Tensor, scheme: WeightScheme) -> Tensor:
    """Rounded to the grid that each vector of the last dimension spans."""
    import torch

    top = values.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if scheme.stored == "F8_E4M3":
        scale = top / FP8_MAX
        return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32) * scale
    levels = 2**scheme.bits - 1
    if scheme.symmetric:
        scale, zero = top / (levels / 2), torch.zeros_like(top)
    else:
        low, high = values.amin(-1, keepdim=True).clamp_max(0), values.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / levels).clamp_min(torch.finfo(torch.float32).tiny)
        zero = (-(2 ** (scheme.bits - 1)) - low / scale).round()
    least, most = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    integers = (values / scale + zero).round().clamp(least, most)
    back: Tensor = (integers - zero) * scale
    return back
