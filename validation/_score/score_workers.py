"""The workers that score: what of their work is missing, who does which windows, and what they answer together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from quantool.plugins.contract import Case
from quantool.runtime import gpus
from quantool.runtime.gpus import NO_GPU, devices
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.validation._engines import vllm
from quantool.validation._engines.crash import WorkerError, crash
from quantool.validation._engines.reference import Reference
from quantool.validation._engines.spans import Span, in_shares, spans_of
from quantool.validation._score import score_llama_cpp, score_transformers
from quantool.validation._score.conversion_loss import windows_of
from quantool.validation._score.score_files import ScoresFile, base_file, divided_file, own_file
from quantool.validation._score.score_llama_cpp import WEIGHTS_SHARE, weight_of


@dataclass(frozen=True)
class Scorer:
    """A worker, and whether it takes several artifacts."""

    work: Work
    several: bool


ENGINES = {
    "llama.cpp": Scorer(score_llama_cpp.score, True),
    "transformers": Scorer(score_transformers.score, True),
    "vllm": Scorer(vllm.score, False),
}


def answer(
    cases: Sequence[Case], base: Path | None, known: Sequence[Reference], progress: Progress
) -> dict[str, Any]:
    """The worker's answer; when it crashes with several files, each is tried by itself, so that the bad one is named."""
    first = cases[0]
    try:
        return _Round(cases, base, known, first).run(progress)
    except WorkerError as error:
        failure = crash(error, first.engine)
    if len(cases) == 1 and base is None:
        return {"failures": [failure]}
    progress.warn(f"{first.engine} crashed on one of {len(cases) + (base is not None)} files: now one by one")
    single = [answer([case], None, known, progress) for case in cases]
    scored = {
        "failures": [one["failures"][0] for one in single],
        "types": [one.get("types", [None])[0] for one in single],
        "executions": [one.get("executions", [None])[0] for one in single],
    }
    if base is None:
        return scored
    alone = score_base(first, base, known, progress)
    return scored | {name: alone[name] for name in ("base_failure", "base_type")}


def score_base(case: Case, base: Path, known: Sequence[Reference], progress: Progress) -> dict[str, Any]:
    """The worker's answer about the base of ``case`` alone."""
    try:
        return _Round([], base, known, case).run(progress)
    except WorkerError as error:
        return {"base_failure": crash(error, case.engine), "base_type": None}


