"""Scores of artifacts beside the reference: computed for several at once, kept in the workspace under what they depend on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError
from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.validation._cache.keys import artifact_key, stamp
from quantool.validation._engines import vllm
from quantool.validation._engines.crash import WorkerError, crash
from quantool.validation._engines.reference import WHOLE, Reference
from quantool.validation._findings.builder import without_folders
from quantool.validation._findings.statistics import Tokens
from quantool.validation._score import score_llama_cpp, score_transformers
from quantool.validation._score.conversion_loss import UNQUANTIZED, BaseScores, windows_of


@dataclass(frozen=True)
class _Engine:
    """A worker, and whether it takes several artifacts."""

    work: Work
    several: bool


ENGINES = {
    "llama.cpp": _Engine(score_llama_cpp.score, True),
    "transformers": _Engine(score_transformers.score, True),
    "vllm": _Engine(vllm.score, False),
}
SCORES = Depends(fields=("validation.context", "device"), engine=True)
"""The scores of an artifact, or of its base, on the reference's windows; these count by the reference's key."""


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
        files = [] if failure or not self.file.is_file() else [self.file]
        record = {
            "failure": failure,
            "file_type": file_type,
            "kernels": list(kernels),
            "execution": execution,
        }
        case.workspace.keep(self.stage, self.key, files, record)


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
        return case.engine, str(_base(case) or "")

    missing = [case for case in cases if any(_lacking(case, reference) for reference in known)]
    for _, alike in itertools.groupby(sorted(missing, key=kind), kind):
        group = list(alike)
        several = ENGINES[group[0].engine].several
        for part in [group] if several else [[case] for case in group]:
            texts = [one for one in known if any(_lacking(case, one) for case in part)]
            _score(part, _base(part[0]), texts, progress)


def kept_scores(case: Case, known: Sequence[Reference]) -> ArtifactScores:
    """The kept scores of an artifact that ``compute`` was called for."""
    files = [_own_file(case, reference) for reference in known]
    records = [file.record(case) or {} for file in files]
    base, file_type = _base(case), records[0].get("file_type")
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
    file, divided = _base_file(case, base, reference), _divided_file(case, base, reference)
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


def _base(case: Case) -> Path | None:
    """The base to compare with; None for other engines and where the artifact is the base."""
    if case.engine != "llama.cpp" or case.base is None or case.base.resolve() == case.artifact.resolve():
        return None
    return case.base


def _lacking(case: Case, reference: Reference) -> bool:
    record = _own_file(case, reference).record(case)
    if record is None:
        return True
    base = _base(case)
    if base is None or record["failure"] or record["file_type"] in UNQUANTIZED:
        return False
    files = (_base_file(case, base, reference), _divided_file(case, base, reference))
    return any(file.record(case) is None for file in files)


def _score(cases: list[Case], base: Path | None, known: list[Reference], progress: Progress) -> None:
    """Score all of ``cases`` on all of ``known`` and keep what was found."""
    answer = _answer(cases, base, known, progress)
    base_type = answer.get("base_type")
    if base is not None and base_type is not None and base_type not in UNQUANTIZED:
        raise ConfigError(
            f"the base {base} is quantized (general.file_type {base_type})",
            hint=f"give the file before quantization, {', '.join(UNQUANTIZED.values())}",
        )
    failures = [
        reason and without_folders(reason, case.artifact.parent)
        for case, reason in zip(cases, answer["failures"], strict=True)
    ]
    unknown = [None] * len(cases)
    types, executions = answer.get("types", unknown), answer.get("executions", unknown)
    for reference in known:
        for case, failure, file_type, execution in zip(cases, failures, types, executions, strict=True):
            kernels = answer.get("kernels", ())
            _own_file(case, reference).keep(case, failure, file_type, kernels, execution)
            if base is not None:
                _divided_file(case, base, reference).keep(case, failure, file_type)
        if base is not None:
            reason = answer.get("base_failure") and without_folders(answer["base_failure"], base.parent)
            _base_file(cases[0], base, reference).keep(cases[0], reason, base_type)


def _answer(
    cases: Sequence[Case], base: Path | None, known: Sequence[Reference], progress: Progress
) -> dict[str, Any]:
    """The worker's answer; when it crashes with several files, each is tried by itself, so that the bad one is named."""
    first = cases[0]
    try:
        return _call(cases, base, known, first, progress)
    except WorkerError as error:
        failure = crash(error, first.engine)
    if len(cases) == 1 and base is None:
        return {"failures": [failure]}
    progress.warn(f"{first.engine} crashed on one of {len(cases) + (base is not None)} files: now one by one")
    single = [_answer([case], None, known, progress) for case in cases]
    answer = {
        "failures": [one["failures"][0] for one in single],
        "types": [one.get("types", [None])[0] for one in single],
        "executions": [one.get("executions", [None])[0] for one in single],
    }
    if base is None:
        return answer
    try:
        alone = _call([], base, known, first, progress)
    except WorkerError as error:
        alone = {"base_failure": crash(error, first.engine), "base_type": None}
    return answer | {name: alone[name] for name in ("base_failure", "base_type")}


