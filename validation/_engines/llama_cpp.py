"""GGUF files in llama.cpp, through the low-level interface of llama-cpp-python.

Weights and contexts are apart: several files are held at once (their weights are mapped, not copied), while the memory
that one needs to compute is given back before the next one computes.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import QuantizationError
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.windows import scored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

BATCH_TOKENS = 2048  # llama-perplexity's default n_batch
UBATCH_TOKENS = 512
CELLS = 256
OUTPUT_BYTES = 64 << 20
"""Logits that a context holds. llama.cpp keeps them twice: where they are computed and where they are read."""

# ggml.h, enum ggml_log_level; llama_cpp's own logger numbers them differently.
_DEBUG, _WARNING, _ERROR, _CONTINUED = 1, 3, 4, 5


@dataclass(frozen=True)
class Layout:
    """How windows are cut into decodes: ``sequences`` windows at a time, ``rows`` scored positions of each at a time."""

    sequences: int
    rows: int

    @classmethod
    def of(cls, vocabulary: int, context: int) -> Layout:
        """Fit the logits into ``OUTPUT_BYTES``."""
        fits = max(1, OUTPUT_BYTES // (4 * vocabulary))
        whole = len(scored(context))
        if fits < whole:
            return cls(1, fits)
        return cls(max(1, min(fits // whole, BATCH_TOKENS // context)), whole)

    def pieces(self, context: int) -> Iterator[range]:
        """The scored positions of a window, ``rows`` at a time."""
        positions = scored(context)
        for start in range(positions.start, positions.stop, self.rows):
            yield range(start, min(start + self.rows, positions.stop))


class Log:
    """llama.cpp's log until ``close``: to standard output all but debugging, the errors kept."""

    def __init__(self) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self.errors: list[str] = []
        self.brief = False
        """Leave out what is no warning."""
        self._level = _DEBUG
        self._callback = llama_cpp.llama_log_callback(
            self._take
        )  # llama.cpp keeps the pointer, not the object
        self._api.llama_log_set(self._callback, ctypes.c_void_p(0))

    def close(self) -> None:
        """Give llama.cpp its own logger back."""
        self._api.llama_log_set(self._api.llama_log_callback(0), ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace")
        continued = level == _CONTINUED
        self._level = self._level if continued else level
        if self._level != _DEBUG and (self._level >= _WARNING or not self.brief):
            sys.stdout.write(line)
        if self._level == _ERROR and continued and self.errors:
            self.errors[-1] += line
        elif self._level == _ERROR:
            self.errors.append(line)

    def reason(self) -> str:
        """The first error since ``errors`` was cleared, without the name of the function that logged it."""
        first = self.errors[0].strip() if self.errors else "no reason in its log"
        return re.sub(r"^\w+: (error loading model: )?", "", first)


@dataclass(frozen=True)
class Model:
    """A GGUF file in memory, with llama.cpp's handles of its context and of a batch."""

    vocabulary: int
    context: Any
    batch: Any

    def decode(self, ids: NDArray[np.int32], positions: range, wanted: range) -> Tensor:
        """Decode ``positions`` of each window in ``ids`` [windows, context]; logits [windows * wanted, vocabulary].

        Memory is cleared when ``positions`` begins at 0. The result is a view that the next decode overwrites.
        """
        import llama_cpp
        import numpy as np
        import torch

        if positions.start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        count = len(ids) * len(positions)
        places = np.arange(positions.start, positions.stop, dtype=np.int32)
        self._fill("token", ids[:, positions.start : positions.stop].ravel())
        self._fill("pos", np.tile(places, len(ids)))
        self._fill("n_seq_id", np.ones(count, np.int32))
        self._fill(
            "logits", np.tile(((places >= wanted.start) & (places < wanted.stop)).astype(np.int8), len(ids))
        )
        for number in range(count):
            self.batch.seq_id[number][0] = number // len(positions)
        self.batch.n_tokens = count
        code = llama_cpp.llama_decode(self.context, self.batch)
        if code:
            raise QuantizationError(f"llama_decode failed with {code} on {count} tokens")
        view = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self.context), shape=(len(ids) * len(wanted), self.vocabulary)
        )
        return torch.from_numpy(view)

    def _fill(self, field: str, values: NDArray[Any]) -> None:
        import numpy as np

        np.ctypeslib.as_array(getattr(self.batch, field), shape=values.shape)[:] = values


@dataclass(frozen=True)
class Weights:
    """A GGUF file in memory, with llama.cpp's handle."""

    vocabulary: int
    file_type: int | None
    """``general.file_type``; None where the file does not say."""
    handle: Any


@contextmanager
def loaded(path: Path, *, gpu: bool, log: Log) -> Iterator[Weights]:
    """Load ``path``; freed afterwards. Raises Unsound with llama.cpp's own reason when it does not load."""
    import llama_cpp as api

    log.errors.clear()
    parameters = api.llama_model_default_params()
    parameters.n_gpu_layers = -1 if gpu and api.llama_supports_gpu_offload() else 0
    handle = api.llama_model_load_from_file(os.fsencode(path), parameters)
    if not handle:
        raise Unsound(f"llama.cpp cannot load it: {log.reason()}")
    try:
        text = ctypes.create_string_buffer(16)
        told = api.llama_model_meta_val_str(handle, b"general.file_type", text, len(text)) > 0
        entries = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(handle)))
        yield Weights(entries, int(text.value) if told else None, handle)
    finally:
        api.llama_model_free(handle)


@contextmanager
def running(weights: Weights, layout: Layout, context: int, log: Log) -> Iterator[Model]:
    """Room for ``layout.sequences`` windows of ``context`` tokens; freed afterwards. Raises Unsound as ``loaded``."""
    import llama_cpp as api

    log.errors.clear()
    with ExitStack() as stack:
        handle = api.llama_init_from_model(weights.handle, _context_parameters(layout, context))
        if not handle:
            raise Unsound(f"llama.cpp cannot run it: {log.reason()}")
        stack.callback(api.llama_free, handle)
        batch = api.llama_batch_init(layout.sequences * context, 0, 1)
        stack.callback(api.llama_batch_free, batch)
        yield Model(weights.vocabulary, handle, batch)


@contextmanager
def opened(path: Path, layout: Layout, context: int, *, gpu: bool, log: Log) -> Iterator[Model]:
    """``loaded`` and ``running`` at once."""
    with loaded(path, gpu=gpu, log=log) as weights, running(weights, layout, context, log) as model:
        yield model


def _context_parameters(layout: Layout, context: int) -> Any:
    import llama_cpp

    parameters = llama_cpp.llama_context_default_params()
    # llama.cpp rounds the cells of a sequence up to 256, and warns where that is not what it was given.
    parameters.n_ctx = layout.sequences * -(-context // CELLS) * CELLS
    parameters.n_batch = layout.sequences * context
    parameters.n_ubatch = UBATCH_TOKENS
    parameters.n_seq_max = layout.sequences
    parameters.n_outputs_max = layout.sequences * layout.rows
    parameters.n_threads = parameters.n_threads_batch = cores()
    return parameters


def cores() -> int:
    """Physical cores that this process may use, as llama.cpp's tools count them: two threads of one core share its units."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    siblings = set()
    for number in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        siblings.add(topology.read_text(encoding="ascii") if topology.is_file() else str(number))
    return len(siblings)
