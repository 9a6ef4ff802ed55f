"""Greedy answers and scores of a folder through transformers: several prompts at once, with the model's own cache.

Prompts of one batch are padded on the left; that the model takes padding for nothing is tried on it before, and where it
does not (a memory that padding runs through) each prompt is answered by itself. A batch rounds otherwise than a single
prompt does, as in llama.cpp; the same prompts in the same order give the same answers.

As for perplexity the output head is computed in float32: in bfloat16 the best tokens of a vocabulary often have equal
logits, and the lowest id would win. While generating, only the ``CANDIDATES`` best of the rounded logits are computed
anew. A head that is itself quantized speaks for itself.
"""

from __future__ import annotations

import copy
import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.runtime import gpus
from quantool.validation._engines import unpacked
from quantool.validation._engines.head import LOGIT_BYTES, SLICE_BYTES, Unsound, transforms
from quantool.validation._engines.interface import Answer, Engine, Scored, require_room
from quantool.validation._engines.memory import HALVINGS
from quantool.validation._engines.reference import load_model, verify

if TYPE_CHECKING:
    from torch import Tensor

CANDIDATES = 64
VERIFIED = 32
"""Tokens on which the recomputed head is compared with the model's own."""
CELLS = 4096
"""Tokens of prompts, padding and answers that a batch may have together, as in ``llama_cpp_answers``."""
SEQUENCES = 32
GPU_CELLS, GPU_SEQUENCES, GPU_SHARE = 32768, 64, 0.25
"""The same on a GPU, where a step of a small batch takes as long as one of a large batch; and of its memory the part that
their cache may take, counted as if every head kept keys and values of its own."""
PADDING_TOLERANCE = 2**-4
"""Largest difference of logits that padding may make, over the largest logit: measured 1e-6 in float32, 0.02 in bfloat16;
0.3 and more with a model that reads padding. Activations are not rounded to fewer bits meanwhile: in FP8 that alone makes
0.04 of a random model of 32 layers."""


@contextmanager
def load_engine(folder: Path, context: int, device: str, trust_remote_code: bool) -> Iterator[Engine]:
    """Load a folder in the dtype it is saved in. Raises Unsound when transformers does not load it."""
    try:
        model = load_model(folder, "auto", device, trust_remote_code)
        unpacked.decompress(model)
        engine = TransformersEngine(model, context)
    except SourceError as error:
        raise Unsound(error.message) from error
    yield engine