@dataclass(frozen=True)
class _Round:
    """One call of an engine's worker on some artifacts and, or, their base."""

    cases: Sequence[Case]
    base: Path | None
    known: Sequence[Reference]
    first: Case
    """Says what they all share."""

    def run(self, progress: Progress) -> dict[str, Any]:
        """Score what is missing and put the parts together; gives the worker's answer, of several workers one."""
        spans = self._spans()
        # Of the worker's account of an artifact nothing is kept: where nothing is missing it makes the last span again.
        for number in range(len(self.cases)):
            parts = [self._own(span)[number].part(span) for span in spans]
            if all(part.is_file() for part in parts):
                parts[-1].unlink()
        missing = [span for span in spans if any(self._parts(span))] or spans[-1:]
        names = [case.name for case in self.cases] or ["the base"]
        label = ", ".join(names) if len(names) <= 3 else f"{len(names)} artifacts"
        stem = f"{names[0].replace('/', '-')}.perplexity" if len(self.cases) == 1 else "perplexity"
        with progress.bar(f"score {label}", "tok") as bar:
            answers = in_shares(
                ENGINES[self.first.engine].work,
                missing,
                self._request,
                self._hands(),
                log=self.first.workspace.logs / f"{stem}.log",
                bar=bar,
                failure=WorkerError,
            )
        for file, spans in self._whole():
            file.join(spans)
        return _together(answers)

    def _spans(self) -> list[Span]:
        if ENGINES[self.first.engine].several:
            return spans_of([one.windows.count for one in self.known], self._context)
        return [Span(number, 0, one.windows.count) for number, one in enumerate(self.known)]

    @property
    def _context(self) -> int:
        return self.first.config.validation.context

    def _own(self, span: Span) -> list[ScoresFile]:
        return [own_file(case, self.known[span.text]) for case in self.cases]

    def _beside(self, span: Span) -> list[ScoresFile]:
        """The files of the base, then of each artifact beside it, that windows of ``span`` belong to."""
        if self.base is None or span.first >= windows_of(self._context):
            return []
        reference = self.known[span.text]
        divided = [divided_file(case, self.base, reference) for case in self.cases]
        return [base_file(self.first, self.base, reference), *divided]

    def _files(self, span: Span) -> list[ScoresFile]:
        beside = self._beside(span)
        return [*self._own(span), *(beside[1:] if beside and self._is_kept(beside[0]) else beside)]

    def _is_kept(self, base: ScoresFile) -> bool:
        """Whether the base was scored before: several nodes judge artifacts of one base at the same time."""
        return base.record(self.first) is not None

    def _parts(self, span: Span) -> Iterator[Path]:
        """What is missing of a span."""
        return (part for file in self._files(span) if not (part := file.part(span)).is_file())

    def _whole(self) -> list[tuple[ScoresFile, list[Span]]]:
        """Every file with the spans that it is made of."""
        made: dict[ScoresFile, list[Span]] = {}
        for span in self._spans():
            for file in self._files(span):
                made.setdefault(file, []).append(span)
        return list(made.items())

    def _hands(self) -> list[dict[str, str]]:
        """The processes that share the windows: one for each GPU that holds all that must be held at once."""
        wanted = devices(self.first.config.device)
        if not ENGINES[self.first.engine].several:
            return [wanted.variables()]
        if self.first.engine != "llama.cpp":
            return wanted.each()
        if wanted.kind != "cuda":
            return [NO_GPU]
        held = [case.artifact for case in self.cases] or [self.first.artifact]
        needed = max(map(weight_of, held)) + (weight_of(self.base) if self.base else 0)
        fits = needed <= WEIGHTS_SHARE * min(gpus.memory(), default=0)
        return wanted.each() if fits else [wanted.variables()]

    def _request(self, share: Sequence[Span]) -> dict[str, Any]:
        device = devices(self.first.config.device).kind
        beside = [self._beside(span) for span in share]

        def wanted(files: Iterable[tuple[Span, ScoresFile | None]]) -> list[str | None]:
            paths = [None if file is None else file.part(span) for span, file in files]
            return [None if path is None or path.is_file() else str(path) for path in paths]

        def of_base(number: int) -> list[str | None]:
            return wanted(
                (span, files[number] if files and (number or not self._is_kept(files[0])) else None)
                for span, files in zip(share, beside, strict=True)
            )

        return {
            "models": [str(case.artifact) for case in self.cases],
            "outputs": [
                wanted((span, self._own(span)[number]) for span in share) for number in range(len(self.cases))
            ],
            "windows": [str(one.windows.path) for one in self.known],
            "hidden": [str(one.hidden) for one in self.known],
            "spans": [astuple(span) for span in share],
            "source": str(self.first.source.folder),
            "head": self.known[0].head.fields(),
            "tokens": self.known[0].windows.vocabulary,
            "context": self._context,
            "gpu": device == "cuda",
            "cache": self.first.cache,
            "device": device,
            "trust_remote_code": self.first.source.trust_remote_code,
            "base": self.base
            and {
                "path": str(self.base),
                "outputs": of_base(0),
                "divided": [of_base(number) for number in range(1, len(self.cases) + 1)],
                "windows": windows_of(self._context),
            },
        }


def _together(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One answer of those of several workers, each of which scored some of the windows of the same artifacts."""
    made = dict(answers[0])
    for name in made.keys() & {"failures", "types", "executions"}:
        columns = zip(*(answer[name] for answer in answers), strict=True)
        made[name] = [_first(column) for column in columns]
    for name in made.keys() & {"base_failure", "base_type"}:
        made[name] = _first(answer[name] for answer in answers)
    return made


def _first(values: Iterable[Any]) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)
