"""Whether text becomes the same token ids, id for id, with the source's tokenizer and with the artifact's.

A GGUF with another pre-tokenizer, vocabulary or BOS setting agrees with every other GGUF made the same way, and its
quantized levels look healthy beside its own base; only the source's tokenizer (transformers) can show it. Two
limits of llama.cpp are reported as skipped, and only where nothing else differs: it lacks normalizers (NFC, BERT's), and it puts the
space of SentencePiece either before the text and after every special token or nowhere.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from quantool.config.schema import Config, Corpus
from quantool.formats.safetensors import some
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding
from quantool.runtime.progress import Progress
from quantool.texts import corpus, inputs
from quantool.texts.readers import BUILT_IN
from quantool.validation._engines import hf_tokenizer
from quantool.validation._engines.probe_texts import PROBES
from quantool.validation._engines.vocabulary import (
    TOKENIZER,
    ProbeText,
    UnloadableError,
    Vocabulary,
    by_artifact,
    by_source,
    explain,
    of_gguf,
)
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._pooled.word_pieces import cleaned

NAME = "tokenizer"
BUILD = FindingBuilder(NAME)
HEAD = 20_000  # characters of each corpus
CHARACTERS = 600_000
"""Characters of all corpora together: 100,000 tokens and more, of tokens six characters long. Python's docstrings fill up."""
NORMALIZERS = ("nfc", "word_pieces")
"""Limits of llama.cpp that go away once a text is changed as the source's tokenizer changes it."""
PLAIN = ProbeText("plain text", "Hello world", add_special=True)
BEGINNINGS = (
    PLAIN,
    ProbeText("nothing", "", add_special=True),
    ProbeText("a line end", "\n", add_special=True),
)
"""Texts to which BOS and EOS are added as the tokenizer's settings say."""

AROUND = (
    ProbeText("text after {}", "{}text"),
    ProbeText("space after {}", "{} text"),
    ProbeText("newline after {}", "{}\n\ntext"),
    ProbeText("{} inside text", "some{} text {}"),
    ProbeText("{} as plain text", "A user wrote {} here", parse_special=False),
)


@dataclass(frozen=True)
class TokenizedText:
    """A text with its ids on both sides.

    ``normal`` are the artifact's ids of the text as ``normalizer`` leaves it, ``respaced`` the source's with spaces put as the
    artifact puts them; either is None where that does not apply.
    """

    text: ProbeText
    expected: list[int]
    found: list[int]
    normal: list[int] | None
    respaced: list[int] | None
    normalizer: str = "nfc"

    def limit(self) -> str:
        """Which of llama.cpp's known limits alone explains the difference, or an empty string."""
        if self.found == self.expected:
            return ""
        if self.normal == self.expected:
            return self.normalizer
        return "space_prefix" if self.found == self.respaced else ""


def _filling(config: Config) -> Iterator[tuple[str, str | None]]:
    """Python's docstrings, which every comparison may need."""
    del config
    yield "docstrings", corpus.identity(Corpus(name=BUILT_IN, dataset=BUILT_IN))


