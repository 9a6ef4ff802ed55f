"""Where scores are kept: of an artifact, of its base, of one beside the other; whole, or in parts until all are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends
from quantool.validation._cache.keys import artifact_key, stamp
from quantool.validation._engines.reference import Reference
from quantool.validation._engines.spans import Span, drop_parts
from quantool.validation._findings.statistics import Tokens

SCORES = Depends(fields=("validation.context", "device"), engine=True)
"""The scores of an artifact, or of its base, on the reference's windows; these count by the reference's key."""


@dataclass(frozen=True)
class ScoresFile:
    """Where one set of scores is kept: stage, key, file."""

    stage: str
    key: str
    file: Path

    def record(self, case: Case) -> dict[str, Any] | None:
        """What was recorded with the scores: ``failure``, ``file_type``, ``kernels``, ``execution``."""
        return case.workspace.recall(self.stage, self.key)

    def keep(
        self,
        case: Case,
        failure: str | None,
        file_type: int | None,
        kernels: Sequence[str] = (),
        execution: str | None = None,
    ) -> None:
        """Record scores that are in the file, or the ``failure`` that they are not."""
        drop_parts([self.file])
        files = [] if failure or not self.file.is_file() else [self.file]
        record = {
            "failure": failure,
            "file_type": file_type,
            "kernels": list(kernels),
            "execution": execution,
        }
        case.workspace.keep(self.stage, self.key, files, record)

    def part(self, span: Span) -> Path:
        """Where the scores of some of the windows lie until all are there."""
        return span.part(self.file, self.key)

    def join(self, spans: Sequence[Span]) -> None:
        """Make the file of its parts; one that is left out leaves none, not an older one either."""
        parts = [self.part(span) for span in spans]
        if parts and all(part.is_file() for part in parts):
            tokens = [Tokens.load(part) for part in parts]
            columns = (
                np.concatenate([getattr(part, each.name) for part in tokens]) for each in fields(Tokens)
            )
            Tokens(*columns).save(self.file)
        else:
            self.file.unlink(missing_ok=True)


def base_of(case: Case) -> Path | None:
    """The base to compare with; None for other engines and where the artifact is the base."""
    if case.engine != "llama.cpp" or case.base is None or case.base.resolve() == case.artifact.resolve():
        return None
    return case.base


def own_file(case: Case, reference: Reference) -> ScoresFile:
    """The scores of an artifact."""
    corpus, cache = reference.windows.corpus.name, []
    if case.cache is not None:
        corpus, cache = f"{corpus}.{case.cache}", [case.cache]
    return ScoresFile(
        f"scores/{case.name}/{corpus}",
        artifact_key(case, SCORES, reference.key, *cache),
        case.workspace.work / "scores" / case.name / f"{corpus}.npz",
    )


def base_file(case: Case, base: Path, reference: Reference) -> ScoresFile:
    """The scores of its base."""
    corpus = reference.windows.corpus.name
    return ScoresFile(
        f"base-scores/{base.stem}/{corpus}",
        case.key(SCORES, reference.key, stamp(base)),
        case.workspace.work / "base-scores" / base.stem / f"{corpus}.npz",
    )


def divided_file(case: Case, base: Path, reference: Reference) -> ScoresFile:
    """The scores of an artifact beside its base."""
    corpus, own = reference.windows.corpus.name, own_file(case, reference)
    return ScoresFile(
        f"divided-scores/{case.name}/{corpus}",
        case.key(SCORES, own.key, base_file(case, base, reference).key),
        case.workspace.work / "divided-scores" / case.name / f"{corpus}.npz",
    )