def _call(
    cases: Sequence[Case],
    base: Path | None,
    known: Sequence[Reference],
    first: Case,
    progress: Progress,
) -> dict[str, Any]:
    """Run the worker on ``cases`` (none: the base alone); ``first`` says what they all share."""
    device, context = first.config.device or "auto", first.config.validation.context
    own = [[_own_file(case, one).file for one in known] for case in cases]
    base_files: list[Path] = []
    divided: list[list[Path]] = [[] for _ in cases]
    if base is not None:
        base_files = [_base_file(first, base, one).file for one in known]
        divided = [[_divided_file(case, base, one).file for one in known] for case in cases]
    for file in itertools.chain(base_files, *own, *divided):
        file.unlink(missing_ok=True)  # a comparison that is left out must not leave an older one
    request: dict[str, Any] = {
        "models": [str(case.artifact) for case in cases],
        "outputs": [list(map(str, files)) for files in own],
        "windows": [str(one.windows.path) for one in known],
        "hidden": [str(one.hidden) for one in known],
        "source": str(first.source.folder),
        "head": known[0].head.fields(),
        "tokens": known[0].windows.vocabulary,
        "context": context,
        "gpu": device == "cuda",
        "device": device,
        "trust_remote_code": first.source.trust_remote_code,
        "base": base
        and {
            "path": str(base),
            "outputs": list(map(str, base_files)),
            "divided": [list(map(str, files)) for files in divided],
            "windows": windows_of(context),
        },
    }
    names = [case.name for case in cases] or ["the base"]
    label = ", ".join(names) if len(names) <= 3 else f"{len(names)} artifacts"
    stem = f"{names[0].replace('/', '-')}.perplexity" if len(cases) == 1 else "perplexity"
    log = first.workspace.logs / f"{stem}.log"
    work = ENGINES[first.engine].work
    with progress.bar(f"score {label}", "tok") as bar:
        return process.call(work, request, log=log, bar=bar, failure=WorkerError)


def _own_file(case: Case, reference: Reference) -> ScoresFile:
    corpus = reference.windows.corpus.name
    return ScoresFile(
        f"scores/{case.name}/{corpus}",
        artifact_key(case, SCORES, reference.key),
        case.workspace.work / "scores" / case.name / f"{corpus}.npz",
    )


def _base_file(case: Case, base: Path, reference: Reference) -> ScoresFile:
    corpus = reference.windows.corpus.name
    return ScoresFile(
        f"base-scores/{base.stem}/{corpus}",
        case.key(SCORES, reference.key, stamp(base)),
        case.workspace.work / "base-scores" / base.stem / f"{corpus}.npz",
    )


def _divided_file(case: Case, base: Path, reference: Reference) -> ScoresFile:
    corpus, own = reference.windows.corpus.name, _own_file(case, reference)
    return ScoresFile(
        f"divided-scores/{case.name}/{corpus}",
        case.key(SCORES, own.key, _base_file(case, base, reference).key),
        case.workspace.work / "divided-scores" / case.name / f"{corpus}.npz",
    )
