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
from quantool.records import Finding, Source, Verdict
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.texts import corpus, inputs
from quantool.validation._cache.keys import ANSWERS, REFERENCE_ANSWERS
from quantool.validation._cache.questions import Questions, ask_artifact, ask_reference
from quantool.validation._engines.head import Unsound
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._findings.paired import FEWEST, mcnemar, verdicts
from quantool.validation._tasks import needle_worker
from quantool.validation._tasks.needle_worker import Hidden

NAME = "needle"
METRIC = "retrieval"
BUILD = FindingBuilder(NAME)
CELLS = {(True, True): "both", (True, False): "LOST", (False, True): "gained", (False, False): "none"}
"""What stands in the grid, by whether the reference and the artifact found the sentence."""
ANSWER_SHOWN = 60  # characters
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
        form = (
            "in chat form" if theirs["chat"] else "as the beginning of the sentence (it has no chat template)"
        )
        return [
            BUILD.skip(
                METRIC,
                f"the reference finds none of {len(before)} hidden sentences, asked {form}, so a loss could not be "
                f"seen; its first answer: {before[0].answer[:ANSWER_SHOWN]!r}",
            )
        ]
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


def compare(reference: Sequence[Hidden], artifact: Sequence[Hidden]) -> Finding:
    """The finding on two grids of the same cells, in the same order."""
    difference = mcnemar([cell.found for cell in reference], [cell.found for cell in artifact])
    (verdict,) = verdicts([difference], 0.0)
    conclusion = {
        Verdict.REGRESSION: "; lost beyond chance",
        Verdict.ANOMALOUS: "; more than the reference beyond chance, so the comparison is probably broken",
    }.get(verdict, "")
    summary = (
        f"finds {sum(cell.found for cell in artifact)} of {len(artifact)} hidden sentences, the reference "
        f"{sum(cell.found for cell in reference)}; {difference.text}{conclusion}"
    )
    lines = [
        summary,
        *_grid(reference, artifact),
        *_lost(reference, artifact),
    ]
    repeats = max(cell.repeats for cell in artifact)
    if repeats > 1:
        lines.append(f"the text was too short and stands up to {repeats} times in a prompt")
    return Finding(
        check=NAME,
        metric=METRIC,
        verdict=verdict,
        measured=difference.measured,
        reference=difference.reference,
        error=difference.error,
        detail="\n".join(lines),
    )


def _grid(reference: Sequence[Hidden], artifact: Sequence[Hidden]) -> list[str]:
    """A table: a row for each depth, a column for each length in tokens, what ``CELLS`` says in them."""
    found = {
        (theirs.depth, theirs.length): CELLS[theirs.found, ours.found]
        for theirs, ours in zip(reference, artifact, strict=True)
    }
    lengths, depths = sorted({length for _, length in found}), sorted({depth for depth, _ in found})
    head = "  depth" + "".join(f"{length:>9}" for length in lengths)
    rows = [
        f"{100 * depth:5.0f} %" + "".join(f"{found[depth, length]:>9}" for length in lengths)
        for depth in depths
    ]
    return [head, *rows]


def _lost(reference: Sequence[Hidden], artifact: Sequence[Hidden]) -> list[str]:
    """What the artifact said in the first cell that it lost."""
    for theirs, ours in zip(reference, artifact, strict=True):
        if theirs.found and not ours.found:
            place = f"{100 * ours.depth:.0f} % of {ours.length} tokens"
            return [f"at {place} {ours.value} is asked for, the answer: {ours.answer[:ANSWER_SHOWN]!r}"]
    return []
