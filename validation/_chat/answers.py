"""Greedy answers of reference and artifact to the same prompts.

Prompts are rendered by the source's chat template and tokenized by its tokenizer, for both sides: what a wrong tokenizer
or template does is left to the checks of those. The reference's answers are computed once for a source, prompts and
budget, and kept for all levels and later runs; an artifact's for its files.

A run has at most ``LIMIT`` prompts, so the reference of a model of 40 B parameters (80 GB read for each token, 0.8 s at
100 GB/s) takes under an hour on a CPU with the default budget, and an artifact, several prompts at once, a fraction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantool.config.schema import Corpus
from quantool.errors import QuantizationError, SourceError
from quantool.plugins.contract import Case
from quantool.records import fingerprint
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import preloaded
from quantool.source.resolve import identity
from quantool.texts import corpus
from quantool.texts.readers import BUILT_IN as DOCSTRINGS
from quantool.validation._cache.keys import stamp, versions
from quantool.validation._chat.conversations import ENDED, Conversation, end_of_turn, suite
from quantool.validation._chat.prompts import BUILT_IN
from quantool.validation._engines import hf_tokenizer
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.interface import Answer, Engine
from quantool.validation._engines.start import start
from quantool.validation._engines.vocabulary import by_source

LIMIT = 64
OF_CORPORA = 16
"""Prompts taken from conversations that the configuration measures on."""
LONGEST = 2048
"""Tokens of a prompt; a longer one is left out."""
CORPUS_CHARACTERS = 200_000

LIBRARIES = {
    "llama.cpp": ("llama-cpp-python",),
    "transformers": ("torch", "transformers"),
    "vllm": ("torch", "vllm"),
}
"""Engine to the libraries whose versions its answers depend on."""


class _WorkerError(QuantizationError):
    """The worker ended without an answer."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: token ids of the source's tokenizer."""

    name: str
    said: str
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
class Said:
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
    closing = next(one for one in suite(case.source.facts.chat_template or "") if one.name == ENDED)
    asked = {"conversations": [one.request() for one in (closing, *chosen)]}
    rendered = by_source(case, "behaviour", hf_tokenizer.render, asked)
    facts = rendered["facts"]
    room = min(LONGEST, case.source.facts.context - case.settings.behaviour.max_new_tokens)
    prompts = []
    for one, answer in zip(chosen, rendered["answers"][1:], strict=True):
        if not answer["accepted"]:
            notes.append(f"{one.name!r} left out: the source's template refuses it ({answer['error']})")
            continue
        ids = tuple(answer["accepted"][0]["ids"])
        if len(ids) > room:
            notes.append(f"{one.name!r} left out: {len(ids)} tokens, room for {room}")
        else:
            prompts.append(Prompt(one.name, _last_words(one), bool(one.tools), ids))
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
    found = [*BUILT_IN, *_own(case), *_of_corpora(case)]
    notes = []
    if "tools" not in template:
        without = [one for one in found if not one.tools]
        notes.append(f"{len(found) - len(without)} with tools left out: the source's template knows none")
        found = without
    if len(found) > LIMIT:
        notes.append(f"the last {len(found) - LIMIT} of {len(found)} left out")
    return [
        Conversation(one.name, one.messages, one.tools, settings=settings) for one in found[:LIMIT]
    ], notes


def _own(case: Case) -> Iterator[Conversation]:
    """The user's prompts."""
    path = case.settings.behaviour.prompts
    if path is None:
        return
    for number, document in enumerate(corpus.read(Corpus(name="prompts", path=path)), 1):
        if (one := _asked(document, f"yours, {number}")) is not None:
            yield one


def _of_corpora(case: Case) -> list[Conversation]:
    """Conversations of the corpora that the configuration names, as many of each."""
    named = [one for one in corpus.corpora(case.config) if one.dataset != DOCSTRINGS]
    by_corpus = []
    for entry in named:
        documents = corpus.read(entry, characters=CORPUS_CHARACTERS, cache_dir=case.config.dataset_cache_dir)
        chats = enumerate((document for document in documents if document.messages), 1)
        asked = (_asked(document, f"{entry.name}, {number}") for number, document in chats)
        if found := [one for one in asked if one is not None]:
            by_corpus.append(found)
    share = OF_CORPORA // max(1, len(by_corpus))
    return [one for found in by_corpus for one in found[:share]]


def _asked(document: corpus.Document, name: str) -> Conversation | None:
    """The document without the answer at its end; None when nothing asks for one."""
    messages = list(document.messages or ({"role": "user", "content": document.text},))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        return None
    return Conversation(name, tuple(messages), document.tools)


def _last_words(one: Conversation) -> str:
    return next(str(message["content"]) for message in reversed(one.messages) if message["role"] == "user")


