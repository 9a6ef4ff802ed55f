"""The same questions to reference and artifact: each asked in a worker, its answers kept in the workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import QuantoolError, SourceError
from quantool.plugins.contract import Case
from quantool.runtime import process
from quantool.runtime.gpus import NO_GPU, devices
from quantool.runtime.parallel import side_by_side
from quantool.runtime.progress import Bar, Progress
from quantool.runtime.worker import Work
from quantool.runtime.workspace import Stage
from quantool.validation._cache.keys import ANSWERS, REFERENCE_ANSWERS, artifact_key
from quantool.validation._engines.crash import WorkerError, crash
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.interface import Engine
from quantool.validation._engines.start import start
from quantool.validation._findings.builder import without_folders

REFERENCE = "transformers"
"""The engine that speaks for the source."""


@dataclass(frozen=True)
class Questions:
    """What both sides are asked: the worker ``work`` on ``request``.

    The worker gets ``engine``, ``model``, ``device``, ``trust_remote_code`` and the source's ``tokenizer`` beside it, and
    gives an object: its answers, or the ``failure`` of an artifact that cannot answer.
    """

    check: str
    work: Work
    request: Mapping[str, Any]
    key: str | None
    """What the answers depend on beside the model; None when that is not known, so that nothing is kept."""
    unit: str = ""
    """Of what the worker reports."""
    divided: tuple[str, str] | None = None
    """The list of the request, and that of the answer, that several GPUs may share; None when all goes to one process."""


def ask_reference(
    case: Case, questions: Questions, progress: Progress, *, anew: bool = False
) -> dict[str, Any]:
    """Give the source's answers, kept for the next artifact and the next run.

    ``anew`` ignores what is kept. Raises SourceError when the source cannot answer.
    """
    key = questions.key and case.key(REFERENCE_ANSWERS, questions.key)

    def produce(_: object) -> list[dict[str, Any]]:
        log = case.workspace.logs / f"reference.{questions.check}.log"
        with progress.bar(f"reference, {questions.check}", questions.unit) as bar:
            answers = _ask(case, questions, (REFERENCE, case.source.folder), log, bar, SourceError)
        if answers["failure"]:
            raise SourceError(f"{case.source.name} cannot be asked: {answers['failure']}")
        return [answers]

    return case.workspace.together([Stage(f"reference-{questions.check}", key)], produce, anew=anew)[0]


def ask_artifact(
    case: Case, questions: Questions, progress: Progress, *, anew: bool = False
) -> dict[str, Any]:
    """Give the artifact's answers, kept like the reference's; raises Unsound, with the reason, when it has none."""
    key = questions.key and artifact_key(case, ANSWERS, questions.key)

    def produce(_: object) -> list[dict[str, Any]]:
        log = case.workspace.logs / f"{case.name.replace('/', '-')}.{questions.check}.log"
        with progress.bar(f"{case.name}, {questions.check}", questions.unit) as bar:
            try:
                answers = _ask(case, questions, (case.engine, case.artifact), log, bar, WorkerError)
            except WorkerError as error:
                raise Unsound(crash(error, case.engine)) from error
        if answers["failure"]:
            raise Unsound(without_folders(answers["failure"], case.artifact.parent))
        return [answers]

    return case.workspace.together([Stage(f"{questions.check}/{case.name}", key)], produce, anew=anew)[0]


def _ask(
    case: Case,
    questions: Questions,
    model: tuple[str, Path],
    log: Path,
    bar: Bar,
    failure: type[QuantoolError],
) -> dict[str, Any]:
    """The worker's answer about a model (engine and place); of several GPUs each answers its part of the questions."""
    engine, place = model
    wanted = devices(case.config.device)
    hands = wanted.each() if engine == "transformers" and questions.divided else [wanted.variables()]
    if engine == "llama.cpp" and wanted.kind != "cuda":
        hands = [dict(NO_GPU)]
    request = {
        **questions.request,
        "engine": engine,
        "model": str(place),
        "tokenizer": str(case.source.tokenizer or case.source.folder),
        "device": wanted.kind,
        "trust_remote_code": case.source.trust_remote_code,
    }
    given, made = questions.divided or ("", "")
    every = request.get(given, [])
    count = max(1, min(len(hands), len(every)))
    ends = [len(every) * number // count for number in range(count + 1)]

    def asked(number: int) -> Callable[[Bar], dict[str, Any]]:
        share = {given: every[ends[number] : ends[number + 1]]} if count > 1 else {}
        own = log.with_suffix(f".{number}{log.suffix}") if number else log
        return lambda part: process.call(
            questions.work, request | share, log=own, bar=part, failure=failure, variables=hands[number]
        )

    answers = side_by_side([asked(number) for number in range(count)], bar)
    if count == 1:
        return answers[0]
    failed = next((answer["failure"] for answer in answers if answer["failure"]), "")
    return {"failure": failed, made: [] if failed else [one for answer in answers for one in answer[made]]}


@contextmanager
def load_engine(request: Mapping[str, Any], tokens: int) -> Iterator[Engine]:
    """In a worker: the model of the request, for prompts and answers of ``tokens`` tokens; raises Unsound for a bad artifact."""
    with start(
        request["engine"],
        Path(request["model"]),
        context=tokens,
        device=request["device"],
        trust_remote_code=request["trust_remote_code"],
        cache=request.get("cache"),
    ) as engine:
        if engine.context < tokens:
            raise Unsound(f"it reads no more than {engine.context} tokens, and {tokens} are needed")
        yield engine