@check(NAME, depends=TOKENIZER | Depends(inputs=(inputs.held_out, _filling), engine=True))
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Token ids of probe texts, of text around special tokens and of each corpus; BOS of the plain path."""
    del progress  # a few seconds
    heads = _heads(case)
    texts = [*BEGINNINGS, *PROBES, *(text for head in heads.values() for text in head)]
    request = {"texts": [vars(text) for text in texts], "around": [vars(text) for text in AROUND]}
    reference = by_source(case, NAME, hf_tokenizer.encode, request)
    try:
        compared, vocabulary = _compare(case, request, reference)
    except UnloadableError as error:
        return [BUILD.fail("loads", str(error))]
    pieces = vocabulary.pieces if vocabulary is not None else ()
    known = len(BEGINNINGS) + len(PROBES)
    probes, rest = compared[:known], compared[known:]
    findings = [
        _judge_bos(
            probes[: len(BEGINNINGS)], reference["facts"]["bos"] if vocabulary is None else vocabulary.bos
        ),
        _judge("probe_ids", probes, pieces),
    ]
    for name, head in heads.items():
        findings.append(_judge("corpus_ids", rest[: len(head)], pieces, name))
        rest = rest[len(head) :]
    findings.append(_judge("special_ids", rest, pieces, cause=_cause(vocabulary, reference["facts"])))
    return [*findings, *_limits(compared)]


def _heads(case: Case) -> dict[str, list[ProbeText]]:
    """The beginnings of the corpora by name; Python's docstrings fill up what they lack of ``CHARACTERS``."""
    entries = corpus.corpora(case.config)
    share = max(HEAD, CHARACTERS // len(entries))
    heads = {entry.name: _head(entry, case, share) for entry in entries}
    lacking = CHARACTERS - sum(len(text.text) for head in heads.values() for text in head)
    if lacking > 0 and BUILT_IN not in heads:
        heads[BUILT_IN] = list(_docstrings(lacking))
    return heads


@lru_cache(maxsize=1)
def _docstrings(characters: int) -> tuple[ProbeText, ...]:
    documents = corpus.read(Corpus(name=BUILT_IN, dataset=BUILT_IN), characters=characters)
    return tuple(ProbeText(f"docstring {number + 1}", found.text) for number, found in enumerate(documents))


def _head(entry: Corpus, case: Case, characters: int) -> list[ProbeText]:
    """The beginning of a corpus: texts, of conversations what was said in them."""
    texts: list[ProbeText] = []
    left = characters
    for document in corpus.read(entry, characters=characters, cache_dir=case.config.dataset_cache_dir):
        contents = [message.get("content") for message in document.messages]
        text = document.text or "\n".join(content for content in contents if isinstance(content, str))
        texts.append(ProbeText(f"document {len(texts) + 1}", text[:left]))
        left -= len(text)
        if left <= 0:
            break
    return texts


def _compare(
    case: Case, request: dict[str, Any], reference: dict[str, Any]
) -> tuple[list[TokenizedText], Vocabulary | None]:
    """The ids of both sides; texts that the source's tokenizer cannot do are left out."""
    texts = [ProbeText(**text) for text in reference["texts"]]
    if case.engine != "llama.cpp":
        answered = by_artifact(case, hf_tokenizer.encode, request)
        if answered["texts"] != reference["texts"]:  # other special tokens, so other texts
            answered = by_artifact(case, hf_tokenizer.encode, {"texts": reference["texts"], "around": []})
        rows = zip(texts, reference["ids"], answered["ids"], strict=True)
        return [
            TokenizedText(text, expected, found, None, None)
            for text, expected, found in rows
            if expected is not None
        ], None
    normalized = {
        place: replace(text, text=normal)
        for place, text in enumerate(texts)
        if (normal := _normal(text.text, reference["facts"])) != text.text
    }
    vocabulary, ids = of_gguf(case, [*texts, *normalized.values()])
    normal_ids: list[list[int] | None] = [None] * len(texts)
    for place, found in zip(normalized, ids[len(texts) :], strict=True):
        normal_ids[place] = found
    normalizer = "word_pieces" if reference["facts"]["word_pieces"] else "nfc"
    respaced = _respaced(case, reference, vocabulary) or [None] * len(texts)
    columns = zip(texts, reference["ids"], ids[: len(texts)], normal_ids, respaced, strict=True)
    return [TokenizedText(*row, normalizer) for row in columns if row[1] is not None], vocabulary


def _normal(text: str, facts: dict[str, Any]) -> str:
    """What the source's tokenizer makes of a text before it cuts it, as far as llama.cpp does not."""
    if facts["word_pieces"]:
        return cleaned(text)
    return unicodedata.normalize("NFC", text) if facts["nfc"] else text


def _respaced(case: Case, reference: dict[str, Any], vocabulary: Vocabulary) -> list[Any] | None:
    """The source's ids with spaces put as this file puts them, if that cannot be mended.

    llama.cpp cannot put a space before the first word only. In a chat every word follows a special token, so a file
    with a chat template has to put none; without a template either way is as good.
    """
    if not vocabulary.space_prefix:
        return list(reference["bare"] or []) or None
    return list(reference["spaced"] or []) or None if case.source.facts.chat_template is None else None


def _cause(vocabulary: Vocabulary | None, facts: dict[str, Any]) -> str:
    if vocabulary is None or not vocabulary.space_prefix or facts["prepend_scheme"] != "first":
        return ""
    return (
        "; llama.cpp puts a space before the text after every special token, the source's tokenizer (legacy: false) "
        "only before the whole text: make the file with quantization_config.add_space_prefix: false"
    )


def _judge(
    metric: str,
    texts: Sequence[TokenizedText],
    pieces: Sequence[str],
    corpus: str | None = None,
    cause: str = "",
) -> Finding:
    """Ids of ``texts`` are equal, but for those that a known limit explains."""
    counted = [text for text in texts if text.limit() not in NORMALIZERS]
    wrong = [text for text in counted if text.found != text.expected and not text.limit()]
    notes = []
    if len(counted) < len(texts):
        notes.append(f"{len(texts) - len(counted)} more skipped ({texts[0].normalizer})")
    if spaced := sum(text.limit() == "space_prefix" for text in counted):
        notes.append(f"{spaced} of them equal but for spaces put by llama.cpp (space_prefix)")
    if not counted:
        return BUILD.skip(metric, "; ".join(notes) or "no text", corpus=corpus)
    problem = ""
    if wrong:
        first = f"{wrong[0].text.name} {explain(wrong[0].expected, wrong[0].found, pieces)}"
        others = ", ".join(repr(text.text.name) for text in wrong[1:6])
        problem = "; ".join([first + cause, *([f"also {others}"] if others else [])])
    else:
        notes.insert(0, f"{sum(len(text.expected) for text in counted)} tokens")
    total = len(counted)
    measured = f"{total - len(wrong)} of {total}"
    return BUILD.fact(metric, measured, problem, f"{total} of {total}", note="; ".join(notes), corpus=corpus)


def _judge_bos(beginnings: Sequence[TokenizedText], bos: int | None) -> Finding:
    """BOS tokens before a plain text, and before none: as many as the source's tokenizer adds."""
    if bos is None:
        return BUILD.skip("bos_count", "there is no BOS token")
    counts = [(text.found.count(bos), text.expected.count(bos), text.text.name) for text in beginnings]
    measured, reference, name = next((row for row in counts if row[0] != row[1] or row[1] > 1), counts[0])
    counted = f"BOS tokens before {name}"
    if measured == reference <= 1:
        return BUILD.fact("bos_count", measured, "", reference, note=counted)
    return BUILD.fact("bos_count", measured, counted, reference)


def _limits(texts: Sequence[TokenizedText]) -> list[Finding]:
    """One skipped finding for each known limit of llama.cpp that showed."""
    reasons = {
        "word_pieces": "BERT's tokenizer leaves control characters out and knows no word of more than 100 characters, "
        "llama.cpp does neither; equal without these",
        "nfc": "the source's tokenizer normalizes text to NFC, llama.cpp cannot; equal once the text is normalized",
        "space_prefix": "the source's tokenizer puts a space before the first word of a text only; llama.cpp puts one "
        "there and after every special token, or nowhere (tokenizer.ggml.add_space_prefix); equal but for that space",
    }
    return [
        BUILD.skip(limit, f"{reason}: {some([repr(name) for name in names], 8)}", measured=len(names))
        for limit, reason in reasons.items()
        if (names := [text.text.name for text in texts if text.limit() == limit])
    ]
