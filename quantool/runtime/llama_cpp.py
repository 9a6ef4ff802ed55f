"""llama.cpp through the low-level interface of llama-cpp-python: its log, loading a file, filling a batch.

Used inside workers only (``quantool.runtime.process``): the library aborts on failed assertions.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from quantool.errors import QuantizationError
from quantool.runtime import gpus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# ggml.h, enum ggml_log_level; llama_cpp's own logger numbers them differently.
DEBUG, WARNING, ERROR, CONTINUED = 1, 3, 4, 5
LOAD_MODE_NONE = 0  # llama.h: LLAMA_LOAD_MODE_NONE, the only one that goes with no_alloc
ORIGIN = re.compile(r"^\w+: (error loading model: )?")
GENERAL = re.compile(r"^failed to (load|open) model")


class LoadError(QuantizationError):
    """llama.cpp does not load a file; the message is its own reason, without the place of the file."""


class LlamaLog:
    """llama.cpp's log while it is entered, put together to lines: all but debugging goes to standard output too.

    ``follow`` is called with each line as it comes.
    """

    def __init__(self, follow: Callable[[str], None] | None = None) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.errors: list[str] = []
        self.brief = False
        """Leave out what is no warning."""
        self._follow = follow
        self._level = DEBUG
        self._rest = ""
        self._callback: Any = None  # llama.cpp keeps the pointer, not the object

    def __enter__(self) -> Self:
        import llama_cpp  # installs a handler of its own when it is imported

        self._callback = llama_cpp.llama_log_callback(self.take)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        return self

    def __exit__(self, *_: object) -> None:
        import llama_cpp

        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))

    def take(self, level: int, text: bytes | None, _: object) -> None:
        """The callback: a piece of a line, or several lines."""
        self._level = self._level if level == CONTINUED else level
        *whole, self._rest = (self._rest + (text or b"").decode("utf-8", "replace")).split("\n")
        for line in whole:
            self._line(line)

    def _line(self, line: str) -> None:
        if self._level == DEBUG or (self.brief and self._level < WARNING):
            return
        sys.stdout.write(f"{line}\n")
        self.lines.append(line)
        if self._level == ERROR:
            self.errors.append(line.strip(" ="))
        elif self._level == WARNING:
            self.warnings.append(line.strip())
        if self._follow is not None:
            self._follow(line)

    def clear(self) -> None:
        """Forget what was said before."""
        for kept in (self.lines, self.warnings, self.errors):
            kept.clear()

    def require_room(self) -> None:
        """Raise DependencyError when the last failure was a GPU's, whose memory is full: it says nothing about a file."""
        if full := next((line.strip() for line in self.lines if gpus.NO_ROOM.search(line)), None):
            raise gpus.full(full)

    def reason(self) -> str:
        """What the library said about its failure, without the names of the functions that logged it."""
        errors = [ORIGIN.sub("", line).strip() for line in self.errors if line]
        errors = [line for line in errors if not GENERAL.match(line)] or errors
        last = [line.strip() for line in self.lines if line.strip()][-3:]
        return "; ".join(dict.fromkeys(errors or last)) or "no reason in its log"


@contextmanager
def load_gguf(
    path: Path,
    log: LlamaLog,
    *,
    gpu: bool = False,
    vocabulary: bool = False,
    weights: bool = True,
    drafts: bool = False,
    writable: bool = False,
) -> Iterator[Any]:
    """llama.cpp's handle of a GGUF (its first shard); freed afterwards. Raises LoadError.

    ``vocabulary``: nothing else is read. Without ``weights`` every tensor is checked and none is read. With ``drafts`` the
    multi-token-prediction head is loaded too. ``writable``: tensors are copied to memory as they are in the file.
    """
    import llama_cpp as api

    log.clear()
    api.llama_backend_init()
    parameters = api.llama_model_default_params()
    parameters.n_gpu_layers = -1 if gpu and api.llama_supports_gpu_offload() else 0
    parameters.vocab_only = vocabulary
    parameters.load_mtp = drafts
    if not weights or writable:
        parameters.use_extra_bufts = False  # no repacked copy of the weights
        parameters.load_mode = LOAD_MODE_NONE
    parameters.no_alloc = not weights
    handle = api.llama_model_load_from_file(os.fsencode(path), parameters)
    if not handle:
        log.require_room()
        raise LoadError(log.reason().replace(f"{path.parent}/", ""))
    try:
        yield handle
    finally:
        api.llama_model_free(handle)


def fill(
    batch: Any,
    tokens: NDArray[np.int32],
    positions: NDArray[np.int32],
    sequences: NDArray[np.int32],
    wanted: NDArray[np.bool_],
) -> None:
    """Put tokens into a ``llama_batch`` (all arrays [tokens]): position, sequence, and whether logits are ``wanted``."""
    import numpy as np

    columns: dict[str, NDArray[Any]] = {
        "token": tokens,
        "pos": positions,
        "n_seq_id": np.ones(len(tokens), np.int32),
        "logits": wanted.astype(np.int8),
    }
    for name, values in columns.items():
        np.ctypeslib.as_array(getattr(batch, name), shape=values.shape)[:] = values
    for place, sequence in enumerate(sequences.tolist()):
        batch.seq_id[place][0] = sequence
    batch.n_tokens = len(tokens)
