"""The child that calls ``llama_model_quantize`` of llama-cpp-python, as tools/quantize/quantize.cpp does.

The library explains itself in its log only, ignores Ctrl-C inside the log callback and aborts on failed assertions: that
is why this is a child process, and why the parent gives it a temporary file to write.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError, DependencyError, QuantizationError, nearest
from quantool.methods._llama_cpp.importance.imatrix_file import read_matrix
from quantool.runtime.llama_cpp import LlamaLog, LoadError, load_gguf
from quantool.runtime.toolchain import ggml_types
from quantool.runtime.worker import Report

# [  12/ 291] blk.0.attn_k.weight - [ 2048, 256, 1, 1], type = f16, size = 1.00 MiB -> 0.28 MiB (q4_K)
TENSOR_LINE = re.compile(r"^\[ *(\d+)/ *(\d+)\] (\S+) +- \[([^\]]*)\], type = +(\S+), (.*)$")
DRY_TARGET = re.compile(r"\((\w+)\)$")
FULL = 1 << 20  # bytes: llama.cpp says only that a write failed, and a disk with less is why


def quantize(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Quantize one GGUF file.

    Request: ``base``, ``output`` (paths), ``ftype`` (e.g. ``MOSTLY_Q4_K_M``), ``copy``, ``settings`` (see
    ``_parameters``), ``imatrix`` (null, or ``path`` and ``label``; a null path in a dry run stands for one to come).
    Result: ``warnings`` (what llama.cpp logged as such), ``missing`` (tensors the importance matrix does not cover).
    """
    with QuantizeLog(report) as log:
        _run(request, Path(request["output"]), log, dry=False)
    missing = [line.rsplit(" ", 1)[1] for line in log.lines if "did not find weights for" in line]
    return {"warnings": [line for line in log.warnings if line], "missing": missing}


def rehearse(request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Dry runs on a GGUF header: ``runs`` (each with ``ftype``, ``copy``, ``settings``, ``imatrix``) on ``base``.

    Result: ``runs``, for each ``types`` (tensor name to ggml type name) and ``needs_imatrix``.
    """
    results = []
    for run in request["runs"]:
        with QuantizeLog() as log:
            _run({**run, "base": request["base"]}, Path(os.devnull), log, dry=True)
        results.append(
            {
                "types": log.types,
                "needs_imatrix": any("will require an imatrix" in line for line in log.lines),
            }
        )
    return {"runs": results}


def probe(request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Load a GGUF file (``path``) without its weights: a converter's exit code 0 is no proof that it loads.

    Result: ``tokens`` in its vocabulary. Raises QuantizationError with llama.cpp's reason.
    """
    import llama_cpp

    path, vocabulary = Path(request["path"]), request["vocabulary_only"]
    try:
        with LlamaLog() as log, load_gguf(path, log, vocabulary=vocabulary, weights=vocabulary) as model:
            return {"tokens": llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))}
    except LoadError as error:
        raise QuantizationError(f"llama.cpp cannot load {path.name}: {error.message}") from error


class QuantizeLog(LlamaLog):
    """What llama.cpp says of each tensor."""

    def __init__(self, report: Report | None = None) -> None:
        super().__init__(self._follow_tensors)
        self.report = report
        self.types: dict[str, str] = {}

    def _follow_tensors(self, line: str) -> None:
        if matched := TENSOR_LINE.match(line):
            number, total, name, _, before, rest = matched.groups()
            target = DRY_TARGET.search(rest)
            self.types[name] = target[1] if target else before
            if self.report:
                self.report(int(number), int(total))


def _run(request: dict[str, Any], output: Path, log: LlamaLog, *, dry: bool) -> None:
    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters, alive = _parameters(request)
    parameters.dry_run = dry
    base = request["base"]
    code = llama_cpp.llama_model_quantize(os.fsencode(base), os.fsencode(output), ctypes.byref(parameters))
    del alive
    if code != 0 and "iostream error" in log.reason() and shutil.disk_usage(output.parent).free < FULL:
        raise DependencyError(f"cannot write {output}: the disk is full")
    if code != 0:
        raise QuantizationError(f"llama_model_quantize failed on {Path(base).name}: {log.reason()}")


