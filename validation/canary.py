"""What an artifact computes on a few hundred tokens, kept at its release so that a download can be compared with it.

Kept are its own log-probabilities, the ids and rendered conversations of its own tokenizer and template, and its metadata.
Whoever has the file replays them with an engine on a machine of their own, without the checkpoint (``quantool verify``).
The limit of the replay follows from the noise measured of this very artifact at its release: the same tokens computed in
other batches differ more than between processors (tests/validation/test_canary.py has the figures).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field, JsonValue, model_validator

from quantool.config.schema import Config
from quantool.errors import QuantizationError, SourceError
from quantool.plugins.contract import Case, Download, check, left_file
from quantool.plugins.keys import ENGINES, Depends, own_files
from quantool.record import Record
from quantool.records import Finding, Source
from quantool.runtime.gpus import devices
from quantool.runtime.process import call
from quantool.runtime.progress import Progress
from quantool.runtime.versions import version_of
from quantool.runtime.worker import Report, preloaded
from quantool.runtime.workspace import write_text
from quantool.tasks import TaskKind
from quantool.validation._chat import llama_cpp_python
from quantool.validation._chat.conversations import suite
from quantool.validation._engines import hf_tokenizer, vocabulary
from quantool.validation._engines.crash import WorkerError, crash
from quantool.validation._engines.probe_texts import OWN
from quantool.validation._findings.builder import SHOWN, FindingBuilder, without_folders
from quantool.validation._score import canary_replay
from quantool.validation._score.canary_keys import (
    SPECIALS,
    TEXT,
    TOKENS,
    changed_keys,
    keys_of,
    media_tokens,
    special_tokens,
    window,
)

NAME = "canary"
BUILD = FindingBuilder(NAME)
CONVERSATIONS = 12
"""Of the suite of conversations, at equal distances."""
FACTOR, FLOOR = 4.0, 1e-4
"""A replay may be that many times the noise of the release away, in nats; less than the floor is never asked."""
LOUDEST = 0.05
"""Noise, in nats, with which an artifact is no longer the same thing in every batch."""
FLOAT32 = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
"""Folders are replayed in float32, whatever the processor multiplies by itself (``runtime.arithmetic``): bfloat16 is
0.002 nats away from it, float32 on another processor 1e-8."""

LogProbability = Annotated[float, Field(le=0, allow_inf_nan=False)]


class CanaryRecord(Record):
    """What is kept of an artifact; a release may have been changed, so all of it is looked at before it is used."""

    engine: str
    versions: dict[str, str]
    files: dict[str, str]
    """SHA-256 by name."""
    keys: dict[str, JsonValue]
    """As ``canary_keys.keys_of`` gives them."""
    texts: tuple[tuple[str, bool, tuple[int, ...]], ...]
    """Text, whether BOS is added, ids."""
    chats: tuple[tuple[dict[str, JsonValue], str | None, tuple[int, ...] | str | None], ...]
    """Conversation, rendered text, ids; or null and why there is none."""
    ids: tuple[int, ...] = Field(min_length=1)
    top: tuple[Annotated[tuple[tuple[int, LogProbability], ...], Field(min_length=1)], ...]
    """By position, the most likely tokens with their log-probabilities."""
    noise: float = Field(ge=0, le=LOUDEST, allow_inf_nan=False)
    """Mean divergence between batches, in nats."""

    @model_validator(mode="after")
    def _whole(self) -> CanaryRecord:
        if len({len(row) for row in self.top}) != 1 or len(self.top) != len(self.ids):
            raise ValueError("as many positions as tokens, all with as many entries")
        return self


def computes(config: Config, source: Source, /) -> tuple[int, int]:
    """Its window, twice."""
    del config, source
    return 2 * TOKENS, 0


def replay(download: Download, progress: Progress, /) -> Sequence[Finding]:
    """Whether a download has the metadata, tokens and template of its release, and computes what it computed."""
    del progress  # its user sees one line of it
    left = CanaryRecord.model_validate(download.left)
    names = [file.name for file in own_files(download.files)]
    try:
        found = list(changed_keys(left.keys, keys_of(download.artifact, download.engine, names)))
    except (SourceError, OSError) as error:
        return [BUILD.fail("metadata", without_folders(str(error), download.artifact.parent))]
    keys = BUILD.fact("metadata", f"{len(left.keys)} keys", _some(found))
    device = download.device if download.engine == "llama.cpp" else "cpu"
    request = _request(
        download.artifact, download.engine, device, download.scratch, download.trust_remote_code
    )
    request["left"] = left.model_dump(mode="json", include={"texts", "chats", "ids", "top"})
    result = _examined(request, download.scratch / "canary.log", download.engine)
    if isinstance(result, str):
        return [keys, BUILD.fail("divergence", without_folders(result, download.artifact.parent))]
    texts = [
        f"{text[:30]!r} gives {after}, was {[*before]}"
        for (text, _, before), after in zip(left.texts, result["texts"], strict=True)
        if [*before] != after
    ]
    chats = [
        f"{chat['name']} differs"
        for (chat, text, ids), after in zip(left.chats, result["chats"], strict=True)
        if [text, [*ids] if isinstance(ids, tuple) else ids] != after
    ]
    return [
        keys,
        BUILD.fact("tokens", f"{len(left.texts)} texts", _some(texts)),
        BUILD.fact("template", f"{len(left.chats)} conversations", _some(chats)),
        _divergence(result["divergences"], left.noise),
    ]


@check(
    NAME,
    depends=Depends(fields=("device", "trust_remote_code"), libraries=("jinja2",), engine=True),
    computes=computes,
    tasks=(TaskKind.GENERATION,),
    replay=replay,
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """What the artifact computes on 256 tokens, kept for those who download it, and its noise between batches."""
    del progress  # seconds
    if case.output is None:
        return [BUILD.skip("noise", "kept of what a run makes; this artifact was given")]
    gguf = case.engine == "llama.cpp"
    device = devices(case.config.device).kind if gguf and case.config.device else "cpu"
    scratch = case.workspace.work / NAME
    request = _request(case.artifact, case.engine, device, scratch, case.source.trust_remote_code)
    template = case.source.facts.chat_template or ""
    chats = suite(template) if _is_timeless(template) else ()
    chats = chats[:: max(1, len(chats) // CONVERSATIONS)]
    request["context"] = min(TOKENS, case.source.facts.context)
    request["conversations"] = [conversation.request() for conversation in chats]
    result = _examined(
        request, case.workspace.logs / f"canary-{case.name.replace('/', '-')}.log", case.engine
    )
    if isinstance(result, str):
        return [BUILD.fail("noise", without_folders(result, case.artifact, case.artifact.parent))]
    names = [file.name for file in own_files(case.files)]
    noise = fmean(result["divergences"])
    largest = max(result["divergences"])
    note = f"{len(result['ids'])} tokens in other batches: largest divergence {largest:.2g} nats"
    if noise > LOUDEST:
        problem = f"its predictions depend on the batch: mean divergence {noise:.2g} nats"
        return [BUILD.fact("noise", noise, problem, note=note)]
    left = CanaryRecord(
        engine=case.engine,
        versions={name: version_of(name) for name in ENGINES[case.engine]},
        files={file.name: file.sha256 for file in own_files(case.files)},
        keys=keys_of(case.artifact, case.engine, names),
        texts=result["texts"],
        chats=[
            [chat, *answer] for chat, answer in zip(request["conversations"], result["chats"], strict=True)
        ],
        ids=result["ids"],
        top=result["top"],
        noise=noise,
    )
    write_text(left_file(case.workspace, case.name, NAME), left.model_dump_json())
    return [BUILD.fact("noise", noise, note=note)]


def _divergence(divergences: Sequence[float], noise: float) -> Finding:
    limit = max(FLOOR, FACTOR * noise)
    mean = fmean(divergences)
    problem = (
        f"it computes something else than was judged: mean divergence {mean:.2g} nats, limit {limit:.2g}"
    )
    note = f"largest {max(divergences):.2g}; noise at the release {noise:.2g}"
    return BUILD.fact("divergence", mean, problem if not mean <= limit else "", note=note).model_copy(
        update={"threshold": limit}
    )


def _is_timeless(template: str) -> bool:
    """Whether a template renders the same tomorrow: it does not ask for the date, or takes one that is given."""
    return bool(template) and ("strftime_now" not in template or "date_string" in template)


def _request(artifact: Path, engine: str, device: str, scratch: Path, trusted: bool) -> dict[str, Any]:
    return {
        "model": str(artifact.absolute()),
        "folder": str(artifact.absolute()),
        "engine": engine,
        "device": device,
        "trust_remote_code": trusted,
        "scratch": str(scratch.absolute()),
        "left": None,
    }


def _examined(request: dict[str, Any], log: Path, engine: str) -> dict[str, Any] | str:
    """The answer of ``examine``, or why the artifact cannot be run."""
    Path(request["scratch"]).mkdir(parents=True, exist_ok=True)
    try:
        result = call(examine, request, log=log, failure=WorkerError)
    except WorkerError as error:
        return crash(error, engine)
    except QuantizationError as error:
        return error.message
    return str(result["failure"]) if result["failure"] else result


@preloaded("transformers")
def examine(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: tokens, conversations and log-probabilities of an artifact, anew or of what was ``left``.

    Request: that of ``canary_replay.measure`` without ``ids`` and ``top``, and ``folder`` (the same as ``model``), ``left``,
    or where it is null ``context`` and ``conversations``. Result: that of ``measure``, ``ids``, ``texts`` and ``chats``: of
    each conversation [text, ids] or [null, error]. ``texts`` are [text, whether BOS is added, ids] anew, ids otherwise.
    """
    os.environ.update(FLOAT32)  # of this process, in which nothing has computed yet
    left = request["left"]
    look = _gguf if request["engine"] == "llama.cpp" else _folder
    if left is None:
        tokens, specials, size = look(request, _probes(request))
        ids = window(tokens[0][2], specials, size, request["context"])
        chats = request["conversations"]
    else:
        known = [[text, add, None] for text, add, _ in left["texts"]]
        tokens, _, _ = look(request, known)
        tokens, ids, chats = [found[2] for found in tokens], left["ids"], [row[0] for row in left["chats"]]
    result = canary_replay.measure(
        request | {"ids": ids, "top": left and left["top"]},
        report,
    )
    return result | {"ids": ids, "texts": tokens, "chats": _chats(request, chats)}


