"""How quantized checkpoints store a weight: the tensors that stand for it, and its numbers, some rows at a time.

==============  =====================================================================  ==========================================
layout          tensors                                                                source
==============  =====================================================================  ==========================================
``scaled``      ``w`` (8-bit float, int8), ``w_scale`` or ``w_scale_inv``              compressed-tensors 0.19 ``naive_quantized``;
                [, ``w_zero_point``]; one scale a tensor, row, block or group          DeepSeek-V3's ``inference/kernel.py``
``packed``      ``weight_packed``, ``weight_scale``, ``weight_shape``                  compressed-tensors 0.19 ``pack_quantized``
                [, ``weight_zero_point``, ``weight_g_idx``]
``mxfp4``       ``w_blocks`` [n, rows, groups, 16], ``w_scales`` [n, rows, groups]     transformers 5.17 ``integrations/mxfp4.py``
``nvfp4``       ``weight_packed``, ``weight_scale``, ``weight_global_scale``;          compressed-tensors 0.19 ``nvfp4``;
                or ``weight``, ``weight_scale``, ``weight_scale_2``                    ModelOpt 0.3x ``nvfp4_tensor.py``
``autoawq``     ``qweight``, ``qzeros``, ``scales``                                    ``int4_layouts``
``gptq``        ``qweight`` [in / words, out], ``qzeros``, ``scales``, ``g_idx``       AutoGPTQ 0.7.1 ``qlinear_cuda_old.py``
==============  =====================================================================  ==========================================

Numbers are computed in float32 and rounded by the caller, once. For scales in the target's own precision that gives the
bits that compressed-tensors and transformers make of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantool.errors import SourceError
from quantool.formats import int4_layouts
from quantool.formats.safetensors import TensorHeader

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32
WIDTHS = (2, 4, 8)
"""Bits of packed numbers that fill a word."""
EIGHT_BIT = {"F8_E4M3", "F8_E5M2", "I8"}
MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of E2M1 (OCP Microscaling Formats 1.0, table 5); the byte of a scale is its exponent and 127."""
MXFP4_GROUP, NVFP4_GROUP = 32, 16

TRANSPOSED = {"autoawq", "gptq"}
"""Layouts whose ``PARTS`` have the rows of the weight as columns."""

