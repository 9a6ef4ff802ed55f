"""Calibration text that occurs in the evaluation text: then the figures of that text are no held-out figures.

As Brown et al. looked for their benchmarks in the training data (Language Models are Few-Shot Learners, arXiv 2005.14165,
appendix C): sequences of 13 words, lower case, without punctuation. The share is that of the evaluation text's sequences
which also stand in the calibration text. The evaluation text is taken as far as it is read for its windows, of the
calibration text the documents that the configuration chooses, up to ``CHARACTERS``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.config.schema import Config, Corpus
from quantool.errors import SourceError
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends, key_of
from quantool.records import Finding, Verdict
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Stage
from quantool.texts import corpus as texts
from quantool.texts import inputs
from quantool.texts.readers import BUILT_IN
from quantool.validation._findings.builder import FindingBuilder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "overlap"
BUILD = FindingBuilder(NAME)
WORDS = 13
MAJORITY = 0.5
"""Above this share most of the text was calibrated on, and its figures say nothing about other text."""
CHARACTERS = 1 << 24
COMPARED = Depends(
    fields=(
        "sample_size", "shuffle", "dataset_seed", "dataset_config", "split", "calibration_config",
        "validation.max_tokens",
    ),
    libraries=("datasets", "numpy"),
)  # fmt: skip
"""Two texts compared: which calibration documents are chosen, and how far the evaluation text is read."""

# A letter of a script that does not separate words counts as one: kana, Han, Thai, Lao, Khmer, Myanmar.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
    r"|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)


@dataclass(frozen=True)
class Overlap:
    """What an evaluation text has in common with the calibration text."""

    share: float
    """Of its sequences of ``WORDS`` words; 0 when it has none."""
    sequences: int
    example: str
    """The first common sequence; empty when there is none."""


@check(NAME, depends=COMPARED | Depends(inputs=(inputs.held_out, inputs.calibration)))
def judge(case: Case, progress: Progress) -> Sequence[Finding]:
    """Calibration text that occurs in the evaluation text."""
    config = case.config
    origin = texts.calibration_corpus(config)
    if origin is None:
        reason = "the configuration names no calibration text (dataset_path, dataset_id)"
        return [BUILD.skip("overlap", reason)]
    if case.output is not None and case.engine == "llama.cpp" and "imatrix" not in case.output.needs:
        return [BUILD.skip("overlap", "it was made without calibration text (without an importance matrix)")]
    evaluated = texts.corpora(config)
    overlaps = _overlaps(case, origin, evaluated, progress)
    return [
        _finding(corpus, found, both=origin.dataset == corpus.dataset == BUILT_IN)
        for corpus, found in zip(evaluated, overlaps, strict=True)
    ]


def _overlaps(case: Case, origin: Corpus, evaluated: Sequence[Corpus], progress: Progress) -> list[Overlap]:
    """The overlap of each text, recalled where both texts are those of an earlier run."""
    config = case.config
    calibrated = texts.identity(origin)
    stages = []
    for corpus in evaluated:
        own = texts.identity(corpus)
        known = own and calibrated
        key = known and key_of(COMPARED, case.source, own, calibrated, config=config)
        stages.append(Stage(f"overlap/{corpus.name}", key))

    def produce(missing: list[int]) -> list[dict[str, Any]]:
        request = {
            "config": config.model_dump(mode="json"),
            "corpora": [evaluated[number].model_dump(mode="json") for number in missing],
        }
        log = case.workspace.logs / "overlap.log"
        with progress.bar("calibration text in evaluation text") as bar:
            answer = process.call(find, request, log=log, bar=bar, failure=SourceError)
        made: list[dict[str, Any]] = answer["corpora"]
        return made

    return [Overlap(**found) for found in case.workspace.together(stages, produce)]


def _finding(corpus: Corpus, found: Overlap, *, both: bool) -> Finding:
    detail = (
        f"{100 * found.share:.2f} % of {found.sequences} sequences of {WORDS} words of {corpus.name} are in the calibration"
        " text too"
    )
    if found.example:
        detail += f", the first: {found.example!r}"
    verdict = Verdict.PASS
    if both:
        detail += f"; both are {BUILT_IN}, quantool's own text: the figures are no held-out figures"
    elif found.share > MAJORITY:
        verdict = Verdict.ANOMALOUS
        detail += (
            "; that is most of it, so the figures are no held-out figures: give other text to one of the two"
        )
    elif found.share:
        detail += "; the figures of this text are a little better than on text never seen"
    return Finding(
        check=NAME,
        metric="overlap",
        verdict=verdict,
        corpus=corpus.name,
        measured=found.share,
        threshold=None if both else MAJORITY,
        detail=detail,
    )


def find(request: dict[str, Any], report: Any) -> dict[str, Any]:
    """Worker: compare each of ``corpora`` with the calibration text of ``config``; ``corpora`` of the result in order."""
    config = Config.model_validate(request["config"])
    calibrated = _limited(texts.calibration(config))
    known = sequences(calibrated)[0]
    made = []
    for number, fields in enumerate(request["corpora"], 1):
        corpus = Corpus.model_validate(fields)
        documents = texts.read(
            corpus,
            characters=config.validation.max_tokens * texts.CHARACTERS_PER_TOKEN,
            cache_dir=config.dataset_cache_dir and Path(config.dataset_cache_dir),
        )
        made.append(vars(overlap(documents, known)))
        report(number, len(request["corpora"]))
    return {"corpora": made}


def _limited(documents: Iterable[texts.Document]) -> Iterator[texts.Document]:
    left = CHARACTERS
    for document in documents:
        if left <= 0:
            return
        yield document if document.messages else texts.Document(text=document.text[:left])
        left -= document.size()


def overlap(documents: Iterable[texts.Document], known: NDArray[np.uint64]) -> Overlap:
    """Compare ``documents`` with the sequences ``known`` (as ``sequences`` gives them)."""
    import numpy as np

    hashes, words = sequences(documents)
    if not len(hashes):
        return Overlap(0.0, 0, "")
    common = np.isin(hashes, known)
    first = int(common.argmax())
    example = " ".join(words[first]) if common.any() else ""
    return Overlap(float(common.mean()), len(hashes), example)


class _Sequences(Sequence[Sequence[str]]):
    """The words of each sequence, by its number."""

    def __init__(self, words: Sequence[Sequence[str]]) -> None:
        self._words = words
        self._counts = [max(0, len(document) - WORDS + 1) for document in words]

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, number: Any) -> Any:
        for words, count in zip(self._words, self._counts, strict=True):
            if number < count:
                return words[number : number + WORDS]
            number -= count
        raise IndexError(number)


def sequences(documents: Iterable[texts.Document]) -> tuple[NDArray[np.uint64], _Sequences]:
    """A 64-bit hash of every ``WORDS`` words in a row of each document, and the words of each.

    Two different sequences share a hash once in 2^64 pairs. None reaches over the end of a document.
    """
    import numpy as np

    numbers: dict[str, int] = {}
    words, hashes = [], [np.empty(0, np.uint64)]
    for document in documents:
        own = _WORD.findall(plain(document).lower())
        words.append(own)
        ids = np.fromiter((_hashed(word, numbers) for word in own), np.uint64, len(own))
        if len(ids) < WORDS:
            continue
        rolled = np.zeros(len(ids) - WORDS + 1, np.uint64)
        for offset in range(WORDS):
            rolled *= np.uint64(0x9E3779B97F4A7C15)  # odd, so nothing is lost modulo 2^64
            rolled ^= rolled >> np.uint64(29)
            rolled += ids[offset : offset + len(rolled)]
        hashes.append(rolled)
    return np.concatenate(hashes), _Sequences(words)


def _hashed(word: str, known: dict[str, int]) -> int:
    """64 bits of a word, the same in every process."""
    import hashlib

    if word not in known:
        known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    return known[word]


def plain(document: texts.Document) -> str:
    """The words of a document: its text, or what its messages say, calls of tools included."""
    return document.text or "\n".join(_words(message) for message in document.messages)


def _words(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    calls = message.get("tool_calls")
    return "\n".join([*parts, json.dumps(calls, ensure_ascii=False)] if calls else parts)
