"""Greedy answers of reference and artifact to the same prompts.

Prompts are rendered by the source's chat template and tokenized by its tokenizer, for both sides: what a wrong tokenizer
or template does is left to the checks of those. The reference's answers are computed once for a source, prompts and
budget, and kept for all levels and later runs; an artifact's for its files.

A run has at most ``LIMIT`` prompts, several of them answered at once. So the reference of a model of 40 B parameters (80 GB
read for each step, 0.8 s at 100 GB/s) takes minutes on a CPU with the default budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantool.config.schema import Corpus
from quantool.plugins.contract import Case
from quantool.records import fingerprint
from quantool.runtime.worker import Report, preloaded
from quantool.texts import corpus
from quantool.texts.readers import BUILT_IN as DOCSTRINGS
from quantool.validation._cache.questions import Questions, load_engine
from quantool.validation._chat.conversations import ENDED, Conversation, end_of_turn, suite, user
from quantool.validation._chat.languages import questions
from quantool.validation._chat.prompts import BUILT_IN
from quantool.validation._engines import hf_tokenizer
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.interface import Answer, Engine
from quantool.validation._engines.vocabulary import by_source

LIMIT = 64
OF_CORPORA = 16
"""Prompts taken from conversations that the configuration measures on."""
LONGEST = 2048
"""Tokens of a prompt; a longer one is left out."""
CORPUS_CHARACTERS = 200_000


@dataclass(frozen=True)
class Prompt:
    """One prompt: token ids of the source's tokenizer."""

    name: str
    question: str
    """What the user says last, for messages."""
    tools: bool
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """All prompts of a source, and what there is to know for judging answers."""

    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...]
    """Which conversations were left out, and why."""
    ends: tuple[int, ...]
    """Ids that end an answer: those that the source's configurations name."""
    turn_end: int | None
    """The special token that the source's template prints after an answer."""
    special: dict[int, str]

    def all_ends(self) -> frozenset[int]:
        """Every token that ends an answer, whether the source's configurations name it or only its template prints it."""
        return frozenset(self.ends) | (frozenset() if self.turn_end is None else {self.turn_end})


@dataclass(frozen=True)
class ChatAnswer:
    """One answer: ids without the one that ended it, and by how much each token led.

    ``text`` has special tokens and goes as far as the first token that ends a turn, whether the engine stopped or not.
    """

    ids: tuple[int, ...]
    ended: int | None
    margins: tuple[float, ...]
    text: str


def prompts_of(case: Case) -> Prompts:
    """The prompts for the case's source: built in, the user's, and some of the corpora that hold conversations.

    Raises ConfigError for a file that cannot be read. Conversations that the source's template refuses are left out.
    """
    chosen, notes = _conversations(case)
    closing = next(
        conversation
        for conversation in suite(case.source.facts.chat_template or "")
        if conversation.name == ENDED
    )
    request = {"conversations": [conversation.request() for conversation in (closing, *chosen)]}
    rendered = by_source(case, "behaviour", hf_tokenizer.render, request)
    facts = rendered["facts"]
    room = min(LONGEST, case.source.facts.context - case.settings.behaviour.max_new_tokens)
    prompts = []
    for conversation, answer in zip(chosen, rendered["answers"][1:], strict=True):
        if not answer["accepted"]:
            notes.append(
                f"{conversation.name!r} left out: the source's template refuses it ({answer['error']})"
            )
            continue
        ids = tuple(answer["accepted"][0]["ids"])
        if len(ids) > room:
            notes.append(f"{conversation.name!r} left out: {len(ids)} tokens, room for {room}")
        else:
            prompts.append(
                Prompt(conversation.name, _last_question(conversation), bool(conversation.tools), ids)
            )
    special = {token: content for content, token in facts["special_ids"].items()}
    return Prompts(
        tuple(prompts),
        tuple(notes),
        case.source.facts.eos_token_ids or ((facts["eos"],) if facts["eos"] is not None else ()),
        end_of_turn(rendered["answers"][0], facts["special_ids"]),
        special,
    )


def _conversations(case: Case) -> tuple[list[Conversation], list[str]]:
    """What to ask, ``LIMIT`` at most, and notes on what is left out."""
    template = case.source.facts.chat_template or ""
    settings = suite(template)[0].settings
    found = [*BUILT_IN, *_own(case), *_of_corpora(case), *_of_languages(case)]
    notes = []
    if "tools" not in template:
        without = [conversation for conversation in found if not conversation.tools]
        notes.append(f"{len(found) - len(without)} with tools left out: the source's template knows none")
        found = without
    if len(found) > LIMIT:
        notes.append(f"the last {len(found) - LIMIT} of {len(found)} left out")
    return [
        Conversation(conversation.name, conversation.messages, conversation.tools, settings=settings)
        for conversation in found[:LIMIT]
    ], notes


