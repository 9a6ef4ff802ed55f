"""The same questions to reference and artifact: each asked in a worker, its answers kept in the workspace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.plugins.contract import Case
from quantool.runtime import process
from quantool.runtime.progress import Progress
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


def ask_reference(
    case: Case, questions: Questions, progress: Progress, *, anew: bool = False
) -> dict[str, Any]:
    """Give the source's answers, kept for the next artifact and the next run.

    ``anew`` ignores what is kept. Raises SourceError when the source cannot answer.
    """
    key = questions.key and case.key(REFERENCE_ANSWERS, questions.key)

    def produce(_: object) -> list[dict[str, Any]]:
        log = case.workspace.logs / f"reference.{questions.check}.log"
        request = _request(case, questions, REFERENCE, case.source.folder)
        with progress.bar(f"reference, {questions.check}", questions.unit) as bar:
            answers = process.call(questions.work, request, log=log, bar=bar, failure=SourceError)
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
        request = _request(case, questions, case.engine, case.artifact)
        with progress.bar(f"{case.name}, {questions.check}", questions.unit) as bar:
            try:
                answers = process.call(questions.work, request, log=log, bar=bar, failure=WorkerError)
            except WorkerError as error:
                raise Unsound(crash(error, case.engine)) from error
        if answers["failure"]:
            raise Unsound(without_folders(answers["failure"], case.artifact.parent))
        return [answers]

    return case.workspace.together([Stage(f"{questions.check}/{case.name}", key)], produce, anew=anew)[0]


def _request(case: Case, questions: Questions, engine: str, model: Path) -> dict[str, Any]:
    return {
        **questions.request,
        "engine": engine,
        "model": str(model),
        "tokenizer": str(case.source.tokenizer or case.source.folder),
        "device": case.config.device or "auto",
        "trust_remote_code": case.source.trust_remote_code,
    }


@contextmanager
def load_engine(request: Mapping[str, Any], tokens: int) -> Iterator[Engine]:
    """In a worker: the model of the request, for prompts and answers of ``tokens`` tokens; raises Unsound for a bad artifact."""
    with start(
        request["engine"],
        Path(request["model"]),
        context=tokens,
        device=request["device"],
        trust_remote_code=request["trust_remote_code"],
    ) as engine:
        if engine.context < tokens:
            raise Unsound(f"it reads no more than {engine.context} tokens, and {tokens} are needed")
        yield engine
