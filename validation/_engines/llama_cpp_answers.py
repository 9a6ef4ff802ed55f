"""Greedy answers and scores of a GGUF file through llama.cpp: several prompts at once, as sequences of one batch.

What ends an answer is what llama.cpp stops at with this file (``llama_vocab_is_eog``). Logits are asked for the last
token of a prompt and for generated tokens only. A matrix product over several sequences rounds otherwise than one over a
single sequence, as it does in llama-server with parallel slots; the same prompts in the same order give the same answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantool.runtime.llama_cpp import LlamaLog
from quantool.validation._engines.interface import Answer, Engine, Scored, require_room
from quantool.validation._engines.llama_cpp import BATCH_TOKENS, Layout, Model, load_weights, make_context

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CELLS = 4096
"""Tokens that all sequences together may have in memory: 1 GB for a model of 40 B parameters."""
SEQUENCES = 8
OUTPUTS = 128
"""Rows of logits of one decode: 131 MB at a vocabulary of 256,000."""


class _Entry(NamedTuple):
    """One token of a batch."""

    token: int
    position: int
    sequence: int
    wanted: bool
    """Whether its logits are."""


@contextmanager
def load_engine(path: Path, context: int, *, gpu: bool, cache: str | None = None) -> Iterator[Engine]:
    """Load a GGUF for answers of up to ``context`` tokens, prompt included. Raises Unsound when it does not load.

    ``cache`` is as in ``make_context``.
    """
    sequences = max(1, min(SEQUENCES, CELLS // context))
    layout = Layout(sequences, max(1, OUTPUTS // sequences))
    with (
        LlamaLog() as log,
        load_weights(path, gpu=gpu, log=log) as weights,
        make_context(weights, layout, context, log, cache) as model,
    ):
        yield LlamaCppEngine(model, context, layout)


class LlamaCppEngine:
    """A GGUF in memory."""

    def __init__(self, model: Model, context: int, layout: Layout) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._model = model
        held = self._api.llama_get_model(model.context)
        self._vocabulary = self._api.llama_model_get_vocab(held)
        self._memory = self._api.llama_get_memory(model.context)
        self._sequences = layout.sequences
        self._outputs = layout.sequences * layout.rows
        self.vocabulary = model.vocabulary
        self.context = min(context, int(self._api.llama_model_n_ctx_train(held)))

    def generate(self, prompts: Sequence[Sequence[int]], budget: int) -> list[Answer]:
        """See ``Engine``."""
        require_room(prompts, [budget] * len(prompts), self)
        answers: list[Answer] = []
        for start in range(0, len(prompts), self._sequences):
            answers += self._answer(prompts[start : start + self._sequences], budget)
        return answers

    def _answer(self, prompts: Sequence[Sequence[int]], budget: int) -> list[Answer]:
        """Answer as many prompts as there are sequences."""
        ids: list[list[int]] = [[] for _ in prompts]
        margins: list[list[float]] = [[] for _ in prompts]
        ended: list[int | None] = [None] * len(prompts)
        self._clear()
        entries = [
            _Entry(token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        while entries:
            following = []
            for entry, logits in self._decode(entries):
                token, margin = _first(logits)
                margins[entry.sequence].append(margin)
                if self._api.llama_vocab_is_eog(self._vocabulary, token):
                    ended[entry.sequence] = token
                    continue
                ids[entry.sequence].append(token)
                if len(ids[entry.sequence]) < budget:
                    following.append(_Entry(token, entry.position + 1, entry.sequence, True))
            entries = following
        return [Answer(tuple(own), end, tuple(by)) for own, end, by in zip(ids, ended, margins, strict=True)]

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """See ``Engine``. A prompt is read once for all continuations that follow each other."""
        require_room(prompts, [len(continuation) for continuation in continuations], self)
        found: list[Scored] = []
        pairs = zip(prompts, continuations, strict=True)
        for prompt, group in itertools.groupby(pairs, key=lambda pair: tuple(pair[0])):
            wanted = [continuation for _, continuation in group]
            for start in range(0, len(wanted), self._sequences):
                found += self._score(prompt, wanted[start : start + self._sequences])
        return found

    def _score(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Score as many continuations of one prompt as there are sequences."""
        self._clear()
        last = len(prompt) - 1
        found: list[list[tuple[float, bool]]] = [[] for _ in continuations]
        read = [_Entry(token, position, 0, position == last) for position, token in enumerate(prompt)]
        for _, logits in self._decode(read):
            for own, continuation in zip(found, continuations, strict=True):
                own.append(_judged(logits, continuation[0]))
        for sequence in range(1, len(continuations)):  # whole sequences: every kind of memory can copy those
            self._api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        entries = [
            _Entry(token, len(prompt) + place, sequence, True)
            for sequence, continuation in enumerate(continuations)
            for place, token in enumerate(continuation[:-1])
        ]
        for entry, logits in self._decode(entries):
            target = continuations[entry.sequence][entry.position - last]
            found[entry.sequence].append(_judged(logits, target))
        return [Scored(tuple(p for p, _ in own), all(best for _, best in own)) for own in found]

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._memory, True)

    def _decode(self, entries: Sequence[_Entry]) -> Iterator[tuple[_Entry, NDArray[np.float32]]]:
        """Decode in pieces; yield each wanted entry with its logits, a view that the next piece overwrites."""
        import numpy as np

        for piece in self._pieces(entries):
            rows = self._model.run(*(np.array(column) for column in zip(*piece, strict=True)))
            yield from zip((entry for entry in piece if entry.wanted), rows, strict=True)

    def _pieces(self, entries: Sequence[_Entry]) -> Iterator[list[_Entry]]:
        """Cut so that no piece has more tokens than a batch, or more wanted ones than there is room for logits."""
        piece: list[_Entry] = []
        outputs = 0
        for entry in entries:
            if len(piece) == BATCH_TOKENS or (entry.wanted and outputs == self._outputs):
                yield piece
                piece, outputs = [], 0
            piece.append(entry)
            outputs += entry.wanted
        if piece:
            yield piece


def _first(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The most likely token and how far it is ahead of the second."""
    import numpy as np

    second, first = np.partition(logits, -2)[-2:]
    return int(np.argmax(logits)), float(first - second)


def _judged(logits: NDArray[np.float32], target: int) -> tuple[float, bool]:
    """Log-probability of ``target``, and whether it is the most likely token."""
    import numpy as np

    values = logits.astype(np.float64)
    highest = values.max()
    total = highest + np.log(np.exp(values - highest).sum())
    return float(values[target] - total), bool(np.argmax(logits) == target)