def _of_languages(case: Case) -> Iterator[Conversation]:
    """A question in each further language that the model's own card names."""
    for language, text in questions(case.source.card.languages).items():
        yield Conversation(f"question, {language}", (user(text),))


def _own(case: Case) -> Iterator[Conversation]:
    """The user's prompts."""
    path = case.settings.behaviour.prompts
    if path is None:
        return
    for number, document in enumerate(corpus.read(Corpus(name="prompts", path=path)), 1):
        if (conversation := _unanswered(document, f"yours, {number}")) is not None:
            yield conversation


def _of_corpora(case: Case) -> list[Conversation]:
    """Conversations of the corpora that the configuration names, as many of each."""
    named = [entry for entry in corpus.corpora(case.config) if entry.dataset != DOCSTRINGS]
    by_corpus = []
    for entry in named:
        documents = corpus.read(entry, characters=CORPUS_CHARACTERS, cache_dir=case.config.dataset_cache_dir)
        chats = enumerate((document for document in documents if document.messages), 1)
        questions = (_unanswered(document, f"{entry.name}, {number}") for number, document in chats)
        if found := [question for question in questions if question is not None]:
            by_corpus.append(found)
    share = OF_CORPORA // max(1, len(by_corpus))
    return [question for found in by_corpus for question in found[:share]]


def _unanswered(document: corpus.Document, name: str) -> Conversation | None:
    """The document without the answer at its end; None when nothing asks for one."""
    messages = list(document.messages or ({"role": "user", "content": document.text},))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        return None
    return Conversation(name, tuple(messages), document.tools)


def _last_question(conversation: Conversation) -> str:
    return next(
        str(message["content"]) for message in reversed(conversation.messages) if message["role"] == "user"
    )


def questions_of(case: Case, prompts: Prompts) -> Questions:
    """What reference and artifact are asked."""
    request = {
        "prompts": [prompt.ids for prompt in prompts.prompts],
        "budget": case.settings.behaviour.max_new_tokens,
        "ends": sorted(prompts.all_ends()),
    }
    return Questions(
        "behaviour", answer, request, fingerprint(request), "tok", divided=("prompts", "answers")
    )


def read_answers(found: Mapping[str, Any]) -> tuple[ChatAnswer, ...]:
    """The answers of a worker."""
    return tuple(
        ChatAnswer(tuple(answer["ids"]), answer["ended"], tuple(answer["margins"]), answer["text"])
        for answer in found["answers"]
    )


@preloaded("transformers")
def answer(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: answer ``prompts`` (ids), at most ``budget`` tokens each; see ``Questions`` for the model.

    Texts are made by the ``tokenizer`` (folder) and cut behind the first of ``ends`` (ids). Result: ``failure`` (why the
    artifact does not answer, else empty) and ``answers``, the fields of ``ChatAnswer``.
    """
    decode = _decoder(Path(request["tokenizer"]), trust_remote_code=request["trust_remote_code"])
    prompts, budget = request["prompts"], request["budget"]
    found: dict[int, dict[str, Any]] = {}
    try:
        with load_engine(request, max(map(len, prompts)) + budget) as engine:
            _require_entries(engine, prompts)
            for part in _parts(prompts):
                answers = engine.generate([prompts[number] for number in part], budget)
                for number, answered in zip(part, answers, strict=True):
                    found[number] = asdict(answered) | {"text": decode(_turn(answered, request["ends"]))}
                report(len(found) * budget, len(prompts) * budget)
    except Unsound as reason:
        return {"failure": str(reason), "answers": []}
    return {"failure": "", "answers": [found[number] for number in range(len(prompts))]}


def _require_entries(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    highest = max(max(prompt) for prompt in prompts)
    if highest >= engine.vocabulary:
        raise Unsound(
            f"its vocabulary has {engine.vocabulary} entries, but the source's prompts use id {highest}"
        )


def _decoder(folder: Path, *, trust_remote_code: bool) -> Callable[[list[int]], str]:
    """Token ids as text, special tokens too. Without importing transformers, which takes seconds, where that will do."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda ids: str(fast.decode(ids, skip_special_tokens=False))
    slow = hf_tokenizer.load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    return lambda ids: str(slow.decode(ids, skip_special_tokens=False))


def _turn(answer: Answer, ends: Sequence[int]) -> list[int]:
    """All ids of the answer, as far as the first of ``ends``."""
    whole = [*answer.ids] if answer.ended is None else [*answer.ids, answer.ended]
    last = next((place for place, token in enumerate(whole) if token in ends), len(whole))
    return whole[: last + 1]


def _parts(prompts: Sequence[Sequence[int]], size: int = 32) -> Iterator[list[int]]:
    """The numbers of the prompts, some at a time so that progress is seen, those of like lengths together."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for first in range(0, len(order), size):
        yield order[first : first + size]
