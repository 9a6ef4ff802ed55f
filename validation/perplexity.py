"""Perplexity and divergence of an artifact beside its reference, on every held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quantool.config.schema import Config
from quantool.gates import over
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Gates, Source, Verdict
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.texts import inputs
from quantool.texts.corpus import corpora
from quantool.validation._engines.reference import REFERENCE, WHOLE, Reference, references
from quantool.validation._engines.windows import WINDOWS, scored
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._findings.limits import Gate, gated, shown
from quantool.validation._findings.statistics import Scores, summarize
from quantool.validation._score import conversion_loss
from quantool.validation._score.score_files import SCORES
from quantool.validation._score.scores import ArtifactScores, compute, compute_base, kept_scores, require

NAME = "perplexity"
BUILD = FindingBuilder(NAME)

ANOMALY_NOISE = 3.0
ANOMALY_RATIO = -0.02
"""A ln(PPL ratio) below this and below zero by ``ANOMALY_NOISE`` standard errors is too good to be true."""


def _conversion_gates(config: Config) -> Iterator[tuple[str, str]]:
    """The limits of the base, which are those of its own level."""
    for file_type, level in conversion_loss.UNQUANTIZED.items():
        yield level, str(conversion_loss.conversion_limit(file_type, config.validation.gates))


def writes(config: Config, source: Source, /) -> int:
    """The reference's hidden states of every text: a row of the model's width for each scored position."""
    settings = config.validation
    windows = settings.max_tokens // settings.context
    width = source.facts.hidden * (4 if source.facts.dtype == "F32" else 2)
    return len(corpora(config)) * windows * len(scored(settings.context)) * width


def computes(config: Config, source: Source, /) -> tuple[int, int]:
    """Every window of every text."""
    del source
    settings = config.validation
    return len(corpora(config)) * (settings.max_tokens // settings.context) * settings.context, 0


def prepare(cases: Sequence[Case], progress: Progress) -> None:
    """Score all artifacts that are not yet, those of one engine together; the reference is computed once."""
    for case in cases:
        require(case)
    compute(cases, references(cases[0], corpora(cases[0].config), progress), progress)


def compare(case: Case, progress: Progress, /) -> None:
    """Score the reference, and the base of the case."""
    compute_base(case, references(case, corpora(case.config), progress), progress)


@check(
    NAME,
    prepare=prepare,
    compare=compare,
    writes=writes,
    computes=computes,
    loads_reference=True,
    depends=WINDOWS
    | REFERENCE
    | SCORES
    | Depends(fields=("validation.corpora",), inputs=(inputs.held_out, _conversion_gates), gates=True),
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress) -> Sequence[Finding]:
    """Perplexity, KL divergence and same-top-p beside the bf16 reference, on the reference's token ids."""
    require(case)
    known = references(case, corpora(case.config), progress)
    compute([case], known, progress)
    result = kept_scores(case, known)
    if result.failure:
        return _unscorable(case, known, result)
    findings: list[Finding] = []
    for number, (reference, tokens) in enumerate(zip(known, result.tokens, strict=True)):
        corpus = reference.windows.corpus
        found = findings_of(summarize(tokens), corpus.name, merged(case.gates, corpus.gates))
        if result.bases:
            base = result.bases[number]
            losses = conversion_loss.findings_of(base, corpus.name, case.settings.gates, NAME)
            blame = conversion_loss.blame(base, losses[0])
            found = [_blaming(finding, blame) for finding in found] + losses
        findings += found
    notes = [_arithmetic(known), *_execution(known, result), *_kernels(result)]
    return [*findings, *notes, *_undivided(case, result)]


def _arithmetic(known: Sequence[Reference]) -> Finding:
    """What the reference was computed in: a processor without bfloat16 computes in float32."""
    used = ", ".join(sorted({reference.arithmetic for reference in known}))
    return BUILD.fact("arithmetic", used, note=f"the reference was computed in {used}")