Rows = Callable[[str, slice], "Tensor"]
"""Part and rows (or, of layouts that store the transpose, columns) to that piece of the stored tensor."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight that several stored tensors stand for; ``shape`` is that of the weight."""

    name: str
    layout: str
    parts: Mapping[str, TensorHeader]
    shape: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    """``scaled``: neighbours along each dimension that share a scale."""
    bits: int = 0
    offset: int = 0
    """``gptq``: what is added to a stored zero point."""

    @property
    def step(self) -> int:
        """Rows that can be read together without the rest: a multiple of these."""
        if self.layout == "scaled":
            return self.blocks[0] if self.blocks else 1
        return {"packed": WORD, "autoawq": int4_layouts.PER_WORD, "gptq": WORD}.get(self.layout, 1)

    def numbers(self, read: Rows, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` of the weight in float32; ``first`` is a multiple of ``step``."""
        kind: Callable[[PackedWeight, Rows, slice], Tensor] = {
            "scaled": _scaled, "packed": _packed, "mxfp4": _mxfp4, "nvfp4": _nvfp4, "autoawq": _autoawq, "gptq": _gptq,
        }[self.layout]  # fmt: skip
        return kind(self, read, slice(first, last))

    @property
    def stored(self) -> TensorHeader:
        """The part that holds the numbers: its file is that of the weight."""
        return next(iter(self.parts.values()))


def scaled(name: str, parts: Mapping[str, TensorHeader], block: Sequence[int]) -> PackedWeight:
    """``parts``: weight, scale [, zero_point]; ``block`` is the configuration's, for scales that it does not fit evenly."""
    shape, grid = parts["weight"].shape, parts["scale"].shape
    if math.prod(grid) == 1:
        return PackedWeight(name, "scaled", parts, shape)
    if len(grid) != len(shape):
        raise misfit(name, parts)
    blocks = [
        _block(size, count, wanted)
        for size, count, wanted in zip(shape, grid, _aligned(block, shape), strict=True)
    ]
    if 0 in blocks:
        raise misfit(name, parts)
    return PackedWeight(name, "scaled", parts, shape, tuple(blocks))


def _aligned(block: Sequence[int], shape: Sequence[int]) -> list[int]:
    """The block's sizes for the last dimensions, 0 for those before."""
    return [0] * (len(shape) - len(block)) + [*block][-len(shape) :]


def _block(size: int, count: int, wanted: int) -> int:
    """Neighbours that share one of ``count`` scales; 0 where it cannot be told."""
    if wanted and -(-size // wanted) == count:
        return wanted
    return size // count if count and size % count == 0 else 0


def packed(name: str, parts: Mapping[str, TensorHeader], columns: int) -> PackedWeight:
    """``parts``: packed, scale, shape [, zero_point, g_idx]; ``columns`` of the weight."""
    if len(parts["packed"].shape) != 2 or parts["packed"].dtype != "I32" or len(parts["scale"].shape) != 2:
        raise misfit(name, parts)
    rows, words = parts["packed"].shape
    width = next((bits for bits in WIDTHS if -(-columns * bits // WORD) == words), 0)
    if not width or parts["scale"].shape[0] != rows or columns % parts["scale"].shape[1]:
        raise misfit(name, parts)
    return PackedWeight(name, "packed", parts, (rows, columns), bits=width)


def mxfp4(name: str, parts: Mapping[str, TensorHeader]) -> PackedWeight:
    """``parts``: blocks, scales. The weight is [n, columns, rows]: gpt-oss multiplies from the right."""
    blocks, scales = parts["blocks"].shape, parts["scales"].shape
    if len(blocks) != 4 or blocks[:3] != scales or 2 * blocks[3] != MXFP4_GROUP:
        raise misfit(name, parts)
    return PackedWeight(name, "mxfp4", parts, (blocks[0], blocks[2] * MXFP4_GROUP, blocks[1]))


def nvfp4(name: str, parts: Mapping[str, TensorHeader]) -> PackedWeight:
    """``parts``: packed, scale, and either global, by which scales are divided, or second, by which they are multiplied."""
    packed, scale = parts["packed"], parts["scale"]
    fits = packed.dtype == "U8" and len(packed.shape) == len(scale.shape) == 2
    if not fits or (packed.shape[0], 2 * packed.shape[1]) != (scale.shape[0], NVFP4_GROUP * scale.shape[1]):
        raise misfit(name, parts)
    return PackedWeight(name, "nvfp4", parts, (packed.shape[0], 2 * packed.shape[1]))


def autoawq(name: str, parts: Mapping[str, TensorHeader]) -> PackedWeight:
    """``parts``: qweight, qzeros, scales."""
    (columns, words), (groups, rows) = parts["qweight"].shape, parts["scales"].shape
    if words * int4_layouts.PER_WORD != rows or parts["qzeros"].shape != (groups, words) or columns % groups:
        raise misfit(name, parts)
    return PackedWeight(name, "autoawq", parts, (rows, columns), bits=int4_layouts.BITS)


def gptq(name: str, parts: Mapping[str, TensorHeader], offset: int) -> PackedWeight:
    """``parts``: qweight, qzeros, scales, g_idx; ``offset`` is what the version of the layout adds to zero points."""
    (words, rows), (columns,), (groups, _) = (parts[part].shape for part in ("qweight", "g_idx", "scales"))
    bits = WORD * words // columns if columns else 0
    fits = bits in WIDTHS and columns * bits == WORD * words and parts["scales"].shape == (groups, rows)
    if not fits or parts["qzeros"].shape != (groups, rows * bits // WORD):
        raise misfit(name, parts)
    return PackedWeight(name, "gptq", parts, (rows, columns), bits=bits, offset=offset)


def misfit(name: str, parts: Mapping[str, TensorHeader]) -> SourceError:
    """The error for tensors that cannot stand for one weight."""
    shapes = ", ".join(f"{part} {tensor.dtype} {list(tensor.shape)}" for part, tensor in parts.items())
    return SourceError(
        f"{name}: its parts do not fit each other: {shapes}",
        hint="the checkpoint is damaged, or its layout is one that quantool cannot read: start from the bf16 checkpoint",
    )


def _whole(weight: PackedWeight, read: Rows, part: str) -> Tensor:
    return read(part, slice(0, weight.parts[part].shape[0] if weight.parts[part].shape else 0))


def _power(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents (E8M0)."""
    import torch

    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127)
    return scale.float()


def _scaled(weight: PackedWeight, read: Rows, rows: slice) -> Tensor:
    values = read("weight", rows).float()
    scale = _power(_whole(weight, read, "scale"))
    if "zero_point" in weight.parts:
        values -= _spread(weight, _whole(weight, read, "zero_point").float(), rows)
    if len(weight.blocks) == 2 and all(
        size % block == 0 for size, block in zip(values.shape, weight.blocks, strict=True)
    ):
        (high, wide), first = weight.blocks, rows.start // weight.blocks[0]
        tiles = values.view(-1, high, values.shape[1] // wide, wide)
        tiles *= scale[first : first + len(tiles), None, :, None]
        return values
    return values.mul_(_spread(weight, scale, rows))


def _spread(weight: PackedWeight, grid: Tensor, rows: slice) -> Tensor:
    """One number for each element of the ``rows``, of a grid with one for each block."""
    if not weight.blocks:
        return grid.reshape(())
    first = weight.blocks[0]
    grid = grid[rows.start // first : -(-rows.stop // first)]
    for axis, block in enumerate(weight.blocks):
        size = rows.stop - rows.start if axis == 0 else weight.shape[axis]
        if block > 1 and grid.shape[axis] > 1:
            grid = grid.repeat_interleave(block, axis).narrow(axis, 0, size)
    return grid


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of ``bits`` from int32 words along the last dimension, lowest bits first, as int32."""
    import torch

    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    numbers = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return numbers.reshape(*words.shape[:-1], -1)


def _packed(weight: PackedWeight, read: Rows, rows: slice) -> Tensor:
    columns, middle = weight.shape[1], 1 << (weight.bits - 1)
    values = unpacked(read("packed", rows), weight.bits)[:, :columns] - middle
    scale = read("scale", rows).float()
    if "zero_point" in weight.parts:
        per_word = WORD // weight.bits
        words = read("zero_point", slice(rows.start // per_word, -(-rows.stop // per_word)))
        zeros = unpacked(words.T, weight.bits).T[: len(values)] - middle
    else:
        zeros = values.new_zeros(scale.shape)
    column = _group_of_column(weight, read, columns, scale.shape[1])
    return (values - zeros[:, column]).float() * scale[:, column]


def _group_of_column(weight: PackedWeight, read: Rows, columns: int, groups: int) -> Tensor:
    import torch

    if "g_idx" in weight.parts:
        found = _whole(weight, read, "g_idx").long()
        if (found != -1).all():  # -1: no order of its own
            return _checked_groups(weight, found, groups)
    return torch.arange(columns) // (columns // groups)


def _checked_groups(weight: PackedWeight, found: Tensor, groups: int) -> Tensor:
    if int(found.min()) < 0 or int(found.max()) >= groups:
        raise SourceError(f"{weight.name}: g_idx names group {int(found.max())} of {groups}")
    return found


def _mxfp4(_: PackedWeight, read: Rows, rows: slice) -> Tensor:
    import torch

    scales = read("scales", rows)
    values = _halves(read("blocks", rows))
    values *= torch.ldexp(torch.ones(scales.shape), scales.int() - 127).unsqueeze(-1)
    return values.flatten(-2).transpose(1, 2)


def _halves(pairs: Tensor) -> Tensor:
    """Two E2M1 numbers for each byte along the last dimension: its low half, then its high half."""
    import torch

    table = torch.tensor(MXFP4)
    both = torch.stack([table.repeat(16), table.repeat_interleave(16)], -1)
    return torch.nn.functional.embedding(pairs.int(), both).flatten(-2)


def _nvfp4(weight: PackedWeight, read: Rows, rows: slice) -> Tensor:
    scale = read("scale", rows).float()
    if "global" in weight.parts:
        scale = scale / _whole(weight, read, "global").float().reshape(())
    else:
        scale = scale * _whole(weight, read, "second").float().reshape(())
    values = _halves(read("packed", rows)).view(*scale.shape, NVFP4_GROUP)
    return (values * scale.unsqueeze(-1)).flatten(1)


def _autoawq(_: PackedWeight, read: Rows, rows: slice) -> Tensor:
    import torch

    words = slice(rows.start // int4_layouts.PER_WORD, -(-rows.stop // int4_layouts.PER_WORD))
    shifts = int4_layouts.BITS * torch.tensor(int4_layouts.ORDER).argsort().int()

    def numbers(part: str) -> Tensor:
        return ((read(part, words).unsqueeze(-1) >> shifts) & 15).flatten(1)

    weights, zeros, scales = numbers("qweight"), numbers("qzeros"), read("scales", rows).float()
    groups = weights.view(len(zeros), -1, weights.shape[1])
    return ((groups - zeros[:, None]) * scales[:, None]).flatten(0, 1).T


def _gptq(weight: PackedWeight, read: Rows, rows: slice) -> Tensor:
    per_word = WORD // weight.bits
    values = unpacked(read("qweight", rows).T, weight.bits)
    words = read("qzeros", slice(rows.start // per_word, -(-rows.stop // per_word)))
    zeros = unpacked(words, weight.bits).T[: len(values)] + weight.offset
    scale = read("scales", rows).float().T
    column = _checked_groups(weight, _whole(weight, read, "g_idx").long(), scale.shape[1])
    return (values - zeros[:, column]).float() * scale[:, column]
