"""Requests of EleutherAI's lm-eval answered by an engine: one class for reference and artifact, whatever runs them.

Token ids are those of the source's tokenizer on both sides: what a damaged tokenizer does is found by the check on
tokenizers, and here it would hide what the weights do. Prompts that do not fit are cut on the left, as lm-eval does.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from quantool.errors import SourceError
from quantool.runtime.worker import Report
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.hf_tokenizer import beginning
from quantool.validation._engines.interface import Engine, Scored

Ids = list[int]
EngineLoader = Callable[[int], AbstractContextManager[Engine]]
"""Load the model for prompts and answers of so many tokens."""

SCORED_AT_ONCE = 64
ANSWERED_AT_ONCE = 32
SLICE = 64
"""Tokens of an answer that are made before it is looked at for the texts that end it."""
MAX_NEW_TOKENS = 256
"""Tokens of an answer where the task does not say: lm-eval's own default."""


def adapted(
    tokenizer: Any, load_engine: EngineLoader, longest: int, report: Report, *, chat: bool = False
) -> Any:
    """Make an ``lm_eval.api.model.LM`` that answers through an engine; its ``notes`` count what was done otherwise.

    ``longest`` is the number of tokens that the source reads. The model is loaded for each kind of request, for no more
    tokens than the longest of them has. With ``chat`` prompts come out of the chat template, which writes BOS itself.
    """
    from lm_eval.api.model import TemplateLM

    return type("Adapted", (Adapter, TemplateLM), {})(tokenizer, load_engine, longest, report, chat=chat)


@dataclass
class _Writing:
    """An answer in the making."""

    place: int
    prompt: Ids
    left: int
    until: list[str]
    ids: Ids = field(default_factory=list)


class Adapter:
    """What ``TemplateLM`` leaves to the one who knows the model."""

    def __init__(
        self, tokenizer: Any, load_engine: EngineLoader, longest: int, report: Report, *, chat: bool
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.notes: Counter[str] = Counter()
        self._load_engine = load_engine
        self._longest = longest
        self._report = report
        self._chat = chat
        self._beginning = [] if chat else beginning(tokenizer)

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        eos: int | None = self.tokenizer.eos_token_id
        return self.prefix_token_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS in a model that has none."""
        bos: int | None = self.tokenizer.bos_token_id
        if bos is None and self.tokenizer.eos_token_id is None:
            raise SourceError(
                "the source's tokenizer has neither BOS nor EOS, so a text cannot be scored from its start"
            )
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """By what lm-eval keeps requests, which it is not asked to."""
        return ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the template renders it; without a prompt its last message, of the assistant, is continued."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Ids:
        """Ids of a text, with BOS in front where the tokenizer puts it and the text does not begin with it."""
        ids: Ids = list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
        if add_special_tokens is False or ids[:1] == self._beginning:
            return ids
        return [*self._beginning, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(prompt, continuation) for _, prompt, continuation in requests]
        return [(sum(score.log_probs), score.greedy) for score in self._scored(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-probability of whole texts, each token after as many others as fit; the first after ``prefix_token_id``."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs: list[tuple[Ids, Ids]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._longest - 1, 1)
            found = [make_disjoint_window(window) for window in windows]
            counts.append(len(found))
            pairs += found
        scored = iter(self._scored(pairs))
        return [sum(sum(score.log_probs) for score in itertools.islice(scored, count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Greedy answers up to the first of the texts that end them."""
        writings = [self._begun(place, *request.args) for place, request in enumerate(requests)]
        texts = [""] * len(writings)
        total = sum(writing.left for writing in writings)
        with self._load_engine(
            max((len(writing.prompt) + writing.left for writing in writings), default=1)
        ) as engine:
            while writings:
                going_on = []
                for writing in self._continued(engine, writings):
                    texts[writing.place], ended = self._text(writing)
                    if not ended and writing.left:
                        going_on.append(writing)
                writings = going_on
                self._report(total - sum(writing.left for writing in writings), total)
        return texts

    def _begun(self, place: int, context: str, settings: dict[str, Any]) -> _Writing:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        wanted: Any = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        self.notes["answers that the task wants drawn are greedy"] += bool(wanted["do_sample"])
        budget = min(wanted["max_gen_toks"], self._longest // 2)
        self.notes["answers shortened to half of what the model reads"] += budget < wanted["max_gen_toks"]
        ids = self.tok_encode(context) or [self.prefix_token_id]
        room = self._longest - budget
        self.notes[f"prompts cut on the left to {room} tokens"] += len(ids) > room
        end = self.tokenizer.decode([self.eot_token_id])
        return _Writing(place, ids[-room:], budget, handle_stop_sequences(wanted.get("until"), eos=end))

    def _continued(self, engine: Engine, writings: Sequence[_Writing]) -> Iterator[_Writing]:
        """Write the next tokens of each; one that the model ended has nothing left to write."""
        for budget in sorted({min(SLICE, writing.left) for writing in writings}):
            alike = [writing for writing in writings if min(SLICE, writing.left) == budget]
            for start in range(0, len(alike), ANSWERED_AT_ONCE):
                part = alike[start : start + ANSWERED_AT_ONCE]
                answers = engine.generate([writing.prompt + writing.ids for writing in part], budget)
                for writing, answer in zip(part, answers, strict=True):
                    writing.ids += answer.ids
                    writing.left = writing.left - budget if answer.ended is None else 0
                    yield writing

    def _text(self, writing: _Writing) -> tuple[str, bool]:
        """What was written, up to the first text that ends it, and whether there was one."""
        text: str = self.tokenizer.decode(writing.ids, skip_special_tokens=True)
        places = [text.find(stop) for stop in writing.until if stop and stop in text]
        return (text[: min(places)], True) if places else (text, False)

    def _cut(self, prompt: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """Both so that they fit, and none of them empty where there are two tokens for it."""
        ids = prompt + continuation
        self.notes[f"prompts cut on the left to {self._longest} tokens"] += len(ids) > self._longest
        ids = ids[-self._longest :]
        split = min(max(len(ids) - len(continuation), 1), len(ids) - 1)
        return ids[:split], ids[split:]

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scored]:
        """Score pairs in an order that suits the engine; a pair of a single token is certain."""
        found = [Scored((), greedy=True)] * len(pairs)
        # Long ones first, so that the time left is not underestimated; the same prompts beside each other.
        order = sorted(range(len(pairs)), key=lambda place: (-len(pairs[place][0]), pairs[place][0]))
        order = [place for place in order if pairs[place][0]]
        if not order:
            return found
        with self._load_engine(max(sum(map(len, pairs[place])) for place in order)) as engine:
            for start in range(0, len(order), SCORED_AT_ONCE):
                part = order[start : start + SCORED_AT_ONCE]
                scored = engine.score(
                    [pairs[place][0] for place in part], [pairs[place][1] for place in part]
                )
                for place, score in zip(part, scored, strict=True):
                    if not all(map(math.isfinite, score.log_probs)):
                        raise Unsound("its logits are not finite")
                    found[place] = score
                self._report(start + len(part), len(order))
        return found
