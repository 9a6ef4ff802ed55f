"""Windows of calibration text with what the unquantized model makes of them, to measure a changed model by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantool.errors import ConfigError, QuantizationError
from quantool.methods._llama_cpp.fit.live_model import Forward, LiveModel, forward

if TYPE_CHECKING:
    from torch import Tensor

SHORT = 256
"""Tokens of a window that single matrices are measured on: many short ones see more kinds of text than few long ones."""
SHORT_SKIPPED = 32
"""Tokens at the start of such a window that are not scored."""
TOKENS = 3072
"""That every matrix is measured on."""
WHOLE_WINDOWS = 12
"""Windows of the text held apart, on which whole files are measured as the check of perplexity does: their second half."""
LEAST_WINDOWS = 4
LOGIT_BYTES = 64 << 20
ROWS = 64
"""Positions that are compared at once."""


def single_windows(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Windows [n, ``SHORT``] for single matrices, spread over the even windows of the calibration ``ids`` [windows, context]."""
    even = ids[::2, : ids.shape[1] // SHORT * SHORT].reshape(-1, SHORT)
    return even[_spread(len(even), TOKENS // SHORT)]


def whole_windows(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Windows [n, context] for whole files, spread over the odd windows: no token of ``single_windows`` is among them."""
    odd = ids[1::2]
    return odd[_spread(len(odd), WHOLE_WINDOWS)]


def require_text(windows: int) -> None:
    """ConfigError where the calibration text has too few windows to measure on and to hold some apart."""
    if windows < LEAST_WINDOWS:
        raise ConfigError(
            f"fit: the calibration text has {windows} windows of 512 tokens, a search needs {LEAST_WINDOWS}",
            hint="give more text (dataset_path or dataset_id, sample_size, calibration_config.max_tokens)",
        )


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(np.int64))


class Yardstick:
    """``divergence()`` is the mean KL divergence (nats) of the model as it is from the model as it was."""

    def __init__(
        self, run: Forward, ids: NDArray[np.int32], scored: range, file: IO[bytes], sequences: int
    ) -> None:
        self.run, self.ids, self.scored, self.sequences = run, ids, scored, sequences
        shape = (len(ids) * len(scored), run.vocabulary)
        self.reference: NDArray[np.float32] = np.memmap(file, np.float32, "w+", shape=shape)
        for start, logits in self._logits():
            self.reference[start : start + len(logits)] = (
                logits - logits.logsumexp(-1, keepdim=True)
            ).numpy()

    def _logits(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self.ids), self.sequences):
            yield first * len(self.scored), self.run(self.ids[first : first + self.sequences], self.scored)

    def divergence(self) -> float:
        """Over all scored positions. Raises QuantizationError for logits that are not finite."""
        return float(self.by_window().mean())

    def by_window(self) -> NDArray[np.float64]:
        """The mean KL divergence (nats) of each window. Raises QuantizationError for logits that are not finite."""
        import torch

        found = np.empty(len(self.reference))
        for start, logits in self._logits():
            for row in range(0, len(logits), ROWS):
                values = logits[row : row + ROWS]
                part = slice(start + row, start + row + len(values))
                log_p = torch.from_numpy(self.reference[part])
                log_q = values - values.logsumexp(-1, keepdim=True)
                found[part] = torch.linalg.vecdot(log_p.exp(), log_p - log_q).numpy()
        if not np.isfinite(found).all():
            raise QuantizationError("llama.cpp computes logits that are not finite")
        windows: NDArray[np.float64] = found.reshape(len(self.ids), -1).mean(1)
        return windows


@contextmanager
def yardstick(model: LiveModel, ids: NDArray[np.int32], folder: Path, *, whole: bool) -> Iterator[Yardstick]:
    """One on windows ``ids`` of the model as it is now; a file in ``folder`` that has no name holds the log-probabilities."""
    context = ids.shape[1]
    scored = range(context // 2, context - 1) if whole else range(SHORT_SKIPPED, context - 1)
    sequences = max(
        1, min(len(ids), 2048 // context, LOGIT_BYTES // (4 * _vocabulary(model.handle) * len(scored)))
    )
    with (
        forward(model, sequences=sequences, context=context, rows=len(scored)) as run,
        TemporaryFile(dir=folder) as file,
    ):
        yield Yardstick(run, ids, scored, file, sequences)


def scored_bytes(vocabulary: int) -> int:
    """Bytes of the log-probabilities that a search keeps on disk, at most."""
    single = TOKENS // SHORT * (SHORT - 1 - SHORT_SKIPPED)
    return 4 * vocabulary * max(single, WHOLE_WINDOWS * 255)


def _vocabulary(handle: Any) -> int:
    import llama_cpp

    return int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(handle)))
