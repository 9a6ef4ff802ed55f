"""Score GGUF files with llama.cpp, several in lockstep, through the low-level interface of llama-cpp-python.

The windows are decoded as llama-perplexity does (tools/perplexity/perplexity.cpp): memory cleared before each batch of
windows, several windows as sequences of one batch, logits asked from the middle of a window on. Where a vocabulary is so
large that the logits of one window are not to be held at once, its second half is decoded in pieces.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import QuantizationError
from quantool.validation._head import (
    LOGIT_BYTES,
    Head,
    HeadPlan,
    Unsound,
    common_vocabulary,
    compare,
    entries_of,
    following,
    joined,
)
from quantool.validation._reference import recalled, tensor
from quantool.validation._scores import Tokens
from quantool.validation._windows import scored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

BATCH_TOKENS = 2048  # llama-perplexity's default n_batch
UBATCH_TOKENS = 512

# ggml.h, enum ggml_log_level; llama_cpp's own logger numbers them differently.
_DEBUG, _ERROR, _CONTINUED = 1, 4, 5


@dataclass(frozen=True)
class Layout:
    """How windows are cut into decodes: ``sequences`` windows at a time, ``rows`` scored positions of each at a time."""

    sequences: int
    rows: int

    @classmethod
    def of(cls, vocabulary: int, context: int, models: int) -> Layout:
        """Fit the logits of all ``models`` into ``LOGIT_BYTES``."""
        fits = max(1, LOGIT_BYTES // (4 * vocabulary * models))
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
        if self._level != _DEBUG:
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

        batch = self.batch
        if positions.start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        size = 0
        for sequence, window in enumerate(ids.tolist()):
            for position in positions:
                batch.token[size] = window[position]
                batch.pos[size] = position
                batch.n_seq_id[size] = 1
                batch.seq_id[size][0] = sequence
                batch.logits[size] = position in wanted
                size += 1
        batch.n_tokens = size
        code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise QuantizationError(f"llama_decode failed with {code} on {size} tokens")
        view = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self.context), shape=(len(ids) * len(wanted), self.vocabulary)
        )
        return torch.from_numpy(view)


@contextmanager
def opened(path: Path, layout: Layout, context: int, *, gpu: bool, log: Log) -> Iterator[Model]:
    """Load ``path`` with room for ``layout.sequences`` windows of ``context`` tokens; freed afterwards.

    Raises Unsound with llama.cpp's own reason when it does not load.
    """
    import llama_cpp as api

    log.errors.clear()
    with ExitStack() as stack:
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = -1 if gpu and api.llama_supports_gpu_offload() else 0
        model = api.llama_model_load_from_file(os.fsencode(path), parameters)
        if not model:
            raise Unsound(f"llama.cpp cannot load it: {log.reason()}")
        stack.callback(api.llama_model_free, model)
        handle = api.llama_init_from_model(model, _context_parameters(layout, context))
        if not handle:
            raise Unsound(f"llama.cpp cannot run it: {log.reason()}")
        stack.callback(api.llama_free, handle)
        batch = api.llama_batch_init(layout.sequences * context, 0, 1)
        stack.callback(api.llama_batch_free, batch)
        yield Model(int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))), handle, batch)


def _context_parameters(layout: Layout, context: int) -> Any:
    import llama_cpp

    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = layout.sequences * context
    parameters.n_ubatch = UBATCH_TOKENS
    parameters.n_seq_max = layout.sequences
    parameters.n_outputs_max = layout.sequences * layout.rows
    parameters.n_threads = parameters.n_threads_batch = os.cpu_count() or 1
    return parameters


def score(request: dict[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker: score the GGUF files ``models`` against the reference, whose log-probabilities are made once for all.

    Request: ``models`` (paths), ``outputs`` (for each model the .npz path for each corpus), ``windows`` and ``hidden``
    (paths, one for each corpus), ``source`` (folder with the head), ``head``, ``tokens`` (entries of the tokenizer),
    ``context`` and ``gpu``. Result: ``failures``, for each model None or why it cannot be scored.
    """
    import llama_cpp
    import numpy as np

    source, plan = Path(request["source"]), HeadPlan.of(request["head"])
    entries = entries_of(source, plan)
    layout = Layout.of(entries, request["context"], len(request["models"]))
    failures: list[str | None] = [None] * len(request["models"])
    by_rows: dict[int, dict[int, Model]] = {}
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log()))
        llama_cpp.llama_backend_init()
        for number, path in enumerate(request["models"]):
            held = opened(Path(path), layout, request["context"], gpu=request["gpu"], log=log)
            try:
                model = stack.enter_context(held)
                rows = common_vocabulary(entries, model.vocabulary, request["tokens"])
            except Unsound as reason:
                failures[number] = str(reason)
            else:
                by_rows.setdefault(rows, {})[number] = model
        texts = [np.load(path) for path in request["windows"]]
        total, done = len(by_rows) * sum(ids.size for ids in texts), 0
        for rows, models in by_rows.items():
            head = Head(source, plan, rows)
            for text, (ids, hidden) in enumerate(zip(texts, request["hidden"], strict=True)):

                def advanced(tokens: int, before: int = done) -> None:
                    report(before + tokens, total)

                states = recalled(Path(hidden))
                for number, outcome in _score_text(models, head, layout, ids, states, advanced):
                    if isinstance(outcome, str):
                        failures[number] = outcome
                    else:
                        outcome.save(Path(request["outputs"][number][text]))
                done += ids.size
    return {"failures": failures}


def _score_text(
    models: dict[int, Model],
    head: Head,
    layout: Layout,
    ids: NDArray[np.int32],
    hidden: Any,
    advanced: Callable[[int], None],
) -> Iterator[tuple[int, Tokens | str]]:
    """Score one corpus; yields for each model its tokens, or why there are none and drops it from ``models``."""
    context, first = ids.shape[1], scored(ids.shape[1]).start
    found: dict[int, list[Tensor]] = {number: [] for number in models}
    for start in range(0, len(ids), layout.sequences):
        windows = ids[start : start + layout.sequences]
        for wanted in layout.pieces(context):
            if not models:
                return
            states = hidden[start : start + len(windows), wanted.start - first : wanted.stop - first]
            log_p = head.log_probs(tensor(states).flatten(0, 1))
            targets = following(windows, wanted)
            # The first piece brings the unscored half of the window along.
            positions = range(0 if wanted.start == first else wanted.start, wanted.stop)
            for number, model in list(models.items()):
                logits = model.decode(windows, positions, wanted)[:, : head.rows]
                part = compare(log_p, logits, targets)
                if part is None:
                    del models[number], found[number]
                    yield number, f"llama.cpp computes logits that are not finite (window {start + 1})"
                else:
                    found[number].append(part)
        advanced((start + len(windows)) * context)
    for number, parts in found.items():
        yield number, joined(parts)
