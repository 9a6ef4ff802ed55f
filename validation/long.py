"""Whether an artifact holds up over long contexts, with each type of attention cache that people run it with.

Windows as long as ``validation.long.lengths`` are compared with the bf16 reference position by position, once for each
cache. With a cache of 16 bits that shows what the weights lose (and rotary scaling that is not the model's); what another
cache adds to it is the paired difference on the same tokens. Sentences hidden in texts of the same lengths are asked for
with each cache. Windows go through the engine one after the other, their logits in pieces; what grows with the length
is the cache itself. Only when ``validation.long`` is configured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

from quantool.config.schema import Config, Needle
from quantool.config.served import Cache, Long
from quantool.errors import ConfigError
from quantool.gates import over
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Source
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.texts import corpus, inputs
from quantool.validation._cache.keys import ANSWERS, REFERENCE_ANSWERS
from quantool.validation._cache.questions import Questions, ask_artifact, ask_reference
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.reference import REFERENCE
from quantool.validation._engines.windows import WINDOWS, scored
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._findings.limits import Gate, gated
from quantool.validation._findings.statistics import Tokens, mean
from quantool.validation._score.long_windows import at_length, by_position, listed, long_references, rise
from quantool.validation._score.score_files import SCORES
from quantool.validation._score.scores import compute, kept_scores
from quantool.validation._score.scores import require as require_engine
from quantool.validation._tasks import needle_worker
from quantool.validation._tasks.needle_grid import compare, nothing_found
from quantool.validation._tasks.needle_worker import Hidden

NAME = "long"
BUILD = FindingBuilder(NAME)
PLAIN = "f16"
"""The cache that the others are compared with."""
DEPTHS = tuple(Needle().depths)
QUESTIONS = Depends(fields=("validation.long", "seed"))
CACHES = {
    "llama.cpp": frozenset(get_args(Cache)) - {"fp8"},
    "vllm": frozenset({PLAIN, "fp8"}),
    "transformers": frozenset({PLAIN}),
}
"""What an engine can be told to use; ``PLAIN`` is what it uses by itself."""
ELSEWHERE = {
    "llama.cpp": "llama.cpp has no cache in FP8; that is vLLM's",
    "vllm": "vLLM has caches of 16 bits and in FP8; this one is llama.cpp's",
    "transformers": "caches are those of the engine that serves, and transformers computes without one: "
    "`quantool validate --engine vllm` measures vLLM's",
}
"""Why an engine is not tried with a cache."""


def require(config: Config, source: Source) -> None:
    """Refuse lengths that the model does not read."""
    settings = config.validation.long
    if settings is not None and max(settings.lengths) > source.facts.context:
        raise ConfigError(
            f"validation.long.lengths: {max(settings.lengths)} tokens, but {source.name} reads no more than "
            f"{source.facts.context}"
        )


def writes(config: Config, source: Source, /) -> int:
    """The reference's hidden states of the scored half of every window."""
    settings = config.validation.long
    if settings is None:
        return 0
    width = source.facts.hidden * (4 if source.facts.dtype == "F32" else 2)
    rows = sum(len(scored(length)) for length in set(settings.lengths)) * settings.windows
    return len(corpus.corpora(config)) * rows * width


def computes(config: Config, source: Source, /) -> tuple[int, int]:
    """Every window once by the reference, and by the artifact once for each cache; the hidden sentences likewise."""
    del source
    settings = config.validation.long
    if settings is None:
        return 0, 0
    lengths, caches = set(settings.lengths), len({PLAIN, *settings.kv})
    windows = sum(lengths) * settings.windows * len(corpus.corpora(config))
    asked = sum(lengths) * len(DEPTHS) if settings.needle else 0
    answers = len(lengths) * len(DEPTHS) * needle_worker.ANSWER if settings.needle else 0
    return (windows + asked) * caches, answers * caches


def prepare(cases: Sequence[Case], progress: Progress) -> None:
    """Score all artifacts with each cache, those of one engine together; the reference is computed once a length."""
    settings = cases[0].settings.long
    if settings is None:
        return
    for case in cases:
        require_engine(case)
    for length in sorted(set(settings.lengths)):
        longer = [at_length(case, length, settings.windows) for case in cases]
        known, _ = long_references(longer[0], progress)
        for cache in _caches(settings) if known else ():
            able = [with_cache(case, cache) for case in longer if cache in CACHES[case.engine]]
            compute(able, known, progress)


