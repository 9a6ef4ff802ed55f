"""Whether an artifact finds a sentence in long text that its reference finds: a grid of depths and lengths.

Damage that short windows do not show (rotary scaling, sliding windows, a quantized cache) shows here. The question goes
through the source's chat template, or is the beginning of the sentence for a model without one; answers are greedy. Only
when ``validation.needle`` is configured.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantool.config.schema import Config, Corpus
from quantool.errors import ConfigError
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Source
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.texts import corpus, inputs
from quantool.validation._cache.keys import ANSWERS, REFERENCE_ANSWERS
from quantool.validation._cache.questions import Questions, ask_artifact, ask_reference
from quantool.validation._engines.head import Unsound
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._findings.paired import FEWEST
from quantool.validation._tasks import needle_worker
from quantool.validation._tasks.needle_grid import compare, nothing_found
from quantool.validation._tasks.needle_worker import Hidden

NAME = "needle"
METRIC = "retrieval"
BUILD = FindingBuilder(NAME)
QUESTIONS = Depends(fields=("validation.needle", "seed"))
"""The questions; the haystack counts by what it holds."""


def require(config: Config, source: Source) -> None:
    """Refuse what could not be asked hours later: lengths that the model does not read, a text that is not there."""
    settings = config.validation.needle
    if settings is None:
        return
    if max(settings.lengths) > source.facts.context:
        raise ConfigError(
            f"validation.needle.lengths: {max(settings.lengths)} tokens, but {source.name} reads no more than "
            f"{source.facts.context}"
        )
    count = len(set(settings.lengths)) * len(set(settings.depths))
    if count < FEWEST:
        raise ConfigError(
            f"validation.needle has {count} cells: that many can be lost by chance, so nothing would ever fail",
            hint=f"give {FEWEST} at least, lengths times depths",
        )
    haystack = _haystack(config)
    if haystack.path is not None:
        corpus.read(haystack, characters=1)


def computes(config: Config, source: Source, /) -> tuple[int, int]:
    """Every cell of the grid, with its answer."""
    del source
    settings = config.validation.needle
    if settings is None:
        return 0, 0
    cells = len(set(settings.depths))
    return cells * sum(settings.lengths), cells * len(settings.lengths) * needle_worker.ANSWER


def ask_source(case: Case, progress: Progress, /) -> None:
    """Ask the reference."""
    if case.settings.needle is not None:
        ask_reference(case, _questions(case), progress)


@check(
    NAME,
    compare=ask_source,
    require=require,
    depends=QUESTIONS | ANSWERS | REFERENCE_ANSWERS | Depends(inputs=(inputs.haystack,)),
    computes=computes,
    loads_reference=True,
    holds_model=True,
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """A sentence hidden in long text (when configured), found by reference and artifact: depth by length."""
    if case.settings.needle is None:
        return [BUILD.skip(METRIC, "validation.needle is not configured")]
    questions = _questions(case)
    theirs = ask_reference(case, questions, progress)
    before = [Hidden(**cell) for cell in theirs["cells"]]
    if not any(cell.found for cell in before):
        return [BUILD.skip(METRIC, nothing_found(before, chat=theirs["chat"]))]
    try:
        ours = ask_artifact(case, questions, progress)
    except Unsound as reason:
        return [BUILD.fail(METRIC, str(reason))]
    return [compare(before, [Hidden(**cell) for cell in ours["cells"]])]


def _haystack(config: Config) -> Corpus:
    settings = config.validation.needle
    if settings is None or settings.haystack is None:
        return corpus.corpora(config)[0]
    return Corpus(name="haystack", path=settings.haystack)


def _questions(case: Case) -> Questions:
    settings, cache_dir = case.settings.needle, case.config.dataset_cache_dir
    if settings is None:  # the caller has looked
        raise AssertionError
    haystack = _haystack(case.config)
    request = {
        "lengths": settings.lengths,
        "depths": settings.depths,
        "seed": case.config.seed,
        "corpus": haystack.model_dump(mode="json", exclude={"gates"}),
        "cache_dir": str(cache_dir) if cache_dir else None,
    }
    known = corpus.identity(haystack)
    return Questions(NAME, needle_worker.ask, request, known and case.key(QUESTIONS, known))
