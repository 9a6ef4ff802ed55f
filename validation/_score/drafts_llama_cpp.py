"""A multi-token-prediction head in llama.cpp: what it drafts on held-out windows, beside what the model itself says there.

As llama-server's ``draft-mtp`` (common/speculative.cpp): the model's context gives the hidden states of all tokens, and a
second context of the same weights, of the type MTP, takes each with the token that follows. The calls that switch the hidden states
on are of llama.cpp's staging interface (src/llama-ext.h), which the library exports as C++ functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import QuantizationError
from quantool.runtime.llama_cpp import LlamaLog, fill
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.llama_cpp import UBATCH_TOKENS, cores, load_weights
from quantool.validation._engines.windows import scored
from quantool.validation._score.drafts_transformers import Undraftable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MTP = 1  # llama.h: LLAMA_CONTEXT_TYPE_MTP
SWITCH, STATES = (
    "_Z26llama_set_embeddings_nextnP13llama_contextbb",
    "_Z26llama_get_embeddings_nextnP13llama_context",
)
DRAFTING = frozenset({
    "bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "glm-dsa", "glm4moe", "glm5-next", "hy_v3", "mimo2",
    "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next", "step35",
})  # fmt: skip
"""Architectures of llama.cpp 0c1e570 that have a graph for their head (``graph_mtp`` in src/models)."""


def agreements(
    path: Path, texts: list[NDArray[np.int32]], report: Callable[[float, float], None], *, gpu: bool
) -> list[str]:
    """As ``drafts_transformers.agreements``, of a GGUF. Raises Undraftable and Unsound."""
    import llama_cpp as api

    switch, states = _staging()
    total, done = sum(ids.size for ids in texts), 0
    found = []
    with LlamaLog() as log, load_weights(path, gpu=gpu, log=log, drafts=True) as weights:
        text = ctypes.create_string_buffer(64)
        api.llama_model_meta_val_str(weights.handle, b"general.architecture", text, len(text))
        architecture = text.value.decode()
        if architecture not in DRAFTING:
            raise Undraftable(f"this llama.cpp does not draft with heads of {architecture}")
        with ExitStack() as stack:
            context = max(ids.shape[1] for ids in texts)
            trunk = stack.enter_context(_context(weights.handle, context, log))
            head = stack.enter_context(_context(weights.handle, context, log, drafts=True))
            switch(trunk, True, False)
            switch(head, True, True)
            batch = api.llama_batch_init(context, 0, 1)
            stack.callback(api.llama_batch_free, batch)
            for ids in texts:
                marks = []
                for window in ids:
                    marks += _window(states, trunk, head, batch, window, weights.vocabulary)
                    done += len(window)
                    report(done, total)
                found.append("".join(marks))
    return found


def _staging() -> tuple[Any, Any]:
    """The calls that switch hidden states on and give them; raises Undraftable where the library has none."""
    from llama_cpp import llama_cpp as bindings

    library: Any = bindings._lib  # noqa: SLF001 - it has no other name
    try:
        switch, states = library[SWITCH], library[STATES]
    except AttributeError as error:
        raise Undraftable("this llama.cpp does not give a model's hidden states for drafting") from error
    switch.argtypes, switch.restype = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool], None
    states.argtypes, states.restype = [ctypes.c_void_p], ctypes.POINTER(ctypes.c_float)
    return switch, states


@contextmanager
def _context(model: Any, tokens: int, log: LlamaLog, *, drafts: bool = False) -> Iterator[Any]:
    import llama_cpp as api

    log.clear()
    shape = api.llama_context_default_params()
    shape.n_ctx = -(-tokens // 256) * 256
    shape.n_batch = tokens
    shape.n_ubatch = UBATCH_TOKENS
    shape.n_threads = shape.n_threads_batch = cores()
    if drafts:
        shape.ctx_type = MTP
    handle = api.llama_init_from_model(model, shape)
    if not handle:
        raise Unsound(f"llama.cpp cannot run its {'head' if drafts else 'model'}: {log.reason()}")
    try:
        yield handle
    finally:
        api.llama_free(handle)


def _window(
    given: Any, trunk: Any, head: Any, batch: Any, ids: NDArray[np.int32], vocabulary: int
) -> list[str]:
    """One window [context]: a mark a scored position."""
    import numpy as np

    context, wanted = len(ids), scored(len(ids))
    places = np.arange(context, dtype=np.int32)
    asked = (places >= wanted.start) & (places < wanted.stop)
    own = _choices(trunk, batch, ids, places, asked, vocabulary)
    width = _width(trunk)
    states = np.ctypeslib.as_array(given(trunk), shape=(context, width)).copy()
    rows = np.ascontiguousarray(states[:-1])
    batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    try:
        drafted = _choices(head, batch, ids[1:], places[1:], asked[1:], vocabulary)
    finally:
        batch.embd = None
    return ["1" if same else "0" for same in (own == drafted).tolist()]


def _width(context: Any) -> int:
    import llama_cpp as api

    return int(api.llama_model_n_embd(api.llama_get_model(context)))


def _choices(
    context: Any,
    batch: Any,
    ids: NDArray[np.int32],
    places: NDArray[np.int32],
    asked: NDArray[np.bool_],
    vocabulary: int,
) -> NDArray[np.int64]:
    """The most likely token at each position that is ``asked``, in an emptied context."""
    import llama_cpp as api
    import numpy as np

    api.llama_memory_clear(api.llama_get_memory(context), True)
    fill(batch, ids, places, np.zeros(len(ids), np.int32), asked)
    if code := api.llama_decode(context, batch):
        raise QuantizationError(f"llama_decode failed with {code} on {len(ids)} tokens")
    logits = np.ctypeslib.as_array(api.llama_get_logits(context), shape=(int(asked.sum()), vocabulary))
    if not np.isfinite(logits).all():
        raise Unsound("its logits are not finite")
    choices: NDArray[np.int64] = logits.argmax(-1)
    return choices
