"""A base GGUF in memory whose matrices can be given other bytes while it is loaded.

A matrix is quantized by ggml's own function and put where its unquantized values were, and its ``struct ggml_tensor`` is told
the new type: llama.cpp then computes with the kernels, and the rounding of activations, that a file of these types would
have. So a candidate costs one matrix, not a file; what was there is read again from the base.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantool.errors import QuantizationError
from quantool.formats.gguf_header import GgufHeader, GgufTensor, read_shards
from quantool.methods._llama_cpp.importance.activations import GgmlTensor, ggml_library
from quantool.runtime.llama_cpp import LlamaLog, fill, load_gguf
from quantool.runtime.toolchain import ggml_types

if TYPE_CHECKING:
    from torch import Tensor

READERS = (b"MUL_MAT", b"MUL_MAT_ID", b"GET_ROWS")
"""Operations whose first operand is a matrix of the model."""
CHUNK_ROWS = 64
"""Rows that a thread quantizes at once."""
ROWS_AT_ONCE = 1 << 22
"""Weights that are unpacked to float32 at once."""
NO_REUSE = {"LLAMA_GRAPH_REUSE_DISABLE": "1"}
"""Environment of a worker: a graph that is used again would keep strides of a matrix' earlier type."""

Importance = Mapping[str, NDArray[np.float32]]
"""By tensor name the mean squares of its input columns, [matrices, columns]."""