class TransformersEngine:
    """A model that transformers runs."""

    def __init__(self, model: Any, context: int) -> None:
        from transformers import GenerationConfig

        config = model.config.get_text_config()
        self._model = model
        self._head = _AnswerHead(model)
        named = model.generation_config.eos_token_id  # transformers takes it from config.json without a file
        self._ends = [] if named is None else [named] if isinstance(named, int) else list(named)
        self._padding: bool | None = None  # whether the model takes it for nothing; None until it was tried
        # Nothing else of the folder's file: its sampling and penalties would change greedy answers.
        settings: Any = GenerationConfig
        model.generation_config = settings(
            do_sample=False,
            eos_token_id=self._ends or None,
            pad_token_id=self._ends[0] if self._ends else None,
        )
        self.vocabulary = int(self._head.entries)
        self.context = min(context, getattr(config, "max_position_embeddings", None) or context)

    def generate(self, prompts: Sequence[Sequence[int]], budget: int) -> list[Answer]:
        """See ``Engine``. The ends are those of generation_config.json, as for transformers itself."""
        require_room(prompts, [budget] * len(prompts), self)
        answers: dict[int, Answer] = {}
        for batch in self._batches(prompts, budget):
            made = self._with_room([prompts[number] for number in batch], budget, HALVINGS)
            answers |= zip(batch, made, strict=True)
        return [answers[number] for number in range(len(prompts))]

    def _batches(self, prompts: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
        """Numbers of prompts to answer together: longest first, so that there is little padding."""
        batch: list[int] = []
        cells, sequences = self._room()
        most = sequences if self._takes_padding(prompts) else 1
        for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
            if batch and len(batch) >= min(most, cells // (len(prompts[batch[0]]) + budget)):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _room(self) -> tuple[int, int]:
        """Tokens and sequences of a batch: the same for source and artifact, so that they round alike."""
        import torch

        device = self._model.device
        if device.type != "cuda":
            return CELLS, SEQUENCES
        config = self._model.config.get_text_config()
        cell = 2 * 2 * config.num_hidden_layers * config.hidden_size
        memory = torch.cuda.get_device_properties(device).total_memory
        return max(CELLS, min(GPU_CELLS, int(GPU_SHARE * memory) // cell)), GPU_SEQUENCES

    def _takes_padding(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether the shortest of ``prompts`` gives the same behind as much padding as any gets; tried once.

        Two tokens are read after it, the second from the cache. A memory that padding runs through, positions that
        count it and windows that it shifts all show in their logits.
        """
        short, longest = min(prompts, key=len), max(map(len, prompts))
        if self._padding is None and len(short) < longest:
            with unpacked.unrounded(self._model):
                alone, padded = (self._trial(short, length) for length in (len(short), longest))
            off = float((alone - padded).abs().max() / alone.abs().max())
            self._padding = off <= PADDING_TOLERANCE
            if not self._padding:
                sys.stdout.write(
                    f"padding changes the logits by {off:.3f} of the largest: every prompt is answered by itself\n"
                )
        return self._padding is not False

    def _trial(self, prompt: Sequence[int], length: int) -> Tensor:
        """The model's own logits [2, vocabulary] after ``prompt``, padded to ``length``, and after a token more."""
        import torch

        seen: list[Tensor] = []
        following = next((token for token in prompt if token not in self._ends), prompt[0])

        def force(ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(scores[0].float())
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([following]).to(ids), 0)

        self._generate([prompt], length, 2, force)
        return torch.stack(seen)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        length: int,
        budget: int,
        choose: Callable[[Tensor, Tensor], Tensor],
    ) -> list[list[int]]:
        """What follows each of ``prompts``, padded to ``length``; what comes behind an end is padding."""
        import torch

        padded = [[prompt[0]] * (length - len(prompt)) + [*prompt] for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.no_grad():
            whole = self._model.generate(
                torch.tensor(padded, device=self._model.device),
                attention_mask=torch.tensor(mask, device=self._model.device),
                max_new_tokens=budget,
                logits_processor=[choose],
            )
        made: list[list[int]] = whole[:, length:].tolist()
        return made

    def _with_room(self, prompts: Sequence[Sequence[int]], budget: int, halvings: int) -> list[Answer]:
        """As ``_answers``, in two halves where the GPU's memory is full; DependencyError after so many ``halvings``."""
        import torch

        try:
            return self._answers(prompts, budget)
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1 or not halvings:
                said = str(error).partition("\n")[0]
                raise gpus.full(f"{said} ({len(prompts)} answers at once)") from error
        sys.stdout.write(f"the GPU's memory is full with {len(prompts)} answers at once: now half as many\n")
        gc.collect()
        middle = len(prompts) // 2
        halves = (prompts[:middle], prompts[middle:])
        return [answer for half in halves for answer in self._with_room(half, budget, halvings - 1)]

    def _answers(self, prompts: Sequence[Sequence[int]], budget: int) -> list[Answer]:
        """Answer all ``prompts`` in one batch."""
        import torch

        self._head.margins = []
        made = self._generate(prompts, max(map(len, prompts)), budget, self._head)
        margins = torch.stack(self._head.margins, dim=1).tolist()
        return [self._answer(ids, own) for ids, own in zip(made, margins, strict=True)]

    def _answer(self, ids: Sequence[int], margins: Sequence[float]) -> Answer:
        """One answer of a batch, without the padding behind its end."""
        last = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        ended = ids[last] if last < len(ids) else None
        return Answer(tuple(ids[:last]), ended, tuple(margins[: last + 1]))

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """See ``Engine``. A prompt is read once for all continuations that follow each other."""
        import torch

        require_room(prompts, [len(continuation) for continuation in continuations], self)
        found: list[Scored] = []
        pairs = zip(prompts, continuations, strict=True)
        with torch.no_grad():
            for prompt, group in itertools.groupby(pairs, key=lambda pair: tuple(pair[0])):
                found += self._score(prompt, [continuation for _, continuation in group])
        return found

    def _score(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        first, cache = self._read(prompt, None, 1)
        found = []
        for continuation in continuations:
            states = first
            if len(continuation) > 1 and cache is not None:
                more, _ = self._read(continuation[:-1], copy.deepcopy(cache), len(continuation) - 1)
                states = [*first, *more]
            elif len(continuation) > 1:
                states, _ = self._read([*prompt, *continuation[:-1]], None, len(continuation))
            judged = self._head.judged(states, continuation)
            found.append(Scored(tuple(p for p, _ in judged), all(best for _, best in judged)))
        return found

    def _read(self, ids: Sequence[int], cache: Any, wanted: int) -> tuple[list[Tensor], Any]:
        """Run ``ids`` after what ``cache`` holds; the head's input (or output) at the last ``wanted``, and the cache.

        The cache is None for a model that keeps another kind of memory.
        """
        import torch

        self._head.wanted = wanted
        try:
            out = self._model(
                input_ids=torch.tensor([list(ids)], device=self._model.device),
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            self._head.wanted = 1
        rows = self._head.seen[0] if self._head.exact else out.logits[0, -wanted:]
        return list(rows), getattr(out, "past_key_values", None)


class _AnswerHead:
    """The output head of a loaded model, in float32 where it is not quantized; while generating, a logits processor."""

    def __init__(self, model: Any) -> None:
        import torch

        head = model.get_output_embeddings()
        if head is None:
            raise SourceError(f"{type(model).__name__} has no output head, so it gives no answers")
        plain = (torch.bfloat16, torch.float16, torch.float32)
        self.exact = type(head) is torch.nn.Linear and head.weight.dtype in plain
        self.entries = head.out_features
        self.wanted = 1
        self.margins: list[Tensor] = []
        """Of each step of a batch, [sequences]: by how much the chosen token led."""
        self.seen: Tensor = torch.empty(0)
        """The last inputs, [sequences, wanted, width]."""
        self._head = head
        self._scale, self._softcap = transforms(model.config.get_text_config())
        if self.exact:
            recomputed: Any = self  # it has the part of a Head that is asked for
            verify(model, recomputed, torch.arange(min(VERIFIED, self.entries))[None].numpy())
        head.register_forward_pre_hook(self._tap)

    def _tap(self, module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Keep the wanted inputs, and give the head no more of them."""
        states = inputs[0][:, -self.wanted :]
        self.seen = states.detach()
        return (states[:, -1:] if self.exact else states, *inputs[1:])

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of ``hidden`` [n, width]; on the CPU."""
        import torch

        weight = self._head.weight.detach()
        inputs = hidden.to(weight.device).float()
        step = max(1, SLICE_BYTES // (4 * inputs.shape[1]))
        out = torch.cat([inputs @ part.float().T for part in torch.split(weight, step)], dim=1)
        return self._transformed(out, slice(None)).cpu()

    def judged(self, states: Sequence[Tensor], targets: Sequence[int]) -> list[tuple[float, bool]]:
        """Log-probability of each target at its state, and whether it is the most likely token."""
        import torch

        found = []
        step = max(1, LOGIT_BYTES // (4 * self.entries))
        for start in range(0, len(targets), step):
            part = torch.stack(list(states[start : start + step]))
            logits = self.logits(part) if self.exact else part.float().cpu()
            wanted = torch.tensor(targets[start : start + step])
            log_p = logits.double().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            found += list(zip(log_p.tolist(), (logits.argmax(-1) == wanted).tolist(), strict=True))
        return found

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - transformers gives it
        """Scores [sequences, vocabulary] with the best ones exact and all others ruled out."""
        import torch

        best = scores.topk(min(CANDIDATES, self.entries))
        values = best.values
        if self.exact:
            weight = self._head.weight.detach()[best.indices].float()
            values = torch.einsum("sw,scw->sc", self.seen[:, -1].to(weight), weight)
            values = self._transformed(values, best.indices).to(scores)
        first, second = values.topk(2).values.T
        self.margins.append((first - second).cpu())
        return torch.full_like(scores, -torch.inf).scatter(1, best.indices, values)

    def _transformed(self, out: Tensor, entries: Tensor | slice) -> Tensor:
        """Logits of what the weights of ``entries`` make."""
        import torch

        if self._head.bias is not None:
            out = out + self._head.bias.detach()[entries]
        out = out * self._scale
        return torch.tanh(out / self._softcap) * self._softcap if self._softcap else out
