"""Tasks of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on reference and artifact.

Both answer the same documents through ``lm_eval_adapter``: prompts through the source's chat template where it has one
(``apply_chat_template``), in token ids of its tokenizer. Tasks are judged by the answers to each document (``paired``), a group by the
documents of all its tasks together. Only when ``validation.lm_eval`` is configured.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import stdev
from typing import Any

from quantool.config.schema import Config, LmEval
from quantool.errors import ConfigError, DependencyError
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Source, Verdict, sha256_of
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.validation._cache.keys import ANSWERS, REFERENCE_ANSWERS
from quantool.validation._cache.questions import Questions, ask_artifact, ask_reference
from quantool.validation._engines.head import Unsound
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._findings.paired import FEWEST, Difference, error_of, mcnemar, of_means, verdicts
from quantool.validation._tasks import lm_eval_worker
from quantool.validation._tasks.lm_eval_worker import Series

NAME = "lm_eval"
BUILD = FindingBuilder(NAME)
NEED = "lm_eval"
EXTRA = "lm-eval"
PARTS_SHOWN = 60  # tasks of a group in the detail


def _own_tasks(config: Config) -> Iterator[tuple[str, str | None]]:
    """The user's task files."""
    folder = config.validation.lm_eval and config.validation.lm_eval.include_path
    for path in sorted(folder.rglob("*")) if folder else ():
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(path.relative_to(folder or path)), sha256_of(path)


def _documents(config: Config) -> Iterator[tuple[str, str | None]]:
    """The documents of the tasks, which lie anywhere: nothing tells whether they changed."""
    if config.validation.lm_eval is not None:
        yield "documents", None


QUESTIONS = Depends(
    fields=tuple(f"validation.lm_eval.{name}" for name in LmEval.model_fields if name != "max_drop"),
    inputs=(_own_tasks,),
    libraries=("lm_eval", "datasets", "transformers"),
)
"""What is asked; that the documents are the same is seen by asking both. What may be lost changes no answer."""


def require(config: Config, source: Source) -> None:
    """Refuse what could not be judged hours later: lm-eval is not installed, or has no such task."""
    settings = config.validation.lm_eval
    if settings is None:
        return
    if settings.apply_chat_template and source.facts.chat_template is None:
        raise ConfigError(
            f"validation.lm_eval.apply_chat_template is true, but {source.name} has no chat template",
            hint="leave it out: then prompts are plain text",
        )
    if importlib.util.find_spec(NEED) is None:
        raise DependencyError(f"validation.lm_eval needs {NEED}", hint=f"pip install 'quantool[{EXTRA}]'")
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise ConfigError(f"validation.lm_eval.include_path is no folder: {settings.include_path}")
    if settings.limit is not None and settings.limit < FEWEST:
        raise ConfigError(
            f"validation.lm_eval.limit is {settings.limit}: that many documents can be lost by chance, so nothing would ever fail",
            hint=f"give {FEWEST} at least",
        )
    _look_up(settings.tasks, settings.include_path)


@cache
def _look_up(tasks: tuple[str, ...], include_path: Path | None) -> None:
    """ConfigError for a name that lm-eval does not know; in a child, for its index of 14,000 takes seconds."""
    request = {"tasks": tasks, "include_path": str(include_path) if include_path else None}
    with tempfile.TemporaryDirectory(prefix="quantool-") as folder:  # a plan leaves nothing behind
        process.call(
            lm_eval_worker.look_up_tasks,
            request,
            log=Path(folder) / "log",
            failure=ConfigError,
        )


def compare(case: Case, progress: Progress, /) -> None:
    """Ask the reference."""
    if (settings := case.settings.lm_eval) is not None:
        ask_reference(case, _questions(case, settings), progress)


def fetch(config: Config, source: Source, /) -> None:
    """Bring the documents of the tasks into the cache."""
    settings = config.validation.lm_eval
    if settings is None:
        return
    with tempfile.TemporaryDirectory(prefix="quantool-") as folder:
        request = _request(config, settings, source)
        process.call(lm_eval_worker.fetch_tasks, request, log=Path(folder) / "log", failure=ConfigError)


