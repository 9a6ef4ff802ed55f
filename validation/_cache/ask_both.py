"""The same questions to reference and artifact: each asked in a worker, its answers kept in the workspace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import QuantizationError, SourceError
from quantool.plugins.contract import Case
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.validation._cache.keys import ANSWERS, REFERENCE_ANSWERS, artifact_key
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.interface import Engine
from quantool.validation._engines.start import start

REFERENCE = "transformers"
"""The engine that speaks for the source."""


class _WorkerError(QuantizationError):
    """The worker ended without an answer."""


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


def reference(case: Case, asked: Questions, progress: Progress, *, anew: bool = False) -> dict[str, Any]:
    """Give the source's answers, kept for the next artifact and the next run.

    ``anew`` ignores what is kept. Raises SourceError when the source cannot answer.
    """
    stage = f"reference-{asked.check}"
    key = asked.key and case.key(REFERENCE_ANSWERS, asked.key)
    kept = None if anew or key is None else case.workspace.recall(stage, key)
    if kept is not None:
        return kept
    log = case.workspace.logs / f"reference.{asked.check}.log"
    request = _request(case, asked, REFERENCE, case.source.folder)
    with progress.bar(f"reference, {asked.check}") as bar:
        answers = process.call(asked.work, request, log=log, bar=bar, failure=SourceError)
    if answers["failure"]:
        raise SourceError(f"{case.source.name} cannot be asked: {answers['failure']}")
    if key is not None:
        case.workspace.keep(stage, key, [], answers)
    return answers


def artifact(case: Case, asked: Questions, progress: Progress, *, anew: bool = False) -> dict[str, Any]:
    """Give the artifact's answers, kept like the reference's; ``failure`` in them says why it has none."""
    stage = f"{asked.check}/{case.name}"
    key = asked.key and artifact_key(case, ANSWERS, asked.key)
    kept = None if anew or key is None else case.workspace.recall(stage, key)
    if kept is not None:
        return kept
    log = case.workspace.logs / f"{case.name.replace('/', '-')}.{asked.check}.log"
    request = _request(case, asked, case.engine, case.artifact)
    with progress.bar(f"{case.name}, {asked.check}") as bar:
        try:
            answers = process.call(asked.work, request, log=log, bar=bar, failure=_WorkerError)
        except _WorkerError as error:
            if "SIGABRT" not in error.message and "SIGSEGV" not in error.message:
                raise  # says nothing about the file: memory, a bug
            return {"failure": f"{case.engine} crashes on it: {error.message}\n{error.hint}"}
    if key is not None and not answers["failure"]:
        case.workspace.keep(stage, key, [], answers)
    return answers


def _request(case: Case, asked: Questions, engine: str, model: Path) -> dict[str, Any]:
    return {
        **asked.request,
        "engine": engine,
        "model": str(model),
        "tokenizer": str(case.source.tokenizer or case.source.folder),
        "device": case.config.device or "auto",
        "trust_remote_code": case.source.trust_remote_code,
    }


@contextmanager
def loaded(request: Mapping[str, Any], tokens: int) -> Iterator[Engine]:
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


def beginning(tokenizer: Any) -> list[int]:
    """BOS where the tokenizer puts it before a text."""
    plain, dressed = (
        tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (False, True)
    )
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and dressed[:1] == [bos] != plain[:1] else []