@dataclass
class LiveModel:
    """A loaded base; ``types`` says what is not as in the file."""

    path: Path
    handle: Any
    log: LlamaLog
    library: Any
    importance: Importance
    places: dict[str, GgufTensor]
    headers: dict[str, GgufHeader]
    pointers: dict[str, Any] = field(default_factory=dict)
    """``struct ggml_tensor`` of every matrix that the model's graph reads directly."""
    types: dict[str, str] = field(default_factory=dict)

    def quantize(self, name: str, kind: str) -> None:
        """Let the matrix ``name`` be of the ggml type ``kind`` (lower case), with the bytes that llama-quantize would write."""
        if self.types.get(name, self.places[name].type) == kind:
            return
        if kind == self.places[name].type:
            self.restore(name)
            return
        self._put(name, kind, self.quantized(name, kind))
        self.types[name] = kind

    def restore(self, name: str) -> None:
        """Give the matrix the bytes of the file again."""
        if self.types.pop(name, None) is not None:
            self._put(name, self.places[name].type, self.headers[name].read_data(self.places[name]))

    def apply(self, types: Mapping[str, str]) -> None:
        """Let the model have exactly ``types``, what is not named as in the file."""
        for name in [*self.types]:
            if name not in types:
                self.restore(name)
        for name, kind in types.items():
            self.quantize(name, kind)

    def _put(self, name: str, kind: str, values: NDArray[np.uint8]) -> None:
        known = ggml_types()[kind]
        tensor = self.pointers[name].contents
        tensor.type = known.number
        tensor.nb[0] = known.size
        tensor.nb[1] = tensor.ne[0] // known.block * known.size
        tensor.nb[2] = tensor.nb[1] * tensor.ne[1]
        tensor.nb[3] = tensor.nb[2] * tensor.ne[2]
        values = np.ascontiguousarray(values)
        self.library.ggml_backend_tensor_set(self.pointers[name], values.ctypes.data, 0, values.nbytes)

    def quantized(self, name: str, kind: str) -> NDArray[np.uint8]:
        """The matrix' bytes in the type ``kind``."""
        tensor = self.places[name]
        rows = tensor.elements // tensor.shape[-1]
        width = ggml_types()[kind]
        out = np.empty((rows, tensor.shape[-1] // width.block * width.size), np.uint8)
        step = max(1, ROWS_AT_ONCE // tensor.shape[-1])
        for start in range(0, rows, step):
            chosen = np.arange(start, min(start + step, rows))
            out[start : start + step] = self._rows(name, kind, self.values(name, chosen), chosen)
        return out.reshape(-1)

    def values(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the unquantized matrix (all its matrices one below the other) as float32."""
        tensor = self.places[name]
        raw = self.headers[name].read_data(tensor).reshape(tensor.elements // tensor.shape[-1], -1)[rows]
        if tensor.type == "bf16":
            wide = raw.view(np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32)
        return np.ascontiguousarray(raw.view({"f16": np.float16, "f32": np.float32}[tensor.type]), np.float32)

    def _rows(
        self, name: str, kind: str, values: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Quantize ``values``, rows ``rows`` of the matrix, each expert's by its own importance."""
        number = ggml_types()[kind].number
        if kind in ("f16", "f32"):
            kinds: dict[str, type[np.generic]] = {"f16": np.float16, "f32": np.float32}
            return values.astype(kinds[kind]).view(np.uint8)
        width = ggml_types()[kind]
        out = np.empty((len(values), values.shape[1] // width.block * width.size), np.uint8)
        important = self.importance.get(name)
        each = self.places[name].shape[-2] if len(self.places[name].shape) > 2 else self.places[name].elements
        self.library.ggml_quantize_init(number)

        def quantize(start: int, stop: int) -> None:
            weights = None
            if important is not None:
                weights = important[int(rows[start]) // each % len(important)].ctypes.data
            self.library.ggml_quantize_chunk(
                number, values[start:stop].ctypes.data, out[start:stop].ctypes.data, 0, stop - start,
                values.shape[1], weights,
            )  # fmt: skip

        cuts = np.flatnonzero(np.diff(rows // each)) + 1  # never across two experts
        edges = sorted({*range(0, len(values), CHUNK_ROWS), *cuts.tolist(), len(values)})
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(quantize, edges[:-1], edges[1:]))
        return out

    def error(self, name: str, kind: str, rows: NDArray[np.int64]) -> float:
        """Squared error of ``kind`` on ``rows``, weighted by importance, over the weighted squares of the values themselves."""
        values = self.values(name, rows)
        packed = self._rows(name, kind, values, rows)
        unpacked = np.empty_like(values)
        traits = self.library.ggml_get_type_traits(ggml_types()[kind].number).contents
        traits.to_float(packed.ctypes.data, unpacked.ctypes.data, values.size)
        important = self.importance.get(name)
        weights: NDArray[np.float32] | float = 1.0
        if important is not None:
            each = (
                self.places[name].shape[-2]
                if len(self.places[name].shape) > 2
                else self.places[name].elements
            )
            weights = important[rows // each % len(important)]
        total = float((weights * values**2).sum(dtype=np.float64))
        return float((weights * (unpacked - values) ** 2).sum(dtype=np.float64)) / total if total else 0.0


class _TypeTraits(ctypes.Structure):
    """The start of ``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@contextmanager
def live_model(path: Path, importance: Importance) -> Iterator[LiveModel]:
    """Load the base ``path`` (its first shard) so that its matrices can be written; freed afterwards."""
    library = _quantizer()
    headers = read_shards(path)
    places = {tensor.name: tensor for header in headers for tensor in header.tensors}
    holders = {tensor.name: header for header in headers for tensor in header.tensors}
    with LlamaLog() as log, load_gguf(path, log, writable=True) as handle:
        model = LiveModel(path, handle, log, library, importance, places, holders)
        model.pointers.update(_matrices(model))
        log.brief = True
        yield model


def _matrices(model: LiveModel) -> dict[str, Any]:
    """Where the matrices' structures lie, as a graph names them while it is computed once on a few tokens."""
    import llama_cpp

    readers = [number for number in range(60) if model.library.ggml_op_name(number) in READERS]
    found: dict[str, Any] = {}

    def visit(pointer: int, ask: bool, _data: object) -> bool:
        tensor = ctypes.cast(pointer, ctypes.POINTER(GgmlTensor)).contents
        if ask and tensor.op in readers and tensor.src[0]:
            weight = tensor.src[0].contents
            name = weight.name.decode()
            if name in model.places and not weight.view_src:
                found[name] = ctypes.cast(tensor.src[0], ctypes.POINTER(GgmlTensor))
        return False

    callback = llama_cpp.ggml_backend_sched_eval_callback(visit)
    with forward(model, sequences=1, context=32, rows=1, callback=callback) as run:
        run(np.zeros((1, 32), np.int32), range(31, 32))
    return found


class Forward:
    """A context of a loaded model: windows of tokens in, logits out."""

    def __init__(self, handle: Any, context: Any, batch: Any) -> None:
        import llama_cpp

        self.context, self.batch = context, batch
        vocabulary = llama_cpp.llama_model_get_vocab(handle)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(vocabulary))

    def __call__(self, ids: NDArray[np.int32], wanted: range) -> Tensor:
        """Logits [windows * wanted, vocabulary] of ``ids`` [windows, context]; a view that the next call overwrites."""
        import llama_cpp
        import torch

        windows, context = ids.shape
        places = np.tile(np.arange(context, dtype=np.int32), windows)
        sequences = np.repeat(np.arange(windows, dtype=np.int32), context)
        asked = (places >= wanted.start) & (places < wanted.stop)
        fill(self.batch, ids.ravel(), places, sequences, asked)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        code = llama_cpp.llama_decode(self.context, self.batch)
        if code:
            raise QuantizationError(f"llama_decode failed with {code} on {ids.size} tokens")
        shape = (int(asked.sum()), self.vocabulary)
        return torch.from_numpy(np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape=shape))


@contextmanager
def forward(
    model: LiveModel, *, sequences: int, context: int, rows: int, callback: Any = None
) -> Iterator[Forward]:
    """Room for ``sequences`` windows of ``context`` tokens at once, ``rows`` of each with logits; freed afterwards."""
    import llama_cpp as api

    parameters = api.llama_context_default_params()
    parameters.n_ctx = sequences * -(-context // 256) * 256
    parameters.n_batch = sequences * context
    parameters.n_ubatch = max(32, min(512, sequences * context))
    parameters.n_seq_max = sequences
    parameters.n_outputs_max = sequences * rows
    parameters.n_threads = parameters.n_threads_batch = os.cpu_count() or 1
    if callback is not None:
        parameters.cb_eval = callback
    with ExitStack() as stack:
        made = api.llama_init_from_model(model.handle, parameters)
        if not made:
            model.log.require_room()
            raise QuantizationError(f"llama.cpp cannot make a context: {model.log.reason()}")
        stack.callback(api.llama_free, made)
        batch = api.llama_batch_init(sequences * context, 0, 1)
        stack.callback(api.llama_batch_free, batch)
        yield Forward(model.handle, made, batch)


def _quantizer() -> Any:
    """Ggml's library with the functions that quantize, and that read and write a model's tensors."""
    library = ggml_library()
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    library.ggml_backend_tensor_set.argtypes = [pointer, pointer, size, size]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        pointer,
        pointer,
        integer,
        integer,
        integer,
        pointer,
    ]
    library.ggml_quantize_chunk.restype = size
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return library