def reference_answers(case: Case, prompts: Prompts, progress: Progress) -> tuple[Said, ...]:
    """What the checkpoint itself answers; SourceError when transformers does not run it."""
    key = fingerprint(identity(case.source), *_asked_for(case, prompts), versions(LIBRARIES["transformers"]))
    answers = case.workspace.recall("reference/answers", key)
    if answers is None:
        with progress.bar("reference answers", "tok") as bar:
            answers = process.call(
                answer,
                _request(case, prompts, "transformers", case.source.folder),
                log=case.workspace.logs / "reference.log",
                bar=bar,
                failure=SourceError,
            )
        if answers["failure"]:
            raise SourceError(f"{case.source.label()} gives no answers: {answers['failure']}")
        case.workspace.keep("reference/answers", key, [], answers)
    return _read(answers)


def artifact_answers(case: Case, prompts: Prompts, progress: Progress) -> tuple[Said, ...] | str:
    """What the artifact answers, or why it does not."""
    key = fingerprint(
        stamp(case.artifact), case.engine, *_asked_for(case, prompts), versions(LIBRARIES[case.engine])
    )
    stage = f"answers/{case.name}"
    answers = case.workspace.recall(stage, key)
    if answers is None:
        with progress.bar(f"answers of {case.name}", "tok") as bar:
            try:
                answers = process.call(
                    answer,
                    _request(case, prompts, case.engine, case.artifact),
                    log=case.workspace.logs / f"{case.name.replace('/', '-')}.behaviour.log",
                    bar=bar,
                    failure=_WorkerError,
                )
            except (
                _WorkerError
            ) as error:  # as for perplexity: an abort is the file's fault, running out of memory is not
                if "SIGABRT" in error.message or "SIGSEGV" in error.message:
                    return f"{case.engine} crashes on it: {error.message}\n{error.hint}"
                raise
        if answers["failure"]:
            return str(answers["failure"])
        case.workspace.keep(stage, key, [], answers)
    return _read(answers)


def _read(answers: dict[str, Any]) -> tuple[Said, ...]:
    return tuple(
        Said(tuple(one["ids"]), one["ended"], tuple(one["margins"]), one["text"])
        for one in answers["answers"]
    )


def _asked_for(case: Case, prompts: Prompts) -> tuple[Any, ...]:
    ids = [prompt.ids for prompt in prompts.prompts]
    return ids, case.settings.behaviour.max_new_tokens, sorted(prompts.all_ends())


def _request(case: Case, prompts: Prompts, engine: str, artifact: Path) -> dict[str, Any]:
    return {
        "engine": engine,
        "artifact": str(artifact),
        "tokenizer": str(case.source.tokenizer or case.source.folder),
        "prompts": [prompt.ids for prompt in prompts.prompts],
        "budget": case.settings.behaviour.max_new_tokens,
        "ends": sorted(prompts.all_ends()),
        "device": case.config.device or "auto",
        "trust_remote_code": case.source.trust_remote_code,
    }


@preloaded("transformers")
def answer(request: dict[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker: answer ``prompts`` (ids) with ``engine`` and ``artifact``, at most ``budget`` tokens each.

    Texts are made by the ``tokenizer`` (folder) and cut behind the first of ``ends`` (ids). Result: ``failure`` (why the artifact does not answer, else empty) and
    ``answers``, the fields of ``Said``.
    """
    decode = _decoder(Path(request["tokenizer"]), trust_remote_code=request["trust_remote_code"])
    prompts, budget = request["prompts"], request["budget"]
    context = max(map(len, prompts)) + budget
    found: list[dict[str, Any]] = []
    try:
        with start(
            request["engine"],
            Path(request["artifact"]),
            context=context,
            device=request["device"],
            trust_remote_code=request["trust_remote_code"],
        ) as engine:
            _require_entries(engine, prompts)
            for part in _parts(prompts):
                for said in engine.generate(part, budget):
                    text = decode(_turn(said, request["ends"]))
                    found.append(asdict(said) | {"text": text})
                report(len(found) * budget, len(prompts) * budget)
    except Unsound as reason:
        return {"failure": str(reason), "answers": []}
    return {"failure": "", "answers": found}


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
    from quantool.validation._engines import hf_tokenizer

    slow = hf_tokenizer.load(str(folder), trust_remote_code=trust_remote_code)
    return lambda ids: str(slow.decode(ids, skip_special_tokens=False))


def _turn(said: Answer, ends: Sequence[int]) -> list[int]:
    """All ids of the answer, as far as the first of ``ends``."""
    whole = [*said.ids] if said.ended is None else [*said.ids, said.ended]
    last = next((place for place, token in enumerate(whole) if token in ends), len(whole))
    return whole[: last + 1]


def _parts(prompts: Sequence[Sequence[int]], size: int = 16) -> Iterator[Sequence[Sequence[int]]]:
    """The prompts, some at a time, so that progress is seen."""
    for first in range(0, len(prompts), size):
        yield prompts[first : first + size]
