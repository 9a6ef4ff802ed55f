"""An artifact's vectors beside the reference's, one held-out text after the other: what every check of vectors does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantool.gates import over
from quantool.plugins.contract import Case
from quantool.records import Finding, Gates
from quantool.runtime.progress import Progress
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._pooled.tokens import judge_ids
from quantool.validation._pooled.vectors import (
    ArtifactVectors,
    ReferenceVectors,
    artifact_vectors,
    reference_vectors,
)

if TYPE_CHECKING:
    from quantool.validation._pooled.comparison import Vectors


@dataclass(frozen=True)
class VectorCheck:
    """A check of vectors: its main ``metric``, what its numbers are called, and what it does with them."""

    build: FindingBuilder
    metric: str
    noun: str
    """Of the vectors, for people: embeddings, scores."""
    widths: str
    """For people, with ``ours`` and ``theirs``: vectors of another width than the reference's."""
    settings: Callable[[Case, ArtifactVectors], Iterable[Finding]]
    """What the artifact's own files say."""
    compare: Callable[[Case, str, Gates, Vectors, Vectors], Iterable[Finding]]
    """The findings on one text (by name, with its gates): the reference's vectors, then the artifact's."""

    def judge(self, case: Case, progress: Progress) -> list[Finding]:
        """Settings first, then every text."""
        known = reference_vectors(case, progress)
        made = artifact_vectors(case, known, progress)
        findings = [*self.settings(case, made[0])]
        for reference, vectors in zip(known, made, strict=True):
            findings += self._judge_text(case, reference, vectors)
        return findings

    def _judge_text(
        self, case: Case, reference: ReferenceVectors, made: ArtifactVectors
    ) -> Sequence[Finding]:
        corpus = reference.corpus
        loaded = made.load()
        if loaded is None:
            reason = (
                made.failure
                or f"llama.cpp gives no {self.noun} of this file, whose pooling is {made.pooling}"
            )
            return [self.build.fail(self.metric, reason, corpus=corpus.name)]
        (texts, theirs), (own, ours) = reference.load(), loaded
        tokens = judge_ids(self.build, texts, own, corpus.name)
        if theirs.shape != ours.shape:
            widths = self.widths.format(ours=ours.shape[1], theirs=theirs.shape[1])
            return [tokens, self.build.fail(self.metric, widths, corpus=corpus.name)]
        gates = case.gates if corpus.gates is None else over(case.gates, corpus.gates)
        return [tokens, *self.compare(case, corpus.name, gates, theirs, ours)]
