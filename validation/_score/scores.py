"""Scores of artifacts beside the reference: computed for several at once, kept in the workspace under what they depend on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError
from quantool.plugins.contract import Case
from quantool.runtime.progress import Progress
from quantool.validation._engines import vllm
from quantool.validation._engines.reference import WHOLE, Reference
from quantool.validation._findings.builder import without_folders
from quantool.validation._findings.statistics import Tokens
from quantool.validation._score.conversion_loss import UNQUANTIZED, BaseScores
from quantool.validation._score.score_files import base_file, base_of, divided_file, own_file
from quantool.validation._score.score_workers import ENGINES, answer, score_base


@dataclass(frozen=True)
class ArtifactScores:
    """The scores of one artifact."""

    tokens: tuple[Tokens, ...]
    """By corpus; empty when it cannot be scored (``failure``)."""
    bases: tuple[BaseScores, ...]
    """By corpus; empty without a base, or when the artifact is not quantized itself."""
    failure: str
    file_type: int | None
    """``general.file_type`` of a GGUF; None when it does not load."""
    kernels: tuple[str, ...] = ()
    """Matrix kernels that the engine said it chose."""
    execution: str = WHOLE
    """How transformers ran it, see ``reference.RunningModel``."""


def require(case: Case) -> None:
    """Raise ConfigError when there is nothing to score or no such engine, DependencyError when vLLM is not there."""
    if case.engine not in ENGINES:
        raise ConfigError(
            f"{case.name}: no engine {case.engine!r} to score with; known: {', '.join(ENGINES)}"
        )
    if not case.artifact.exists():
        raise ConfigError(f"artifact not found: {case.artifact}")
    if case.engine == "vllm":
        vllm.require()


def compute(cases: Sequence[Case], known: Sequence[Reference], progress: Progress) -> None:
    """Score all of ``cases`` whose scores on the corpora of ``known`` are not kept yet, together where that is possible.

    Raises ConfigError when a base is quantized, QuantizationError when a worker ends for a reason other than the artifact.
    """

    def kind(case: Case) -> tuple[str, str]:
        return case.engine, str(base_of(case) or "")

    missing = [case for case in cases if any(_lacking(case, reference) for reference in known)]
    for _, alike in itertools.groupby(sorted(missing, key=kind), kind):
        group = list(alike)
        several = ENGINES[group[0].engine].several
        for part in [group] if several else [[case] for case in group]:
            texts = [one for one in known if any(_lacking(case, one) for case in part)]
            _score(part, base_of(part[0]), texts, progress)


def compute_base(case: Case, known: Sequence[Reference], progress: Progress) -> None:
    """Score the base of ``case`` on all of ``known`` by itself, unless that is kept."""
    base = base_of(case)
    if base is None:
        return
    with case.workspace.alone([f"base-scores/{base.stem}"]):
        if any(base_file(case, base, reference).record(case) is None for reference in known):
            _keep_base(case, base, known, score_base(case, base, known, progress))


def kept_scores(case: Case, known: Sequence[Reference]) -> ArtifactScores:
    """The kept scores of an artifact that ``compute`` was called for."""
    files = [own_file(case, reference) for reference in known]
    records = [file.record(case) or {} for file in files]
    base, file_type = base_of(case), records[0].get("file_type")
    failure = next((record["failure"] for record in records if record.get("failure")), "")
    bases = () if file_type in UNQUANTIZED or base is None else known
    return ArtifactScores(
        tokens=() if failure else tuple(Tokens.load(file.file) for file in files),
        bases=tuple(_base_scores(case, base, reference) for reference in bases if base is not None),
        failure=failure,
        file_type=file_type,
        kernels=tuple(records[0].get("kernels", ())),
        execution=records[0].get("execution") or WHOLE,
    )


def _base_scores(case: Case, base: Path, reference: Reference) -> BaseScores:
    file, divided = base_file(case, base, reference), divided_file(case, base, reference)
    record = file.record(case) or {}
    failure = record.get("failure") or ""
    beside = divided.record(case) is not None and divided.file.is_file() and not failure
    return BaseScores(
        name=base.name,
        file_type=record.get("file_type") or 0,
        scores=None if failure else Tokens.load(file.file),
        divided=Tokens.load(divided.file) if beside else None,
        failure=failure,
    )


def _lacking(case: Case, reference: Reference) -> bool:
    record = own_file(case, reference).record(case)
    if record is None:
        return True
    base = base_of(case)
    if base is None or record["failure"] or record["file_type"] in UNQUANTIZED:
        return False
    files = (base_file(case, base, reference), divided_file(case, base, reference))
    return any(file.record(case) is None for file in files)


def _score(cases: list[Case], base: Path | None, known: list[Reference], progress: Progress) -> None:
    """Score all of ``cases`` on all of ``known`` and keep what was found."""
    scored = answer(cases, base, known, progress)
    if base is not None:
        _keep_base(cases[0], base, known, scored)
    failures = [
        reason and without_folders(reason, case.artifact.parent)
        for case, reason in zip(cases, scored["failures"], strict=True)
    ]
    unknown = [None] * len(cases)
    types, executions = scored.get("types", unknown), scored.get("executions", unknown)
    for reference in known:
        for case, failure, file_type, execution in zip(cases, failures, types, executions, strict=True):
            kernels = scored.get("kernels", ())
            own_file(case, reference).keep(case, failure, file_type, kernels, execution)
            if base is not None:
                divided_file(case, base, reference).keep(case, failure, file_type)


def _keep_base(case: Case, base: Path, known: Sequence[Reference], scored: Mapping[str, Any]) -> None:
    """Keep the base's scores where none are; ConfigError for a base that is quantized itself."""
    base_type = scored.get("base_type")
    if base_type is not None and base_type not in UNQUANTIZED:
        raise ConfigError(
            f"the base {base} is quantized (general.file_type {base_type})",
            hint=f"give the file before quantization, {', '.join(UNQUANTIZED.values())}",
        )
    reason = scored.get("base_failure") and without_folders(scored["base_failure"], base.parent)
    for reference in known:
        file = base_file(case, base, reference)
        if file.record(case) is None:
            file.keep(case, reason, base_type)