@check(
    NAME,
    prepare=prepare,
    require=require,
    writes=writes,
    computes=computes,
    loads_reference=True,
    holds_model=True,
    depends=WINDOWS
    | REFERENCE
    | SCORES
    | QUESTIONS
    | ANSWERS
    | REFERENCE_ANSWERS
    | Depends(fields=("validation.corpora",), inputs=(inputs.held_out, inputs.long_haystack), gates=True),
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Long windows (when configured) with each type of attention cache: divergence by position, and retrieval."""
    settings = case.settings.long
    if settings is None:
        return [BUILD.skip("kld", "validation.long is not configured")]
    findings = [
        BUILD.skip(f"cache_{cache}", ELSEWHERE[case.engine])
        for cache in settings.kv
        if cache not in CACHES[case.engine]
    ]
    prepare([case], progress)
    for length in sorted(set(settings.lengths)):
        findings += _judge_length(case, settings, length, progress)
    return [*findings, *(_judge_needle(case, settings, progress) if settings.needle else ())]


def _caches(settings: Long) -> list[str]:
    """Those to measure, the one that the others are compared with first."""
    return list(dict.fromkeys((PLAIN, *settings.kv)))


def with_cache(case: Case, cache: str) -> Case:
    """The case with a cache; engines that have no other by that name keep their own."""
    own = cache == PLAIN and case.engine != "llama.cpp"
    return replace(case, cache=None if own else cache)


def _judge_length(case: Case, settings: Long, length: int, progress: Progress) -> Iterator[Finding]:
    longer = at_length(case, length, settings.windows)
    known, failed = long_references(longer, progress)
    texts = {
        own.name: text for own, text in zip(longer.settings.corpora, corpus.corpora(case.config), strict=True)
    }
    for name, reason in failed.items():
        yield BUILD.skip(f"kld_{length}", reason.replace(name, texts[name].name), corpus=texts[name].name)
    scores = {
        cache: kept_scores(with_cache(longer, cache), known)
        for cache in _caches(settings)
        if known and cache in CACHES[case.engine]
    }
    for cache, found in scores.items():
        if found.failure:
            yield BUILD.fail(f"kld_{length}_{cache}", found.failure)
    if not scores or scores[PLAIN].failure:
        return
    for number, reference in enumerate(known):
        text = texts[reference.windows.corpus.name]
        gates = case.gates if text.gates is None else over(case.gates, text.gates)
        plain = scores[PLAIN].tokens[number]
        yield _of_weights(plain, length, text.name, gates.max_mean_kld)
        for cache, found in scores.items():
            if cache != PLAIN and not found.failure:
                yield _of_cache(
                    found.tokens[number], plain, (length, cache, text.name), settings.max_cache_kld
                )


def _of_weights(tokens: Tokens, length: int, text: str, limit: float | None) -> Finding:
    """The divergence with a cache of 16 bits: of the worst quarter, which has to keep the level's limit as short windows do."""
    buckets = by_position(tokens.kld, length)
    worst = max(buckets, key=lambda bucket: bucket.mean.value)
    gate = Gate(
        f"kld_{length}", worst.mean, limit, 1, f"mean KL divergence of the worst quarter of {length} tokens"
    )
    found = gated(gate, text, NAME)
    return found.model_copy(update={"detail": f"{found.detail}; {listed(buckets)}"})


def _of_cache(tokens: Tokens, plain: Tokens, place: tuple[int, str, str], limit: float | None) -> Finding:
    """What a cache (``place``: length, cache, text) adds to the divergence with a cache of 16 bits, on the same tokens."""
    length, cache, text = place
    values = rise(tokens, plain)
    words = f"mean KL divergence that a cache in {cache} adds at {length} tokens"
    gate = Gate(f"kld_{length}_{cache}", mean(values.astype("float64")), limit, 1, words)
    found = gated(gate, text, NAME)
    return found.model_copy(update={"detail": f"{found.detail}; {listed(by_position(values, length))}"})


def _judge_needle(case: Case, settings: Long, progress: Progress) -> Iterator[Finding]:
    theirs = ask_reference(case, _questions(case, settings, None), progress)
    before = [Hidden(**cell) for cell in theirs["cells"]]
    if not any(cell.found for cell in before):
        yield BUILD.skip("retrieval", nothing_found(before, chat=theirs["chat"]))
        return
    for cache in dict.fromkeys(settings.kv):
        if cache not in CACHES[case.engine]:
            continue
        metric = f"retrieval_{cache}"
        try:
            ours = ask_artifact(case, _questions(case, settings, with_cache(case, cache).cache), progress)
        except Unsound as reason:
            yield BUILD.fail(metric, str(reason))
        else:
            yield compare(before, [Hidden(**cell) for cell in ours["cells"]], NAME, metric)


def _questions(case: Case, settings: Long, cache: str | None) -> Questions:
    """The grid of ``validation.long``, for an artifact with a cache or (None) whatever engine it is."""
    haystack, cache_dir = corpus.corpora(case.config)[0], case.config.dataset_cache_dir
    request = {
        "lengths": settings.lengths,
        "depths": DEPTHS,
        "seed": case.config.seed,
        "corpus": haystack.model_dump(mode="json", exclude={"gates"}),
        "cache_dir": str(cache_dir) if cache_dir else None,
        "cache": cache,
    }
    known = corpus.identity(haystack)
    name = f"{NAME}-{cache}" if cache else NAME
    return Questions(name, needle_worker.ask, request, known and case.key(QUESTIONS, known, cache))
