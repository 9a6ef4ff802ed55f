"""Greedy answers and scores of a folder through transformers, prompt by prompt with the model's own cache.

Padding prompts to one length changes bfloat16 results, so each is answered by itself. As for perplexity the output head
is computed in float32: in bfloat16 the best tokens of a vocabulary often have equal logits, and the lowest id would win.
While generating, only the ``CANDIDATES`` best of the rounded logits are computed anew. A head that is itself quantized
speaks for itself.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.validation._engines.head import LOGIT_BYTES, SLICE_BYTES, Unsound, transforms
from quantool.validation._engines.interface import Answer, Engine, Scored, require_room
from quantool.validation._engines.reference import load_model, verify

if TYPE_CHECKING:
    from torch import Tensor

CANDIDATES = 64
VERIFIED = 32
"""Tokens on which the recomputed head is compared with the model's own."""


@contextmanager
def load_engine(folder: Path, context: int, device: str, trust_remote_code: bool) -> Iterator[Engine]:
    """Load a folder in the dtype it is saved in. Raises Unsound when transformers does not load it."""
    try:
        engine = TransformersEngine(load_model(folder, "auto", device, trust_remote_code), context)
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
        return [self._answer(prompt, budget) for prompt in prompts]

    def _answer(self, prompt: Sequence[int], budget: int) -> Answer:
        import torch

        self._head.margins = []
        ids = torch.tensor([list(prompt)], device=self._model.device)
        with torch.no_grad():
            whole = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=budget,
                logits_processor=[self._head],
            )
        made = whole[0, len(prompt) :].tolist()
        ended = made[-1] if made[-1] in self._ends else None
        return Answer(tuple(made if ended is None else made[:-1]), ended, tuple(self._head.margins))

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
        rows = self._head.seen if self._head.exact else out.logits[0, -wanted:]
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
        self.margins: list[float] = []
        self.seen: Tensor = torch.empty(0)
        self._head = head
        self._scale, self._softcap = transforms(model.config.get_text_config())
        if self.exact:
            recomputed: Any = self  # it has the part of a Head that is asked for
            verify(model, recomputed, torch.arange(min(VERIFIED, self.entries))[None].numpy())
        head.register_forward_pre_hook(self._tap)

    def _tap(self, module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Keep the wanted inputs, and give the head no more of them."""
        states = inputs[0][:, -self.wanted :]
        self.seen = states[0].detach()
        return (states[:, -1:] if self.exact else states, *inputs[1:])

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Float32 logits of ``hidden`` [n, width], of all entries or those of ``rows``; on the CPU."""
        import torch

        weight = self._head.weight.detach()
        weight = weight if rows is None else weight[rows]
        inputs = hidden.to(weight.device).float()
        step = max(1, SLICE_BYTES // (4 * inputs.shape[1]))
        out = torch.cat([inputs @ part.float().T for part in torch.split(weight, step)], dim=1)
        if self._head.bias is not None:
            out += self._head.bias.detach() if rows is None else self._head.bias.detach()[rows]
        out *= self._scale
        return (torch.tanh(out / self._softcap) * self._softcap if self._softcap else out).cpu()

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
        """Scores [1, vocabulary] with the best ones exact and all others ruled out."""
        import torch

        best = scores[0].topk(min(CANDIDATES, self.entries))
        values = best.values
        if self.exact:
            values = self.logits(self.seen[-1:], best.indices)[0].to(scores)
        first, second = values.topk(2).values.tolist()
        self.margins.append(first - second)
        return torch.full_like(scores, -torch.inf).index_copy(1, best.indices, values[None])