def _probes(request: dict[str, Any]) -> list[list[Any]]:
    """Texts to tokenize: that of the window first, then probes, then special tokens with text around them."""
    probes = [[TEXT, True, None], *([probe.text, probe.add_special, None] for probe in OWN)]
    if request["engine"] != "llama.cpp":
        tokenizer = hf_tokenizer.load_tokenizer(
            request["folder"], trust_remote_code=request["trust_remote_code"]
        )
        return [
            *probes,
            *([f"a{text}b", False, None] for text in sorted(tokenizer.get_added_vocab())[:SPECIALS]),
        ]
    special = special_tokens(Path(request["model"]))[:SPECIALS]
    answer = vocabulary.tokenize({"model": request["model"], "texts": []}, _nobody)
    return [*probes, *([f"a{answer['vocabulary']['pieces'][token]}b", False, None] for token in special)]


def _gguf(request: dict[str, Any], texts: list[list[Any]]) -> tuple[list[list[Any]], list[int], int]:
    """The texts with their ids, the special tokens, and the entries of the vocabulary."""
    model = request["model"]
    wanted = [{"text": text, "add_special": add, "parse_special": True} for text, add, _ in texts]
    answer = vocabulary.tokenize({"model": model, "texts": wanted}, _nobody)
    found = [[text, add, ids] for (text, add, _), ids in zip(texts, answer["ids"], strict=True)]
    return found, special_tokens(Path(model)), answer["vocabulary"]["size"]


