"""The numbers that a GGUF's tensors are made of: scales of quantized blocks, and floats, read in samples.

Block layouts: ``ggml/src/ggml-common.h`` of llama.cpp. A file of at most ``WHOLE`` bytes is read whole; of a larger one
``RUNS`` runs of ``RUN`` bytes spread over each tensor, so that a file of 40 GB takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType
    from numpy.typing import NDArray

WHOLE = 64 << 20
RUNS = 64
RUN = 4096
WEIGHED = 64
"""Blocks of each tensor that are dequantized."""
ABSURD = 4.0
"""Times the largest weight of the source: no level rounds a weight up to that."""

FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
SCALES = {
    **dict.fromkeys(("Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Where in a block its float16 scales lie, bytes; MXFP4, NVFP4 and IQ1_M have others (``_scales``)."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor with its data: ``shape`` as numpy has it, ``data`` the bytes as they are stored."""

    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    bytes: int
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """Which blocks were read of a tensor: rows of raw bytes, [blocks, bytes of one]."""

    raw: NDArray[np.uint8]
    blocks: int


def inspect(tensors: Sequence[StoredTensor], largest: float | None) -> dict[str, Any]:
    """Look at ``tensors`` of one file; ``largest`` is the largest magnitude among the source's weights, if known.

    Result: ``blocks`` and ``read`` (a float counts as a block), and ``problems``, sentences with a tensor's name.
    """
    whole = sum(tensor.bytes for tensor in tensors) <= WHOLE
    problems: list[str] = []
    blocks = read = 0
    for tensor in tensors:
        sample = _sample(tensor, whole=whole)
        blocks += sample.blocks
        read += len(sample.raw)
        problem = _problem(tensor, sample, largest)
        if problem:
            problems.append(f"{tensor.name}: {problem}")
    return {"blocks": blocks, "read": read, "problems": problems}


def alike(one: StoredTensor, other: StoredTensor) -> bool | None:
    """Whether two tensors hold the same numbers as far as samples tell; None where their types differ."""
    if one.tensor_type != other.tensor_type or one.shape != other.shape:
        return None
    whole = one.bytes <= WHOLE
    return bool((_sample(one, whole=whole).raw == _sample(other, whole=whole).raw).all())


def _sample(tensor: StoredTensor, *, whole: bool) -> Sample:
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES

    size = GGML_QUANT_SIZES[tensor.tensor_type][1]
    raw = np.asarray(tensor.data).view(np.uint8).reshape(-1, size)
    run = max(1, RUN // size)
    if whole or len(raw) <= RUNS * run:
        return Sample(raw, len(raw))
    starts = np.linspace(0, len(raw) - run, RUNS).astype(int)
    return Sample(np.concatenate([raw[start : start + run] for start in starts]), len(raw))


def _problem(tensor: StoredTensor, sample: Sample, largest: float | None) -> str:
    import numpy as np

    kind = tensor.tensor_type.name
    scales = _scales(kind, sample.raw)
    if scales is None:
        return ""
    broken = int(np.count_nonzero(~np.isfinite(scales).all(axis=1)))
    if broken:
        what = "values" if kind in FLOATS else "blocks with a scale"
        return f"{broken} of {len(sample.raw)} {what} that are NaN or infinite"
    if len(tensor.shape) < 2:
        return ""
    if not scales.any():
        return f"every one of {len(sample.raw)} {'values' if kind in FLOATS else 'scales'} is 0"
    magnitude = _magnitude(tensor, sample.raw)
    if largest is not None and magnitude is not None and magnitude > ABSURD * largest:
        return f"weights reach {magnitude:.4g}, the source's no more than {largest:.4g}"
    return ""


def _scales(kind: str, raw: NDArray[np.uint8]) -> NDArray[np.floating[Any]] | None:
    """The scales of blocks [blocks, scales of one], or the values of floats; None for integers."""
    import numpy as np

    if kind == "BF16":
        return _bf16(raw)
    if kind in FLOATS:
        return raw.view(FLOATS[kind])
    if kind in SCALES:
        pairs = [np.ascontiguousarray(raw[:, start : start + 2]).view("<f2") for start in SCALES[kind]]
        return np.concatenate(pairs, axis=1)
    if kind == "MXFP4":  # E8M0: 255 is NaN
        return np.where(raw[:, :1] == 255, np.nan, 1.0)
    if kind == "NVFP4":  # UE4M3: 127 is NaN
        return np.where(raw[:, :4] == 127, np.nan, raw[:, :4].astype(np.float32))
    if kind == "IQ1_M":  # a float16 in the upper four bits of four words
        words = np.ascontiguousarray(raw[:, 48:56]).view("<u2")
        packed = (
            (words[:, :1] >> 12)
            | ((words[:, 1:2] >> 8) & 0x00F0)
            | ((words[:, 2:3] >> 4) & 0x0F00)
            | (words[:, 3:4] & 0xF000)
        )
        return packed.astype("<u2").view("<f2")
    return None


def _bf16(raw: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
    import numpy as np

    return (np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _magnitude(tensor: StoredTensor, raw: NDArray[np.uint8]) -> float | None:
    """Largest magnitude of the weights in some of the blocks; None for a type that gguf cannot dequantize."""
    import numpy as np
    from gguf.quants import dequantize

    kind = tensor.tensor_type.name
    if kind in FLOATS:
        values = _bf16(raw) if kind == "BF16" else raw.view(FLOATS[kind])
        return float(np.abs(values.astype(np.float64)).max())
    chosen = raw[:: max(1, len(raw) // WEIGHED)]
    try:
        values = dequantize(np.ascontiguousarray(chosen), tensor.tensor_type)
    except NotImplementedError:
        return None
    return float(np.abs(values).max())