def _parameters(request: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Fill ``llama_model_quantize_params``; the second value keeps alive what it points to.

    ``settings``: ``threads`` (0: all cores), ``pure``, ``leave_output_tensor``, ``keep_split``, ``allow_requantize``,
    ``output_tensor_type``, ``token_embedding_type`` (ggml type names or null), ``tensor_types`` (regex to type name).
    """
    import llama_cpp

    settings = request["settings"]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{request['ftype']}")
    parameters.only_copy = request["copy"]
    parameters.nthread = settings["threads"]
    parameters.pure = settings["pure"]
    parameters.keep_split = settings["keep_split"]
    parameters.allow_requantize = settings["allow_requantize"]
    parameters.quantize_output_tensor = not settings["leave_output_tensor"]
    if settings["output_tensor_type"]:
        parameters.output_tensor_type = ggml_type(settings["output_tensor_type"])
    if settings["token_embedding_type"]:
        parameters.token_embedding_type = ggml_type(settings["token_embedding_type"])
    alive: list[Any] = []
    if settings["tensor_types"]:
        parameters.tt_overrides = _tensor_types(settings["tensor_types"], alive)
    if request["imatrix"] and request["imatrix"]["path"] is None:
        parameters.imatrix = _placeholder(alive)
    elif request["imatrix"]:
        parameters.imatrix, entries, chunks = _importance(Path(request["imatrix"]["path"]), alive)
        parameters.kv_overrides = _overrides(request["imatrix"], entries, chunks, alive)
    return parameters, alive


def ggml_type(name: str) -> int:
    """Number of a ggml type by its name (``q6_K``, any case); ConfigError naming the nearest otherwise."""
    known = ggml_types()
    if name.lower() not in known:
        raise ConfigError(f"unknown ggml type {name!r}", hint=nearest(name, list(known)))
    return known[name.lower()].number


def _tensor_types(types: dict[str, str], alive: list[Any]) -> Any:
    import llama_cpp

    array = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for entry, (pattern, name) in zip(array, types.items(), strict=False):
        entry.pattern = pattern.lower().encode()
        entry.type = ggml_type(name)
    alive.append(array)
    return ctypes.cast(array, type(llama_cpp.llama_model_quantize_params().tt_overrides))


def _importance(path: Path, alive: list[Any]) -> tuple[Any, int, int]:
    """Load an importance matrix: mean of squared activations per column.

    A row of a matrix (an expert) that saw no token counts as 1.0 throughout, as llama-quantize has it.
    """
    import llama_cpp
    import numpy as np

    matrix = read_matrix(path)
    array = (llama_cpp.llama_model_imatrix_data * (len(matrix.entries) + 1))()
    for entry, (name, (sums, counts)) in zip(array, matrix.entries.items(), strict=False):
        means = np.ones_like(sums)
        np.divide(sums, counts, out=means, where=counts > 0)
        values = np.ascontiguousarray(means.reshape(-1))
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
        alive.append(values)
    alive.append(array)
    pointer = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return pointer, len(matrix.entries), matrix.chunks


def _placeholder(alive: list[Any]) -> Any:
    """A matrix of one entry that no tensor has: enough for a dry run to choose types as with a matrix."""
    import llama_cpp

    array = (llama_cpp.llama_model_imatrix_data * 2)()
    value = (ctypes.c_float * 1)(1.0)
    array[0].name = b"placeholder"
    array[0].data = ctypes.cast(value, ctypes.POINTER(ctypes.c_float))
    array[0].size = 1
    alive += [array, value]
    return ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))


def _overrides(imatrix: dict[str, Any], entries: int, chunks: int, alive: list[Any]) -> Any:
    """The metadata that llama-quantize leaves about the importance matrix (file name only, no path)."""
    import llama_cpp

    array = (llama_cpp.llama_model_kv_override * 5)()
    values: tuple[tuple[bytes, str | int], ...] = (
        (b"quantize.imatrix.file", Path(imatrix["path"]).name),
        (b"quantize.imatrix.dataset", imatrix["label"]),
        (b"quantize.imatrix.entries_count", entries),
        (b"quantize.imatrix.chunks_count", chunks),
    )
    for entry, (key, value) in zip(array, values, strict=False):
        entry.key = key
        if isinstance(value, str):
            entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            entry.value.val_str = value.encode()[:127]
        else:
            entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            entry.value.val_i64 = value
    alive.append(array)
    return ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_kv_override))
