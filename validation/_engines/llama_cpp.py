"""GGUF files in llama.cpp, through the low-level interface of llama-cpp-python.

Weights and contexts are apart: several files are held at once (their weights are mapped, not copied), while the memory
that one needs to compute is given back before the next one computes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import QuantizationError
from quantool.formats.gguf_keys import ADAPTER
from quantool.runtime.llama_cpp import LlamaLog, LoadError, fill, load_gguf
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.windows import scored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

BATCH_TOKENS = 2048  # llama-perplexity's default n_batch
UBATCH_TOKENS = 512
CELLS = 256
FLASH_ATTENTION = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED of llama.h
OUTPUT_BYTES = 64 << 20
"""Logits that a context holds. llama.cpp keeps them twice: where they are computed and where they are read."""


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
        places = np.tile(np.arange(positions.start, positions.stop, dtype=np.int32), len(ids))
        tokens = ids[:, positions.start : positions.stop].ravel()
        sequences = np.repeat(np.arange(len(ids), dtype=np.int32), len(positions))
        return torch.from_numpy(
            self.run(tokens, places, sequences, (places >= wanted.start) & (places < wanted.stop))
        )

    def run(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        wanted: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Decode a batch (``runtime.llama_cpp.fill``); logits [wanted ones, vocabulary], which the next run overwrites."""
        import llama_cpp
        import numpy as np

        fill(self.batch, tokens, positions, sequences, wanted)
        code = llama_cpp.llama_decode(self.context, self.batch)
        if code:
            raise QuantizationError(f"llama_decode failed with {code} on {len(tokens)} tokens")
        shape = (int(wanted.sum()), self.vocabulary)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape=shape)


@dataclass(frozen=True)
class Weights:
    """A GGUF file in memory, with llama.cpp's handle."""

    vocabulary: int
    file_type: int | None
    """``general.file_type``; None where the file does not say."""
    handle: Any
    adapter: Any = None
    """That of the adapter which the file says belongs to it (``merge: false``)."""


@contextmanager
def load_weights(path: Path, *, gpu: bool, log: LlamaLog, drafts: bool = False) -> Iterator[Weights]:
    """Load ``path`` (with ``drafts`` its multi-token-prediction head too); freed afterwards.

    Raises Unsound with llama.cpp's own reason when it does not load.
    """
    import llama_cpp as api

    with ExitStack() as stack:
        try:
            handle = stack.enter_context(load_gguf(path, log, gpu=gpu, drafts=drafts))
        except LoadError as error:
            raise Unsound(f"llama.cpp cannot load it: {error.message}") from error
        stated = _value(handle, "general.file_type")
        entries = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(handle)))
        adapter = _adapter(handle, path, log)
        yield Weights(entries, int(stated) if stated else None, handle, adapter)


def _value(handle: Any, key: str) -> str:
    """What a loaded file says of ``key``; empty where it says nothing."""
    import llama_cpp as api

    text = ctypes.create_string_buffer(1024)
    stated = api.llama_model_meta_val_str(handle, key.encode(), text, len(text)) > 0
    return text.value.decode("utf-8", "replace") if stated else ""


def _adapter(handle: Any, path: Path, log: LlamaLog) -> Any:
    """The adapter that belongs to a loaded file, which frees it with the model; None for a file that names none."""
    import llama_cpp as api

    name = _value(handle, ADAPTER)
    if not name:
        return None
    file = path.parent / Path(name).name
    log.clear()
    adapter = api.llama_adapter_lora_init(handle, os.fsencode(file)) if file.is_file() else None
    if not adapter:
        why = log.reason() if file.is_file() else "it does not lie beside the file"
        raise Unsound(f"llama.cpp cannot load the adapter {file.name}: {why}")
    return adapter


@contextmanager
def make_context(
    weights: Weights, layout: Layout, context: int, log: LlamaLog, cache: str | None = None
) -> Iterator[Model]:
    """Room for ``layout.sequences`` windows of ``context`` tokens; freed afterwards. Raises Unsound as ``load_weights``.

    ``cache`` is the type of the attention cache by llama.cpp's name (``--cache-type-k``); None is its default, f16.
    """
    import llama_cpp as api

    log.clear()
    with ExitStack() as stack:
        handle = api.llama_init_from_model(weights.handle, _context_parameters(layout, context, cache))
        if not handle:
            log.require_room()
            raise Unsound(f"llama.cpp cannot run it: {log.reason()}")
        stack.callback(api.llama_free, handle)
        if weights.adapter is not None:
            adapters = (api.llama_adapter_lora_p_ctypes * 1)(weights.adapter)
            if api.llama_set_adapters_lora(handle, adapters, 1, (ctypes.c_float * 1)(1.0)):
                raise Unsound("llama.cpp cannot add the adapter")
        batch = api.llama_batch_init(layout.sequences * context, 0, 1)
        stack.callback(api.llama_batch_free, batch)
        yield Model(weights.vocabulary, handle, batch)


def _context_parameters(layout: Layout, context: int, cache: str | None) -> Any:
    import llama_cpp

    parameters = llama_cpp.llama_context_default_params()
    if (
        cache is not None
    ):  # flash attention is what reads a quantized cache, and needs no memory by the square
        parameters.type_k = parameters.type_v = int(getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}"))
        parameters.flash_attn_type = FLASH_ATTENTION
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
