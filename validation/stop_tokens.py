"""Whether generation ends where the source's ends: EOS, the tokens that end a turn, BOS and padding.

A GGUF with a dropped or wrong EOS, or one in which the token that ends a chat turn does not end generation, answers
without end. Ids are compared with the source's tokenizer and configurations; what ends generation is asked of llama.cpp
itself (``llama_vocab_is_eog``). For an artifact that transformers loads, its configurations are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.json_file import read_optional
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.texts import inputs
from quantool.validation._chat.conversations import ENDED, end_of_turn, of_case
from quantool.validation._engines import hf_tokenizer
from quantool.validation._engines.vocabulary import (
    TOKENIZER,
    UnloadableError,
    Vocabulary,
    by_artifact,
    by_source,
    of_gguf,
)
from quantool.validation._findings.builder import FindingBuilder, without_folders

NAME = "stop_tokens"
BUILD = FindingBuilder(NAME)


@check(
    NAME,
    depends=TOKENIZER | Depends(inputs=(inputs.conversations,), engine=True),
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """EOS, every token that ends generation or a chat turn, BOS and padding, as the source has them."""
    del progress  # a second
    conversations = of_case(case)
    request = {"conversations": [conversation.request() for conversation in conversations]}
    reference = by_source(case, "chats", hf_tokenizer.render, request)
    facts = reference["facts"]
    names = [conversation.name for conversation in conversations]
    turn_end = end_of_turn(reference["answers"][names.index(ENDED)], facts["special_ids"])
    try:
        if case.engine != "llama.cpp":
            return _judge_folder(case, facts)
        vocabulary, _ = of_gguf(case)
    except (UnloadableError, SourceError) as error:
        return [BUILD.fail("loads", without_folders(str(error), case.artifact))]
    return [
        _judge_eos(facts["eos"], vocabulary),
        _judge_ends(case, facts, turn_end, vocabulary),
        _judge_turn_end(case, turn_end, vocabulary),
        _judge_lists(case, facts, turn_end, vocabulary),
        *_judge_others(facts, vocabulary),
    ]


def _judge_eos(eos: int | None, vocabulary: Vocabulary) -> Finding:
    """``tokenizer.ggml.eos_token_id`` is there and the source tokenizer's."""
    if eos is None:
        return BUILD.skip("eos", "the source's tokenizer has no EOS")
    stored = _stored(vocabulary, "eos")
    measured = _shown(stored, vocabulary) if stored is not None else "absent"
    problem = "tokenizer.ggml.eos_token_id is not the EOS of the source's tokenizer" if stored != eos else ""
    return BUILD.fact("eos", measured, problem, _shown(eos, vocabulary))


def _judge_ends(case: Case, facts: dict[str, Any], turn_end: int | None, vocabulary: Vocabulary) -> Finding:
    """Every EOS id of config.json and generation_config.json ends generation in llama.cpp, and no ordinary token."""
    wanted = case.source.facts.eos_token_ids
    if not wanted:
        return BUILD.skip("ends", "neither config.json nor generation_config.json of the source names an EOS")
    known = {*wanted, *facts["special_ids"].values(), facts["eos"]}
    missing = [token for token in wanted if token not in vocabulary.ends]
    excess = [token for token in vocabulary.ends if token not in known]
    problem = note = ""
    if missing:
        problem = f"llama.cpp does not stop at {_list(missing, vocabulary)}"
    elif excess:
        problem = f"llama.cpp stops at {_list(excess, vocabulary)}, which is no special token of the source"
    elif turn_end is not None and turn_end not in wanted:
        note = (
            f"defect of the source: its configurations do not name {_shown(turn_end, vocabulary)}, "
            "which its template prints at the end of a turn"
        )
    return BUILD.fact(
        "ends", _list(vocabulary.ends, vocabulary), problem, _list(wanted, vocabulary), note=note
    )


