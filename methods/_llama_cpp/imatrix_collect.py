"""The child that computes an importance matrix: mean squared activations of every weight's input columns.

As tools/imatrix/imatrix.cpp of llama.cpp, through the ``cb_eval`` hook of the library: the same entries and counts; the
sums differ by the order of addition (8e-5 relative measured). Conversations keep their special tokens, because the ids
come from the source's own tokenizer.
"""

from __future__ import annotations

import ctypes
import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantool.errors import ConfigError, DependencyError, QuantizationError
from quantool.runtime.llama_cpp import LlamaLog, LoadError, fill, load_gguf
from quantool.runtime.worker import Report, preloaded

MIN_BATCH = 16  # imatrix.cpp ignores smaller matrix products
WINDOWS_PER_DECODE = 4
F32 = 0  # ggml.h: GGML_TYPE_F32


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h; its size is compared with ``ggml_tensor_overhead()`` before use."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.POINTER(_Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]
OBJECT_SIZE = 32  # ggml.c: sizeof(struct ggml_object), part of the overhead


@preloaded("transformers")
def tokenize(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Render and tokenize the calibration documents with the source's tokenizer.

    Request: ``config`` (the configuration), ``model`` (folder), ``output`` (.npy), ``context``, ``max_tokens``.
    Writes int32 [windows, context]; the first token of each window is BOS where the tokenizer adds one.
    Result: ``windows``, ``documents``, ``sha256`` of the ids.
    """
    from transformers import AutoTokenizer

    from quantool.config.schema import Config
    from quantool.texts import corpus

    config = Config.model_validate(request["config"])
    tokenizer = AutoTokenizer.from_pretrained(request["model"], trust_remote_code=config.trust_remote_code)
    documents = corpus.calibration(config)
    context, limit = request["context"], request["max_tokens"]
    ids: list[int] = []
    used = 0
    for document in documents:
        text = corpus.render(document, tokenizer)
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        used += 1
        report(min(len(ids), limit), limit)
        if len(ids) >= limit:
            break
    windows = min(len(ids), limit) // context
    if not windows:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens, fewer than one window of {context}",
            hint="give more text (dataset_path or dataset_id, sample_size)",
        )
    table = np.asarray(ids[: windows * context], np.int32).reshape(windows, context)
    probe = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is not None and probe and probe[0] == tokenizer.bos_token_id:
        table[:, 0] = tokenizer.bos_token_id
    with Path(request["output"]).open("wb") as file:
        np.save(file, table)
    return {"windows": windows, "documents": used, "sha256": hashlib.sha256(table.tobytes()).hexdigest()}


def collect(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run the base model over the windows and write the matrix in GGUF format.

    Request: ``base`` (GGUF), ``ids`` (.npy of ``tokenize``), ``output``, ``label`` (name of the text), ``gpu`` (bool).
    Result: ``entries``, ``chunks``, ``incomplete`` (expert tensors with experts that saw no token).
    """
    ids = np.load(request["ids"])
    collector = _Collector()
    _decode(request["base"], ids, collector, report, gpu=request["gpu"])
    _write(Path(request["output"]), collector, request["label"], ids)
    incomplete = [name for name, counts in collector.counts.items() if not counts.all()]
    return {"entries": len(collector.sums), "chunks": len(ids), "incomplete": incomplete}


class _Collector:
    """Sums of squares by weight name, [matrices, columns], and rows counted, [matrices]."""

    def __init__(self) -> None:
        from llama_cpp._ggml import libggml_base_path

        library = ctypes.CDLL(str(libggml_base_path / "libggml-base.so"))
        library.ggml_op_name.restype = ctypes.c_char_p
        library.ggml_tensor_overhead.restype = ctypes.c_size_t
        library.ggml_nbytes.restype = ctypes.c_size_t
        library.ggml_nbytes.argtypes = [ctypes.c_void_p]
        library.ggml_backend_tensor_get.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
        ]  # fmt: skip
        if library.ggml_tensor_overhead() != ctypes.sizeof(_Tensor) + OBJECT_SIZE:
            raise DependencyError("this llama-cpp-python has another struct ggml_tensor than quantool knows")
        operations = {library.ggml_op_name(number): number for number in range(60)}
        self.dense, self.sparse = operations[b"MUL_MAT"], operations[b"MUL_MAT_ID"]
        self.library = library
        self.sums: dict[str, NDArray[np.float32]] = {}
        self.counts: dict[str, NDArray[np.int64]] = {}
        self.failure: BaseException | None = None

    def callback(self, pointer: int, ask: bool, _data: object) -> bool:
        """``ggml_backend_sched_eval_callback``: nothing may be raised through C."""
        try:
            return self._visit(ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents, ask=ask)
        except BaseException as error:  # noqa: BLE001 - kept and raised outside
            self.failure = error
            return False

    def _visit(self, tensor: _Tensor, *, ask: bool) -> bool:
        if tensor.op not in (self.dense, self.sparse):
            return not ask
        weight, values = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        name = name.split("#")[1] if "#" in name else name
        if ask:
            if tensor.op == self.sparse:
                return True
            return bool(values.ne[1] >= MIN_BATCH and values.type == F32 and name.startswith("blk."))
        squares = np.square(self._read(values, np.float32))  # [ne3, ne2, ne1, ne0]
        if tensor.op == self.sparse:
            experts = self._read(tensor.src[2].contents, np.int32)[0, 0]  # [tokens, experts used]
            self._add_sparse(name, weight, squares[0], experts)
        else:
            self._add_dense(name, weight, squares)
        return True

    def _read(self, tensor: _Tensor, dtype: type[np.generic]) -> NDArray[Any]:
        """Copy a tensor (from the accelerator if need be) as [ne3, ne2, ne1, ne0]."""
        size = self.library.ggml_nbytes(ctypes.byref(tensor))
        buffer = np.empty(size, np.uint8)
        self.library.ggml_backend_tensor_get(ctypes.byref(tensor), buffer.ctypes.data, 0, size)
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        return np.lib.stride_tricks.as_strided(buffer.view(dtype), shape, strides)

    def _entry(
        self, name: str, matrices: int, columns: int, counted: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        sums = self.sums.setdefault(name, np.zeros((matrices, columns), np.float32))
        return sums, self.counts.setdefault(name, np.zeros(counted, np.int64))

    def _add_sparse(
        self, name: str, weight: _Tensor, squares: NDArray[np.float32], experts: NDArray[np.int32]
    ) -> None:
        """A mixture of experts: each token's row counts for the experts that it was sent to."""
        total = weight.ne[2]
        sums, counts = self._entry(name, total, squares.shape[-1], total)
        for slot in range(experts.shape[1]):
            rows = squares[:, slot % squares.shape[1]]
            for expert in np.unique(experts[:, slot]):
                chosen = experts[:, slot] == expert
                sums[expert] += rows[chosen].sum(0)
                counts[expert] += chosen.sum()

    def _add_dense(self, name: str, weight: _Tensor, squares: NDArray[np.float32]) -> None:
        matrices = weight.ne[2] * weight.ne[3]
        sums, counts = self._entry(name, matrices, squares.shape[-1], 1)
        for outer, block in enumerate(squares):
            for inner, rows in enumerate(block):
                sums[(outer % weight.ne[3]) * weight.ne[2] + inner % weight.ne[2]] += rows.sum(0)
        counts[0] += squares.shape[0] * squares.shape[1] * squares.shape[2] // matrices


def _decode(base: str, ids: NDArray[np.int32], collector: _Collector, report: Report, *, gpu: bool) -> None:
    """Feed all windows through the model, several sequences a batch, all outputs asked for."""
    import os

    import llama_cpp

    windows, context = ids.shape
    together = min(WINDOWS_PER_DECODE, windows)
    with ExitStack() as stack:
        log = stack.enter_context(LlamaLog())
        try:
            model = stack.enter_context(load_gguf(Path(base), log, gpu=gpu))
        except LoadError as error:
            raise QuantizationError(f"llama.cpp cannot load {Path(base).name}: {error.message}") from error
        callback = llama_cpp.ggml_backend_sched_eval_callback(collector.callback)
        shape = llama_cpp.llama_context_default_params()
        shape.n_ctx = shape.n_batch = context * together
        shape.n_ubatch = context
        shape.n_seq_max = together
        shape.n_threads = shape.n_threads_batch = os.cpu_count() or 1
        shape.cb_eval = callback
        state = llama_cpp.llama_init_from_model(model, shape)
        if not state:
            raise QuantizationError(
                f"llama.cpp cannot make a context of {context * together} tokens for {base}"
            )
        stack.callback(llama_cpp.llama_free, state)
        batch = llama_cpp.llama_batch_init(context * together, 0, 1)
        stack.callback(llama_cpp.llama_batch_free, batch)
        for start in range(0, windows, together):
            part = ids[start : start + together]
            fill(
                batch,
                part.ravel(),
                np.tile(np.arange(context, dtype=np.int32), len(part)),
                np.repeat(np.arange(len(part), dtype=np.int32), context),
                np.ones(part.size, bool),
            )
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)
            code = llama_cpp.llama_decode(state, batch)
            if collector.failure is not None:
                raise collector.failure
            if code != 0:
                raise QuantizationError(f"llama_decode failed with code {code} on {base}")
            report(min(start + together, windows) * context, windows * context)


def _write(path: Path, collector: _Collector, label: str, ids: NDArray[np.int32]) -> None:
    """The GGUF layout of tools/imatrix: ``<weight>.in_sum2`` and ``<weight>.counts``, no architecture."""
    import gguf

    if not collector.sums:
        raise QuantizationError("no activations were collected")
    broken = [name for name, sums in collector.sums.items() if not np.isfinite(sums).all()]
    if broken:
        raise QuantizationError(f"the activations of {', '.join(broken[:3])} are not finite")
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [label])
    writer.add_uint32("imatrix.chunk_count", len(ids))
    writer.add_uint32("imatrix.chunk_size", ids.shape[1])
    for name in sorted(collector.sums):
        counts = collector.counts[name].astype(np.float32).reshape(-1, 1)
        writer.add_tensor(f"{name}.in_sum2", collector.sums[name].reshape(len(counts), -1))
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