@check(
    NAME,
    compare=compare,
    fetch=fetch,
    require=require,
    depends=QUESTIONS | ANSWERS | REFERENCE_ANSWERS | Depends(("validation.lm_eval",), inputs=(_documents,)),
    loads_reference=True,
    holds_model=True,
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Tasks of lm-eval (when configured): accuracy beside the reference, by McNemar's exact test."""
    settings = case.settings.lm_eval
    if settings is None:
        return [BUILD.skip("tasks", "validation.lm_eval is not configured")]
    questions = _questions(case, settings)
    theirs = ask_reference(case, questions, progress)
    try:
        ours = ask_artifact(case, questions, progress)
        if ours["documents"] != theirs["documents"]:  # data changed where the fingerprint does not see it
            theirs = ask_reference(case, questions, progress, anew=True)
            ours = ask_artifact(case, questions, progress, anew=True)
    except Unsound as reason:
        return [BUILD.fail("answers", str(reason))]
    if ours["documents"] != theirs["documents"]:
        raise ConfigError(
            f"the documents of {', '.join(settings.tasks)} were not the same for {case.name} and its reference",
            hint="a task that draws its documents or examples without a seed cannot be compared",
        )
    pairs = [
        SeriesPair(name, Series(**before), Series(**after))
        for name in settings.tasks
        for before, after in zip(theirs["series"][name], ours["series"][name], strict=True)
    ]
    notes = dict.fromkeys([*theirs["notes"], *ours["notes"]])
    if questions.request["chat"]:
        notes["asked through the chat template"] = None
    return _findings(pairs, settings.max_drop, list(notes))


def _request(config: Config, settings: LmEval, source: Source) -> dict[str, Any]:
    """What the worker is told of the tasks and of how the model is asked."""
    folder, cache_dir = settings.include_path, config.dataset_cache_dir
    chat = settings.apply_chat_template
    if chat is None:
        chat = source.facts.chat_template is not None
    return {
        "tasks": settings.tasks,
        "include_path": str(folder) if folder else None,
        "num_fewshot": settings.num_fewshot,
        "limit": settings.limit,
        "chat": chat,
        "multiturn": chat and settings.fewshot_as_multiturn,
        "context": source.facts.context,
        "cache_dir": str(cache_dir) if cache_dir else None,
    }


def _questions(case: Case, settings: LmEval) -> Questions:
    request = _request(case.config, settings, case.source)
    return Questions(NAME, lm_eval_worker.ask, request, case.key(QUESTIONS))


@dataclass(frozen=True)
class SeriesPair:
    """One metric of a task or group by both."""

    task: str
    reference: Series
    artifact: Series

    def difference(self) -> Difference | None:
        """How they differ by a test; None for a metric that is judged by nothing.

        That is one which is no mean over documents, has other values than 0 to 1, or is better when it is smaller.
        """
        theirs, ours = self.reference, self.artifact
        if not theirs.values or not ours.values or theirs.higher is False:
            return None
        by_document = dict(zip(ours.documents, ours.values, strict=True))
        both = [
            (before, by_document[document])
            for document, before in zip(theirs.documents, theirs.values, strict=True)
            if document in by_document
        ]
        grades = [grade for pair in both for grade in pair]
        if not both or not all(0 <= grade <= 1 for grade in grades):
            return None
        before, after = [pair[0] for pair in both], [pair[1] for pair in both]
        if set(grades) <= {0.0, 1.0}:
            return mcnemar([grade > 0 for grade in before], [grade > 0 for grade in after])
        return of_means(before, after)


def _findings(pairs: Sequence[SeriesPair], max_drop: float, notes: Sequence[str]) -> list[Finding]:
    """One finding a metric; what is tested is tested together (``verdicts``)."""
    differences = [pair.difference() for pair in pairs]
    concluded = iter(verdicts([difference for difference in differences if difference is not None], max_drop))
    return [
        _noted(pair, notes)
        if difference is None
        else _judged(pair, difference, next(concluded), max_drop, notes)
        for pair, difference in zip(pairs, differences, strict=True)
    ]


def _judged(
    pair: SeriesPair, difference: Difference, verdict: Verdict, max_drop: float, notes: Sequence[str]
) -> Finding:
    change = difference.measured - difference.reference
    conclusion = {
        Verdict.REGRESSION: f"; a loss beyond chance and beyond max_drop {max_drop:g}",
        Verdict.ANOMALOUS: "; better than the reference beyond chance, so the comparison is probably broken",
    }.get(verdict, "")
    if not conclusion and -change > max_drop:
        conclusion = f"; a loss beyond max_drop {max_drop:g} that chance explains"
    detail = (
        f"{pair.task}, {pair.artifact.metric}: {difference.measured:.4f} ± {difference.error:.2g} beside "
        f"{difference.reference:.4f} ± {difference.error_reference:.2g} on {len(pair.artifact.documents)} documents; "
        f"{difference.text}{conclusion}"
    )
    return Finding(
        check=NAME,
        metric=pair.artifact.metric,
        verdict=verdict,
        corpus=pair.task,
        measured=difference.measured,
        reference=difference.reference,
        error=difference.error,
        threshold=difference.reference - max_drop,
        detail="\n".join([detail, *_parts(pair), *notes]),
    )


def _noted(pair: SeriesPair, notes: Sequence[str]) -> Finding:
    """A metric for the record: nothing says how much of it may be lost."""
    theirs, ours = pair.reference, pair.artifact
    if ours.draws:
        error = stdev(ours.draws)
        between = stdev(after - before for before, after in zip(theirs.draws, ours.draws, strict=True))
    else:
        error = error_of(ours.values)
        changes = [after - before for before, after in zip(theirs.values, ours.values, strict=False)]
        between = error_of(changes)
    detail = (
        f"{pair.task}, {ours.metric}: {ours.value:.5g} ± {error:.2g} beside {theirs.value:.5g} on "
        f"{len(ours.documents)} documents; difference {ours.value - theirs.value:+.3g} ± {between:.2g}; for the record"
    )
    return Finding(
        check=NAME,
        metric=ours.metric,
        verdict=Verdict.PASS,
        corpus=pair.task,
        measured=ours.value,
        reference=theirs.value,
        error=error,
        detail="\n".join([detail, *_parts(pair), *notes]),
    )


def _parts(pair: SeriesPair) -> list[str]:
    """Lines on the tasks of a group."""
    theirs, ours = pair.reference.parts, pair.artifact.parts
    lines = [f"  {name}: {ours[name]:.4f} beside {theirs[name]:.4f}" for name in ours if name in theirs]
    left = len(lines) - PARTS_SHOWN
    return [*lines[:PARTS_SHOWN], *([f"  and {left} more"] if left > 0 else [])]
