"""Score GGUF files with llama.cpp side by side: the reference's log-probabilities are made once for all of them.

Block by block of the text: log-probabilities of the reference, then one file after the other decodes the block and is
compared. The windows are decoded as llama-perplexity does (tools/perplexity/perplexity.cpp): memory cleared before each
batch of windows, several windows as sequences of one batch, logits asked from the middle of a window on. Where a
vocabulary is so large that the logits of one window are not to be held at once, its second half is decoded in pieces.

The base, from which the others were quantized, may go along on the first windows of each text: it is compared with the
reference (what the conversion lost), and the others with it (what the quantization lost).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.formats.gguf_header import present_shards
from quantool.runtime.llama_cpp import LlamaLog
from quantool.runtime.machine import free_ram
from quantool.runtime.worker import preloaded
from quantool.validation._engines.head import (
    Head,
    HeadPlan,
    Unsound,
    common_vocabulary,
    compare,
    entries_of,
    following,
    gpu_bytes,
    joined,
    normalized,
)
from quantool.validation._engines.hidden_states import as_tensor, hidden_of
from quantool.validation._engines.llama_cpp import Layout, Model, Weights, load_weights, make_context
from quantool.validation._engines.memory import free_gpu
from quantool.validation._engines.reference import texts_of
from quantool.validation._engines.windows import scored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

BLOCK_BYTES = 256 << 20
"""Log-probabilities of the reference that are held at once: one window of 512 at a vocabulary of 256,000."""
LONG = 4096
"""Tokens from which a window is a long one: as much less of it is held at once as it is longer, as its cache grows."""
BASE_BYTES = 128 << 20
"""Log-probabilities of the base that are held at once; positions of a window beyond it are not compared with the base."""
WEIGHTS_SHARE = 0.8
"""Of the memory that is available, what the weights of models that are scored together may take (llama.cpp repacks some: a copy)."""


@dataclass
class _Member:
    """A model and what was found on the text at hand."""

    path: Path
    outputs: Sequence[str | None]
    """Where the scores of each text go; None for a text that is not to be scored."""
    divided: Sequence[str | None]
    """The same of the comparison with the base."""
    weights: Weights | None = None
    file_type: int | None = None
    failure: str | None = None
    scores: list[Tensor] = field(default_factory=list)
    """Beside the reference; see ``head.compare``."""
    beside_base: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _CorpusText:
    """One corpus, or a span of it: ids [windows, context] and the reference's hidden states of their scored positions."""

    number: int
    ids: NDArray[np.int32]
    hidden: Any
    base_windows: int
    """On how many of its windows the base is compared."""


@dataclass(frozen=True)
class _Step:
    """One decode: ``wanted`` positions of windows ``first`` to ``last`` (exclusive)."""

    first: int
    last: int
    wanted: range


