"""Embeddings of an artifact beside those of the reference, on passages of every held-out text.

Tokenized, pooled and compared as somebody who loads the artifact would have it: llama.cpp by the file's own keys,
transformers by the folder's own ``modules.json``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from quantool.errors import SourceError
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import some
from quantool.plugins.contract import Case, check
from quantool.records import Finding, Gates
from quantool.runtime.progress import Progress
from quantool.source.task import MODULES, SENTENCE_FILES, read_modules, sentence_task
from quantool.tasks import Task, TaskKind
from quantool.validation._findings.builder import FindingBuilder, without_folders
from quantool.validation._findings.limits import Gate, gated
from quantool.validation._findings.statistics import Estimate
from quantool.validation._pooled.by_corpus import VectorCheck
from quantool.validation._pooled.comparison import NEIGHBOURS, cosines, mean, recall
from quantool.validation._pooled.vectors import (
    VECTORS,
    ArtifactVectors,
    compare_vectors,
    prepare_reference,
    require_task,
)

if TYPE_CHECKING:
    from quantool.validation._pooled.comparison import Vectors

NAME = "embedding"
BUILD = FindingBuilder(NAME)
LOWEST = 0.01
"""The share of texts whose cosine is no larger than the one that is noted."""


@check(
    NAME,
    prepare=prepare_reference,
    compare=compare_vectors,
    require=require_task,
    depends=VECTORS,
    loads_reference=True,
    tasks=(TaskKind.EMBEDDING,),
)
def judge(case: Case, progress: Progress) -> Sequence[Finding]:
    """Pooling and normalization as the source has them; cosine and nearest neighbours beside the reference's."""
    return CHECK.judge(case, progress)


def _compare(case: Case, corpus: str, gates: Gates, theirs: Vectors, ours: Vectors) -> Iterator[Finding]:
    del case
    every = cosines(theirs, ours)
    for gate in _limited(mean(every), mean(recall(theirs, ours)), gates):
        yield gated(gate, corpus, NAME)
    lowest = float(sorted(every)[int(LOWEST * len(every))])
    text = "1st percentile of the cosine"
    yield gated(Gate("cosine_1", Estimate(lowest, 0.0), None, -1, text), corpus, NAME)


def _limited(cosine: Estimate, kept: Estimate, gates: Gates) -> Iterator[Gate]:
    yield Gate("cosine", cosine, gates.min_cosine, -1, "mean cosine with the reference's embeddings")
    text = f"share of the reference's {NEIGHBOURS} nearest passages that are the artifact's"
    yield Gate("recall_at_10", kept, gates.min_recall_at_10, -1, text)


def _judge_settings(case: Case, made: ArtifactVectors) -> Iterator[Finding]:
    """How states are pooled and whether vectors are normalized, by the artifact's own files."""
    task = case.source.facts.task
    if case.engine == "llama.cpp":
        if made.pooling:
            same = made.pooling == task.pooling
            problem = "" if same else "the key pooling_type of the file is not the source's pooling"
            yield BUILD.fact("pooling", made.pooling, problem, task.pooling)
        yield BUILD.fact(
            "normalization",
            "by the server",
            note="llama-server gives vectors of length 1; a GGUF has no key for it",
        )
        return
    try:
        own = sentence_task(case.artifact) if (case.artifact / MODULES).is_file() else None
    except SourceError as error:
        yield BUILD.fail("modules", without_folders(error.message, case.artifact))
        return
    yield from _judge_modules(case, own, task)


def _judge_modules(case: Case, own: Task | None, task: Task) -> Iterator[Finding]:
    problem = (
        "" if own or not task.files else f"{MODULES} is missing: it would be pooled by the mean of all tokens"
    )
    yield BUILD.fact("modules", _modules(case) if own else "none", problem, " ".join(task.files) or "none")
    if own is None:
        return
    same = own.pooling == task.pooling
    yield BUILD.fact(
        "pooling", own.pooling or "none", "" if same else "it is not the source's pooling", task.pooling
    )
    length = {True: "length 1", False: "any length"}
    same = own.normalized == task.normalized
    problem = "" if same else "vectors are not given the length that the source's have: dot products change"
    yield BUILD.fact("normalization", length[own.normalized], problem, length[task.normalized])
    lost = [
        name
        for name in SENTENCE_FILES[1:]
        if (case.source.folder / name).is_file()
        and not ((case.artifact / name).is_file() and _same(case, name))
    ]
    yield BUILD.fact(
        "prompts",
        "as the source's" if not lost else some(lost),
        f"{some(lost)} is missing or not the source's: prompts and the longest text are lost" if lost else "",
    )


def _same(case: Case, name: str) -> bool:
    try:
        return read_json(case.artifact / name) == read_json(case.source.folder / name)
    except SourceError:
        return False


def _modules(case: Case) -> str:
    return " ".join(module["type"] for module in read_modules(case.artifact))


CHECK = VectorCheck(
    BUILD,
    "cosine",
    "embeddings",
    "vectors of {ours} numbers, the reference's have {theirs}",
    _judge_settings,
    _compare,
)