def _execution(known: Sequence[Reference], result: ArtifactScores) -> list[Finding]:
    """How the models ran where that was not whole because they fit: layer by layer, or whole because they must."""
    ways = {"the reference": {reference.execution for reference in known}, "the artifact": {result.execution}}
    unusual = [(name, way) for name, used in ways.items() for way in sorted(used - {WHOLE})]
    noted = "; ".join(f"{name} ran {way}" for name, way in unusual)
    return [BUILD.fact("execution", noted, note=f"memory is short: {noted}")] if noted else []


def _kernels(result: ArtifactScores) -> list[Finding]:
    """What the engine computed with, as its log says."""
    named = ", ".join(result.kernels)
    return [BUILD.fact("kernels", named, note=f"served with {named}")] if named else []


def _unscorable(case: Case, known: Sequence[Reference], result: ArtifactScores) -> list[Finding]:
    """The findings of an artifact that cannot be scored; a base says whether the conversion is to blame."""
    reason, losses = result.failure, _undivided(case, result)
    for base, reference in zip(result.bases, known, strict=False):  # there may be no base
        losses += conversion_loss.findings_of(base, reference.windows.corpus.name, case.settings.gates, NAME)
    if result.bases:
        reason += f"; {conversion_loss.blame(result.bases[0], losses[0])}"
    return [BUILD.fail("perplexity", reason), *losses]


def _undivided(case: Case, result: ArtifactScores) -> list[Finding]:
    """Why conversion and quantization are not told apart, of a GGUF."""
    if case.engine != "llama.cpp" or result.bases:
        return []
    if result.file_type in conversion_loss.UNQUANTIZED:
        return [conversion_loss.unquantized(result.file_type, NAME)]
    return [conversion_loss.without_base(NAME)]


def _blaming(finding: Finding, blame: str) -> Finding:
    if finding.verdict is not Verdict.REGRESSION:
        return finding
    return finding.model_copy(update={"detail": f"{finding.detail}; {blame}"})


def merged(gates: Gates, own: Gates | None) -> Gates:
    """``gates`` with the fields that a corpus sets itself (None included: that gate is off)."""
    return gates if own is None else over(gates, own)


def findings_of(scores: Scores, corpus: str, gates: Gates) -> list[Finding]:
    """The findings of one corpus: perplexity, the three gated numbers, and the ones for the record."""
    ratio, share = scores.ln_ppl_ratio, scores.same_top_p
    limited = (
        Gate("ln_ppl_ratio", ratio, gates.max_ln_ppl_ratio, 1, "ln(PPL/PPL of the reference)"),
        Gate("mean_kld", scores.mean_kld, gates.max_mean_kld, 1, "mean KL divergence"),
        Gate(
            "same_top_p",
            share,
            gates.min_same_top_p,
            -1,
            "share of positions with the same most likely token",
        ),
    )
    noted = (
        Gate("kld_median", scores.kld_median, None, 1, "median KL divergence"),
        Gate("kld_99", scores.kld_99, None, 1, "99th percentile of the KL divergence"),
        Gate("kld_999", scores.kld_999, None, 1, "99.9th percentile of the KL divergence"),
        Gate("kld_max", scores.kld_max, None, 1, "largest KL divergence"),
        Gate("rms_dp", scores.rms_dp, None, 1, "RMS change of the probability of the token that came"),
    )
    ours, theirs = scores.perplexity, scores.perplexity_reference
    detail = f"{shown(ours)} beside {shown(theirs)} on {scores.tokens} tokens of {corpus}"
    perplexity = BUILD.fact("perplexity", ours.value, "", theirs.value, note=detail, corpus=corpus)
    return [
        perplexity.model_copy(update={"error": ours.error}),
        *(_judged(gate, corpus) for gate in limited),
        *(gated(gate, corpus, NAME) for gate in noted),
    ]


def _judged(gate: Gate, corpus: str) -> Finding:
    found = gated(gate, corpus, NAME)
    value, error = gate.estimate.value, gate.estimate.error
    if gate.metric == "ln_ppl_ratio" and value < ANOMALY_RATIO and value < -ANOMALY_NOISE * error:
        detail = (
            f"{found.detail}; better than the reference beyond noise, so the comparison is probably broken"
        )
        return found.model_copy(update={"verdict": Verdict.ANOMALOUS, "detail": detail})
    return found
