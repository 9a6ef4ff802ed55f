"""The ggml types that a search chooses from, by the width of a matrix."""

from __future__ import annotations

from quantool.runtime.toolchain import ggml_types

K_QUANTS = ("q2_k", "iq3_xxs", "q3_k", "iq3_s", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
"""For rows that blocks of 256 divide."""
OTHERS = ("q4_0", "iq4_nl", "q5_0", "q5_1", "q8_0")
"""For rows that only blocks of 32 divide."""
SLOW = frozenset({"iq3_xxs", "iq3_s"})
"""Types by code books, which llama.cpp's CPU kernels unpack at about half the speed of K-quants of their size."""
SLOW_BELOW = 4.0
"""Bits a weight below which the slow types take part: there a K-quant of the same size loses up to twice as much."""
NEEDS_MATRIX = frozenset({"iq3_xxs"})
"""Refused by llama-quantize where it has no importance of a matrix (src/llama-quant.cpp, ``tensor_requires_imatrix``)."""
COARSE = {256: "q3_k", 32: "q4_0"}
FINE = {256: "q6_k", 32: "q8_0"}
"""By block: the types whose divergence is measured; that of the others follows from their squared error."""


def block_of(width: int) -> int:
    """The block that divides rows of ``width``: 256, 32, or 0 for none, which llama-quantize leaves as F16."""
    return next((block for block in (256, 32) if width % block == 0), 0)


def types_for(width: int, *, importance: bool) -> tuple[str, ...]:
    """The types for rows of ``width`` weights; ``importance``: whether there is an importance of the matrix."""
    block = block_of(width)
    known = ggml_types()
    named = {256: K_QUANTS, 32: OTHERS}.get(block, ())
    return tuple(kind for kind in named if kind in known and (importance or kind not in NEEDS_MATRIX))
