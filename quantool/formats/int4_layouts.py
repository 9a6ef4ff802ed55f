"""Packed integer weights, and the numbers that they stand for: the layouts of AutoAWQ (GEMM) and compressed-tensors.

AutoAWQ, as ``awq/modules/linear/gemm.py`` of AutoAWQ 0.2.9 reads it: weights and zero points are unsigned 4-bit numbers, the
weight is transposed to [in, out], and eight neighbours along ``out`` share an int32, the one at position ``ORDER[k]``
in bits ``4 k``. ``qweight`` [in, out / 8], ``qzeros`` [in / group, out / 8], ``scales`` [in / group, out] in float16.

compressed-tensors 0.19 (``compressors/pack_quantized``): ``weight_packed`` [out, words], ``weight_scale`` [out, groups],
``weight_zero_point`` [words, groups] where there are any, and ``weight_shape``; its own function unpacks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales")
COMPRESSED_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
BITS = 4
PER_WORD = 8


def pack(values: torch.Tensor) -> torch.Tensor:
    """Numbers 0..15 [n, out] to int32 [n, out / 8]."""
    import torch

    ordered = values.to(torch.int64).view(len(values), -1, PER_WORD)[:, :, list(ORDER)]
    words = (ordered << (BITS * torch.arange(PER_WORD))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack``, as int32."""
    import torch

    shifts = BITS * torch.arange(PER_WORD)
    ordered = (words.to(torch.int64).unsqueeze(-1) >> shifts) & 15
    inverse = torch.tensor(ORDER).argsort()
    return ordered[:, :, inverse].reshape(len(words), -1).to(torch.int32)


def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight [out, in] in float32 that ``qweight``, ``qzeros`` and ``scales`` stand for."""
    weight, zeros, scales = unpack(parts["qweight"]), unpack(parts["qzeros"]), parts["scales"].float()
    group = len(weight) // len(zeros)
    return ((weight - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).T


def numbers(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] and zero points [out, groups] of a compressed-tensors layer, unsigned, as int32."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
        unpack_from_int32,
    )

    scale, shape = parts["weight_scale"], torch.Size(parts["weight_shape"].tolist())
    bits = parts["weight_packed"].shape[1] * 32 // shape[1]
    middle = 1 << (bits - 1)
    weight = unpack_from_int32(parts["weight_packed"], bits, shape).to(torch.int32) + middle
    if "weight_zero_point" not in parts:
        return weight, torch.full(scale.shape, middle, dtype=torch.int32)
    zeros = unpack_from_int32(parts["weight_zero_point"], bits, scale.shape, packed_dim=0)
    return weight, zeros.to(torch.int32) + middle


def dequantize_compressed(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight [out, in] in float32 that the parts of a compressed-tensors layer stand for."""
    weight, zeros = numbers(parts)
    scales = parts["weight_scale"].float()
    group = weight.shape[1] // scales.shape[1]
    return (weight - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