def _judge_turn_end(case: Case, turn_end: int | None, vocabulary: Vocabulary) -> Finding:
    """The token that the template prints after an assistant's message ends generation in llama.cpp."""
    if turn_end is None:
        none = case.source.facts.chat_template is None
        reason = "the template ends a turn without a special token"
        return BUILD.skip("turn_end", "the source has no chat template" if none else reason)
    problem = ""
    if turn_end not in vocabulary.ends:
        problem = "llama.cpp does not stop where the template ends a turn: answers would not end"
    measured = _list(vocabulary.ends, vocabulary)
    return BUILD.fact("turn_end", measured, problem, _shown(turn_end, vocabulary))


def _judge_lists(case: Case, facts: dict[str, Any], turn_end: int | None, vocabulary: Vocabulary) -> Finding:
    """The tokens that end something are the same for config.json, generation_config.json, tokenizer, template and GGUF.

    Where the source's own files disagree that is said; a GGUF that names an EOT which none of them knows fails.
    """
    lists = {name: _eos_of(case.source.folder / name) for name in ("config.json", "generation_config.json")}
    for name, token in (("tokenizer", facts["eos"]), ("template", turn_end)):
        lists[name] = [token] if token is not None else None
    named = {name: set(ids) for name, ids in lists.items() if ids}
    if not named:
        return BUILD.skip("eos_lists", "no file of the source names a token that ends something")
    every = set[int]().union(*named.values())
    stops = next((name for name in ("generation_config.json", "config.json") if name in named), None)
    lacking = sorted(every - named[stops]) if stops is not None else []
    stored = {
        name: token
        for name, token in (("eos", vocabulary.eos), ("eot", _stored(vocabulary, "eot")))
        if token is not None
    }
    problem = note = ""
    if (eot := stored.get("eot")) is not None and eot not in every:
        problem = (
            f"tokenizer.ggml.eot_token_id is {_shown(eot, vocabulary)}, which the source's files do not name"
        )
    elif lacking:
        note = f"defect of the source: {stops}, at whose ids transformers stops, lacks {_list(lacking, vocabulary)}"
    return BUILD.fact(
        "eos_lists",
        ", ".join(f"{name} {_shown(token, vocabulary)}" for name, token in stored.items()),
        problem,
        "; ".join(f"{name}: {_list(sorted(ids), vocabulary)}" for name, ids in named.items()),
        note=note,
    )


def _judge_others(facts: dict[str, Any], vocabulary: Vocabulary) -> list[Finding]:
    """BOS, padding, and whether BOS and EOS are added. An id that the source does not have is not judged."""
    stored: list[tuple[str, Any]] = [
        ("bos", _stored(vocabulary, "bos")),
        ("pad", _stored(vocabulary, "padding")),
        ("adds_bos", vocabulary.adds_bos),
        ("adds_eos", vocabulary.adds_eos),
    ]
    return [
        BUILD.equal(metric, measured, facts[metric])
        for metric, measured in stored
        if facts[metric] is not None and not (metric == "pad" and measured is None)
    ]


def _stored(vocabulary: Vocabulary, name: str) -> int | None:
    value = vocabulary.keys.get(f"tokenizer.ggml.{name}_token_id")
    return int(value) if value is not None else None


def _list(tokens: Sequence[int], vocabulary: Vocabulary) -> str:
    return ", ".join(_shown(token, vocabulary) for token in tokens)


def _shown(token: int, vocabulary: Vocabulary) -> str:
    piece = vocabulary.pieces[token] if 0 <= token < vocabulary.size else "outside the vocabulary"
    return f"{token} {piece}"


def _judge_folder(case: Case, facts: dict[str, Any]) -> list[Finding]:
    """The artifact's tokenizer and its EOS ids (config.json, generation_config.json) are the source's."""
    own = by_artifact(case, hf_tokenizer.render, {"conversations": []})["facts"]
    return [
        *(
            BUILD.equal(metric, own[metric], facts[metric])
            for metric in ("eos", "bos", "pad", "adds_bos", "adds_eos")
        ),
        *(
            BUILD.equal(f"eos of {name}", _eos_of(case.artifact / name), _eos_of(case.source.folder / name))
            for name in ("config.json", "generation_config.json")
        ),
    ]


def _eos_of(path: Path) -> list[int] | None:
    """EOS ids that a configuration names; None when it is not there or names none. SourceError for no JSON."""
    value = read_optional(path).get("eos_token_id")
    return value if isinstance(value, list) or value is None else [value]
