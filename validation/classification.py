"""Logits of a classifier or reranker beside those of the reference, on passages of every held-out text.

A reranker is given queries, each with several passages, and has to put those in the reference's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from quantool.errors import SourceError
from quantool.formats.gguf_header import read_shards
from quantool.formats.json_file import read_json
from quantool.plugins.contract import Case, check
from quantool.records import Finding, Gates
from quantool.runtime.progress import Progress
from quantool.source.task import labels_of
from quantool.tasks import TaskKind
from quantool.validation._findings.builder import FindingBuilder, without_folders
from quantool.validation._findings.limits import Gate, gated
from quantool.validation._pooled.by_corpus import VectorCheck
from quantool.validation._pooled.comparison import kendall, logit_error, mean, permutation, same_label
from quantool.validation._pooled.probe import DOCUMENTS
from quantool.validation._pooled.vectors import (
    VECTORS,
    ArtifactVectors,
    compare_vectors,
    prepare_reference,
    require_task,
)

if TYPE_CHECKING:
    from quantool.validation._pooled.comparison import Vectors

NAME = "classification"
BUILD = FindingBuilder(NAME)
HEAD = "cls."
"""Tensors of a classifier in a GGUF."""


@check(
    NAME,
    prepare=prepare_reference,
    compare=compare_vectors,
    require=require_task,
    depends=VECTORS,
    loads_reference=True,
    tasks=(TaskKind.RERANKING, TaskKind.CLASSIFICATION),
)
def judge(case: Case, progress: Progress) -> Sequence[Finding]:
    """Labels and head as the source has them; logits, and labels or order beside the reference's."""
    return CHECK.judge(case, progress)


def _judge_head(case: Case, made: ArtifactVectors) -> Iterator[Finding]:
    """The classifier's tensors are there, and its labels have the source's names in the source's order."""
    wanted = case.source.facts.task.labels
    if case.engine == "llama.cpp":
        if made.pooling:
            problem = (
                ""
                if made.pooling == "rank"
                else "the key pooling_type is not rank: the classifier is not computed"
            )
            yield BUILD.fact("pooling", made.pooling, problem, "rank")
        try:
            tensors = [tensor.name for header in read_shards(case.artifact) for tensor in header.tensors]
        except SourceError as error:
            yield BUILD.fail("head", without_folders(error.message, case.artifact.parent))
            return
        heads = [name for name in tensors if name.startswith(HEAD)]
        yield BUILD.fact(
            "head", " ".join(heads) or "none", "" if heads else "the file has no tensors of a classifier"
        )
        if made.pooling != "rank":
            return
        named = made.labels if any(made.labels) or len(wanted) > 1 else wanted  # one label needs no name
    else:
        try:
            named = labels_of(read_json(case.artifact / "config.json"), case.artifact / "config.json")
        except SourceError as error:
            yield BUILD.fail("labels", without_folders(error.message, case.artifact))
            return
    problem = "" if named == wanted else "they are not the source's: answers would have other names"
    yield BUILD.fact("labels", _listed(named), problem, _listed(wanted))


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:8])
    return f"{shown}, … ({len(labels)})" if len(labels) > 8 else shown or "none"


def _compare(case: Case, corpus: str, gates: Gates, theirs: Vectors, ours: Vectors) -> Iterator[Finding]:
    task = case.source.facts.task
    cause = _cause(theirs, ours, task.labels)
    for gate in _limited(theirs, ours, gates, ranks=task.kind is TaskKind.RERANKING):
        yield _because(gated(gate, corpus, NAME), cause)


def _limited(theirs: Vectors, ours: Vectors, gates: Gates, *, ranks: bool) -> Iterator[Gate]:
    text = "mean squared difference of the logits over their variance"
    yield Gate("logit_error", logit_error(theirs, ours), gates.max_logit_error, 1, text)
    if ranks:
        order = mean(kendall(theirs, ours, DOCUMENTS))
        text = f"Kendall's tau of the order of {DOCUMENTS} passages a query"
        yield Gate("rank_correlation", order, gates.min_rank_correlation, -1, text)
    else:
        text = "share of texts with the reference's label"
        yield Gate("same_label", mean(same_label(theirs, ours)), gates.min_same_label, -1, text)


def _cause(theirs: Vectors, ours: Vectors, labels: Sequence[str]) -> str:
    """What happened to a head whose logits are wrong."""
    if not (ours.max(0) - ours.min(0)).any():
        return "every text gets the same logits: the classifier is lost or zero"
    order = permutation(theirs, ours)
    if order is not None:
        return f"its labels stand in another order: {_listed([labels[number] for number in order])}"
    return ""


def _because(finding: Finding, cause: str) -> Finding:
    if not (cause and finding.verdict.fails):
        return finding
    return finding.model_copy(update={"detail": f"{finding.detail}; {cause}"})


CHECK = VectorCheck(
    BUILD, "logit_error", "scores", "{ours} logits, the reference has {theirs}", _judge_head, _compare
)