@preloaded("torch")
def score(request: dict[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker: score the GGUF files ``models`` against the reference.

    Request: ``models`` (paths), ``outputs`` (for each model the .npz path for each corpus, null where it is not wanted),
    ``windows`` and ``hidden`` (paths, one for each corpus), ``spans`` (optional: [corpus, first, last] of the windows to
    score, which then stand for the corpora in all else), ``source`` (folder with the head), ``head``, ``tokens``
    (entries of the tokenizer), ``context``, ``gpu``, ``cache`` (type of the attention cache or null), and ``base``: null, or its ``path``, ``outputs`` (as those of a
    model), ``windows`` (how many of each corpus) and ``divided`` (as ``outputs``, for the comparison with the base).
    Result: ``failures``, for each model None or why it cannot be scored, ``types``, each one's ``general.file_type``, and the
    same of the base, ``base_failure`` and ``base_type``. A comparison with the base is left out where vocabularies differ.
    """
    comparison = request["base"]
    models, outputs = request["models"], request["outputs"]
    ids, hidden = texts_of(request), hidden_of(request)
    divided = comparison["divided"] if comparison else [[None] * len(ids)] * len(models)
    members = [_Member(Path(path), *paths) for path, *paths in zip(models, outputs, divided, strict=True)]
    base = _Member(Path(comparison["path"]), comparison["outputs"], []) if comparison else None
    firsts = [first for _, first, _ in request.get("spans", [])] or [0] * len(ids)
    texts = [
        _CorpusText(number, part, states, min(max(0, compared - first), len(part)))
        for compared in [comparison["windows"] if comparison else 0]
        for number, (part, states, first) in enumerate(zip(ids, hidden, firsts, strict=True))
    ]
    total = sum(text.ids.size for member in members for text in texts if member.outputs[text.number])
    done = 0

    def advanced(tokens: int) -> None:
        nonlocal done
        done += tokens
        report(done, max(done, total))

    with LlamaLog() as log:
        for group in grouped(members, base, gpu=request["gpu"]):
            _Group(request, log, advanced).run(group, base, texts)
    return {
        "failures": [member.failure for member in members],
        "types": [member.file_type for member in members],
        "base_failure": base.failure if base else None,
        "base_type": base.file_type if base else None,
    }


def grouped(members: Sequence[_Member], base: _Member | None, *, gpu: bool) -> list[list[_Member]]:
    """The models in groups whose weights, with the base's, fit into memory; at least one a group (none: an empty group)."""
    room = WEIGHTS_SHARE * available(gpu=gpu) - (weight_of(base.path) if base else 0)
    groups: list[list[_Member]] = [[]]
    left = room
    for member in members:
        size = weight_of(member.path)
        if groups[-1] and size > left:
            groups.append([])
            left = room
        groups[-1].append(member)
        left -= size
    return groups


def weight_of(path: Path) -> int:
    """Bytes of a GGUF file with all its shards; 0 when it is not there."""
    return sum(file.stat().st_size for file in present_shards(path))


def available(*, gpu: bool) -> int:
    """Bytes that weights can have now: of the GPUs, when torch sees them, or of the machine."""
    if gpu:
        import torch

        if torch.cuda.is_available():
            return sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    return free_ram()


@dataclass
class _Group:
    """The run of one group."""

    request: dict[str, Any]
    log: LlamaLog
    advanced: Callable[[int], None]

    def run(self, members: Sequence[_Member], base: _Member | None, texts: Sequence[_CorpusText]) -> None:
        """Score all texts; what is found is saved, or ``failure`` of the member says why not."""
        source, plan = Path(self.request["source"]), HeadPlan.of(self.request["head"])
        entries = entries_of(source, plan)
        with ExitStack() as stack:
            by_rows: dict[int, list[_Member]] = {}
            for member in (*([base] if base else []), *members):
                if member.failure:
                    continue
                try:
                    self.log.brief = False
                    held = load_weights(member.path, gpu=self.request["gpu"], log=self.log)
                    member.weights = stack.enter_context(held)
                    member.file_type = member.weights.file_type
                    rows = common_vocabulary(entries, member.weights.vocabulary, self.request["tokens"])
                except Unsound as reason:
                    member.failure = str(reason)
                else:
                    by_rows.setdefault(rows, []).append(member)
            for rows, equals in by_rows.items():
                head = Head(source, plan, rows, self._device(source, plan))
                for text in texts:
                    _Scoring(self, head, text, base if base in equals else None).run(
                        [member for member in equals if member is not base]
                    )

    def _device(self, source: Path, plan: HeadPlan) -> str:
        """Where logits are compared: on torch's GPU, if llama.cpp computes on one and its weights leave room."""
        import torch

        if not self.request["gpu"] or not torch.cuda.is_available():
            return "cpu"
        return "cuda" if gpu_bytes(source, plan, self.request["context"]) < free_gpu() else "cpu"


@dataclass
class _Scoring:
    """One text, by models with the same vocabulary."""

    group: _Group
    head: Head
    text: _CorpusText
    base: _Member | None

    def __post_init__(self) -> None:
        self.context = self.text.ids.shape[1]
        self.layout = Layout.of(self.head.rows, self.context)
        self.base_windows = self.text.base_windows if self.base else 0

    def run(self, members: Sequence[_Member]) -> None:
        """Score the text and save what was found."""
        wanted = [member for member in members if member.outputs[self.text.number]]
        compared = self.base and self.base_windows and (wanted or self.base.outputs[self.text.number])
        base = [self.base] if self.base and compared else []
        for member in (*base, *wanted):
            member.scores, member.beside_base = [], []
        size = max(1, block_bytes(self.context) // (4 * self.head.rows * len(scored(self.context))))
        for first in range(0, len(self.text.ids), size):
            last = min(first + size, len(self.text.ids))
            self._block(first, last, base, wanted)
            if not any(member.failure is None for member in wanted) and last >= self.base_windows:
                break
        number = self.text.number
        for member in wanted:  # its own scores last: they say that it is done
            if member.failure is None and member.beside_base and (path := member.divided[number]):
                joined(member.beside_base).save(Path(path))
        for member in (*base, *wanted):
            if member.failure is None and member.scores and (path := member.outputs[number]):
                joined(member.scores).save(Path(path))

    def _block(self, first: int, last: int, base: Sequence[_Member], members: Sequence[_Member]) -> None:
        """Score windows ``first`` to ``last`` by all models."""
        middle = max(first, min(last, self.base_windows))
        expected = _Expected(self.head, self.text, first, last)
        steps = [*self._steps(first, middle), *self._steps(middle, last)]
        beside: dict[_Step, Tensor] = {}
        for member in base if middle > first else ():
            for step, logits in self._decoded(member, self._beside_base(first, middle)):
                if self._compared(member, step, expected.of(step), logits, member.scores):
                    beside[step] = normalized(logits, expected.device)
            if member.failure:
                beside.clear()
        for member in members:
            if member.failure:
                continue
            for step, logits in self._decoded(member, steps):
                self._compared(member, step, expected.of(step), logits, member.scores)
                if step in beside:
                    self._compared(member, step, beside[step], logits, member.beside_base)
            self.group.advanced((last - first) * self.context)

    def _steps(self, first: int, last: int) -> Iterator[_Step]:
        for start in range(first, last, self.layout.sequences):
            for wanted in self.layout.pieces(self.context):
                yield _Step(start, min(start + self.layout.sequences, last), wanted)

    def _beside_base(self, first: int, last: int) -> Iterator[_Step]:
        """The steps that the base decodes: as many of each window as ``BASE_BYTES`` holds, one at least."""
        rows = max(self.layout.rows, BASE_BYTES // (4 * self.head.rows * max(1, last - first)))
        end = scored(self.context).start + rows
        return (step for step in self._steps(first, last) if step.wanted.stop <= end)

    def _decoded(self, member: _Member, steps: Iterable[_Step]) -> Iterator[tuple[_Step, Tensor]]:
        """Decode the steps in a context of their own; yields logits that the next step overwrites.

        Stops when the member has failed.
        """
        if member.weights is None:  # it failed to load, so nobody asks
            raise AssertionError
        try:
            cache = self.group.request.get("cache")
            with make_context(member.weights, self.layout, self.context, self.group.log, cache) as model:
                self.group.log.brief = True
                for step in steps:
                    yield step, self._decode(model, step)
                    if member.failure:
                        return
        except Unsound as reason:
            member.failure = str(reason)

    def _decode(self, model: Model, step: _Step) -> Tensor:
        # The first piece brings the unscored half of the window along.
        start = 0 if step.wanted.start == scored(self.context).start else step.wanted.start
        windows = self.text.ids[step.first : step.last]
        return model.decode(windows, range(start, step.wanted.stop), step.wanted)[:, : self.head.rows]

    def _compared(
        self, member: _Member, step: _Step, expected: Tensor, logits: Tensor, found: list[Tensor]
    ) -> bool:
        part = compare(expected, logits, following(self.text.ids[step.first : step.last], step.wanted))
        if part is None:
            member.failure = f"llama.cpp computes logits that are not finite (window {step.first + 1})"
            return False
        found.append(part)
        return True


def block_bytes(context: int) -> int:
    """Of ``BLOCK_BYTES`` what windows of ``context`` tokens may take: the longer, the less, for their caches grow."""
    return BLOCK_BYTES * LONG // max(LONG, context)


class _Expected:
    """The reference's log-probabilities of windows ``first`` to ``last``; kept when they are within ``block_bytes``."""

    def __init__(self, head: Head, text: _CorpusText, first: int, last: int) -> None:
        self._head, self._text, self._first = head, text, first
        self._start = scored(text.ids.shape[1]).start
        self._rows = len(scored(text.ids.shape[1]))
        fits = 4 * head.rows * self._rows * (last - first) <= block_bytes(text.ids.shape[1])
        self._kept = head.log_probs(as_tensor(text.hidden[first:last]).flatten(0, 1)) if fits else None
        self.device = head.device

    def of(self, step: _Step) -> Tensor:
        """Those of one step [windows * wanted, vocabulary]."""
        low, high = step.wanted.start - self._start, step.wanted.stop - self._start
        if self._kept is None:
            return self._head.log_probs(
                as_tensor(self._text.hidden[step.first : step.last, low:high]).flatten(0, 1)
            )
        begin, end = step.first - self._first, step.last - self._first - 1  # several windows are whole ones
        return self._kept[begin * self._rows + low : end * self._rows + high]
