"""The rule of llama.cpp's pull request 15550 for a file's tensor types, to compare with: another implementation of it.

Each tensor's candidates are rated by what quantizing its rows does to them, weighed by the importance matrix: the squared error
over the squared norm of a row, the mean over the rows (outliers trimmed) times their number. A Lagrangian by bisection picks
one candidate of each tensor's convex hull under the budget, ``output.weight`` at a fifth of the price, and what is left of the
budget goes where it saves most. No model runs. As published with the default settings (no statistics of activations, the
squared error, no share of important tensors); rows are sampled at the same stride, from the middle of a step.
"""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantool.methods._llama_cpp.importance.imatrix_file import read_matrix
from quantool.runtime.toolchain import ggml_types

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor
    from numpy.typing import NDArray

TYPES = (
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "q3_k", "iq4_xs", "iq4_nl", "q4_k", "q5_k", "q6_k",
    "q8_0", "bf16",
)  # fmt: skip
NEEDS_MATRIX = frozenset(kind for kind in TYPES if kind.startswith("iq"))
FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""Where rows are no multiple of 256 (``tensor_type_fallback`` of src/llama-quant.cpp); all others become iq4_nl."""
PENALTY = 5.0
TRIM, FEWEST = 0.01, 50
LEAST_ROWS, MOST_ROWS, VALUES = 256, 4096, 1 << 19


@dataclass(frozen=True)
class Candidate:
    """A type for a tensor, the bytes it takes, the error it makes."""

    type: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Rated:
    """What the rule knows of a model: the hull of every tensor, and the bytes of all that it leaves alone."""

    hulls: Mapping[str, Sequence[Candidate]]
    fixed: int

    def types(self, budget: int) -> dict[str, str]:
        """Type by tensor for a file of at most ``budget`` bytes."""
        return choose(self.hulls, budget - self.fixed)


def rate(base: Path, matrix: Path) -> Rated:
    """Rate every tensor of the unquantized GGUF ``base``."""
    from gguf import GGUFReader

    entries = read_matrix(matrix).entries
    tensors = {tensor.name: tensor for tensor in GGUFReader(base).tensors if is_quantized(tensor)}
    hulls = {name: hull(candidates(tensor, _weights(entries, name))) for name, tensor in tensors.items()}
    return Rated(hulls, base.stat().st_size - sum(int(tensor.n_bytes) for tensor in tensors.values()))


def is_quantized(tensor: ReaderTensor) -> bool:
    """Whether llama-quantize may choose a type for it: a matrix, or several, but no norm and no router."""
    parts = tensor.name.split(".")
    matrix = sum(int(size) > 1 for size in tensor.shape) >= 2
    return parts[-1] == "weight" and matrix and not any("norm" in p or p == "ffn_gate_inp" for p in parts)


def _weights(
    entries: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]], name: str
) -> NDArray[np.float32] | None:
    """Mean squares of the inputs [experts, columns]; None for a tensor that the matrix does not know."""
    if name not in entries:
        return None
    sums, counts = entries[name]
    means = np.ones_like(sums)
    np.divide(sums, counts, out=means, where=counts > 0)
    return np.ascontiguousarray(means.reshape(len(counts), -1), dtype=np.float32)


def candidates(tensor: ReaderTensor, weights: NDArray[np.float32] | None) -> list[Candidate]:
    """Every type that the tensor's rows can have, rated."""
    columns, rows = int(tensor.shape[0]), int(tensor.shape[1])
    slices = _values(tensor).reshape(-1, rows, columns)
    samples = [part[_sampled(rows, columns, len(slices))] for part in slices]
    kinds = {_compatible(kind, columns) for kind in TYPES if weights is not None or kind not in NEEDS_MATRIX}
    found = []
    for kind in sorted(kinds):
        own = ggml_types()[kind]
        size = len(slices) * rows * (columns // own.block) * own.size
        error = sum(
            rows * row_error(sample, kind, None if weights is None else weights[number % len(weights)])
            for number, sample in enumerate(samples)
        )
        found.append(Candidate(kind, size, error))
    return found


def _values(tensor: ReaderTensor) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def _sampled(rows: int, columns: int, slices: int) -> slice:
    """The rows that stand for all of a matrix."""
    if rows <= 2 * LEAST_ROWS:
        return slice(None)
    scale = min(max((rows / MOST_ROWS) ** 0.5, 0.5), 2.0)
    count = max(LEAST_ROWS, min(round(VALUES * scale / slices / columns), rows, MOST_ROWS))
    stride = max(1, rows // count)
    return slice(stride // 2, stride // 2 + stride * count, stride)


def _compatible(kind: str, columns: int) -> str:
    if columns % ggml_types()[kind].block == 0:
        return kind
    other = FALLBACK.get(kind, "iq4_nl")
    return other if columns % ggml_types()[other].block == 0 else "f16"


def row_error(rows: NDArray[np.float32], kind: str, weights: NDArray[np.float32] | None) -> float:
    """Mean over rows [rows, columns] of the weighed squared error over the weighed squared norm, outliers trimmed."""
    change = (rounded(rows, kind, weights) - rows).astype(np.float64)
    scale = np.ones(rows.shape[1]) if weights is None else np.maximum(weights, 0).astype(np.float64)
    norms = (scale * rows.astype(np.float64) ** 2).sum(1)
    errors = np.divide((scale * change**2).sum(1), norms, out=np.zeros(len(rows)), where=norms > 1e-12)
    errors = np.sort(errors)
    cut = int(len(errors) * TRIM) if len(errors) >= FEWEST else 0
    return float(errors[cut : len(errors) - cut].mean())


def rounded(rows: NDArray[np.float32], kind: str, weights: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """What is left of rows [rows, columns] after ggml has quantized them."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    own = ggml_types()[kind]
    data = np.ascontiguousarray(rows, dtype=np.float32)
    out = np.empty((len(data), data.shape[1] // own.block * own.size), dtype=np.uint8)
    pointer = None if weights is None else np.ascontiguousarray(weights, dtype=np.float32).ctypes.data
    _ggml().ggml_quantize_chunk(
        own.number, data.ctypes.data, out.ctypes.data, 0, len(data), data.shape[1], pointer
    )
    return np.asarray(dequantize(out, GGMLQuantizationType(own.number)), dtype=np.float32).reshape(data.shape)


@cache
def _ggml() -> ctypes.CDLL:
    import llama_cpp

    (path,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    library = ctypes.CDLL(str(path))
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def hull(given: Sequence[Candidate]) -> list[Candidate]:
    """The candidates on the lower convex hull of error over bytes, the smallest first."""
    falling: list[Candidate] = []
    for one in sorted(given, key=lambda each: (each.bytes, each.error)):
        if not falling or one.error < falling[-1].error:
            falling.append(one)
    convex: list[Candidate] = []
    for one in falling:
        while len(convex) >= 2 and _slope(convex[-2], convex[-1]) >= _slope(convex[-1], one):
            convex.pop()
        convex.append(one)
    return convex


def _slope(left: Candidate, right: Candidate) -> float:
    return (right.error - left.error) / (right.bytes - left.bytes)


def choose(rated: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, str]:
    """One candidate of each tensor whose bytes are at most ``budget`` in all (or the smallest there are)."""
    low, high = 0.0, 1.0
    while _size(_priced(rated, high)) > budget and high < 2.0**60:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _size(_priced(rated, middle)) > budget else (low, middle)
    chosen = _priced(rated, high)
    places = {name: rated[name].index(one) for name, one in chosen.items()}
    left = budget - _size(chosen)
    waiting = [(-_gain(name, one, two), name, place) for name, all_ in rated.items()
               for place, (one, two) in enumerate(pairwise(all_))]  # fmt: skip
    heapq.heapify(waiting)
    while waiting:
        _, name, place = heapq.heappop(waiting)
        if places[name] != place:
            continue
        added = rated[name][place + 1].bytes - rated[name][place].bytes
        if added <= left:
            places[name], left = place + 1, left - added
    return {name: rated[name][place].type for name, place in places.items()}


def _gain(name: str, one: Candidate, two: Candidate) -> float:
    return (one.error - two.error) / (two.bytes - one.bytes) * (PENALTY if name == "output.weight" else 1.0)


def _priced(rated: Mapping[str, Sequence[Candidate]], price: float) -> dict[str, Candidate]:
    """The best of each tensor at a price of error for a bit."""
    return {
        name: min(all_, key=lambda one: one.error + 8 * one.bytes * price / (PENALTY if name == "output.weight" else 1.0))
        for name, all_ in rated.items()
    }  # fmt: skip


def _size(chosen: Mapping[str, Candidate]) -> int:
    return sum(one.bytes for one in chosen.values())