def _folder(request: dict[str, Any], texts: list[list[Any]]) -> tuple[list[list[Any]], list[int], int]:
    tokenizer = hf_tokenizer.load_tokenizer(request["folder"], trust_remote_code=request["trust_remote_code"])
    found = [
        [text, add, list(tokenizer(text, add_special_tokens=add, verbose=False)["input_ids"])]
        for text, add, _ in texts
    ]
    media = media_tokens(Path(request["folder"]))
    special = [token for token in sorted(tokenizer.get_added_vocab().values()) if token not in media]
    return found, special, min(media, default=len(tokenizer))


def _chats(request: dict[str, Any], conversations: list[dict[str, Any]]) -> list[list[Any]]:
    """What the artifact's template makes of the conversations: [text, ids], or [null, why not]."""
    if not conversations:
        return []
    if request["engine"] == "llama.cpp":
        answered = llama_cpp_python.answer(request | {"conversations": conversations}, _nobody)
        return [[found.get("text"), found.get("ids", found.get("error"))] for found in answered["answers"]]
    rendered = hf_tokenizer.render(request | {"conversations": conversations}, _nobody)["answers"]
    return [
        [answer["accepted"][0]["text"], answer["accepted"][0]["ids"]]
        if answer["accepted"]
        else [None, answer["error"]]
        for answer in rendered
    ]


def _nobody(_done: float, _total: float) -> None:
    """What parts of a worker report is not the whole's progress."""


def _some(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more
