"""Perplexity and divergence of an artifact beside its reference, on every held-out text."""

from __future__ import annotations

from collections.abc import Sequence

from quantool.gates import over
from quantool.plugins.contract import Case, check
from quantool.records import Finding, Gates, Verdict
from quantool.runtime.progress import Progress
from quantool.texts.corpus import corpora
from quantool.validation._engines.reference import Reference, references
from quantool.validation._findings.limits import Gate, gated, shown
from quantool.validation._findings.statistics import Scores, summarize
from quantool.validation._score import conversion_loss
from quantool.validation._score.scores import Outcome, compute, outcome, require

NAME = "perplexity"

ANOMALY_NOISE = 3.0
ANOMALY_RATIO = -0.02
"""A ln(PPL ratio) below this and below zero by ``ANOMALY_NOISE`` standard errors is too good to be true."""


def prepare(cases: Sequence[Case], progress: Progress) -> None:
    """Score all artifacts that are not yet, those of one engine together; the reference is computed once."""
    for case in cases:
        require(case)
    compute(cases, references(cases[0], corpora(cases[0].config), progress), progress)


@check(NAME, prepare=prepare)
def judge(case: Case, progress: Progress) -> Sequence[Finding]:
    """Perplexity, KL divergence and same-top-p beside the bf16 reference, on the reference's token ids."""
    require(case)
    known = references(case, corpora(case.config), progress)
    compute([case], known, progress)
    scored = outcome(case, known)
    if scored.failure:
        return _unscorable(case, known, scored)
    findings: list[Finding] = []
    for number, (reference, tokens) in enumerate(zip(known, scored.tokens, strict=True)):
        corpus = reference.windows.corpus
        found = findings_of(summarize(tokens), corpus.name, merged(case.gates, corpus.gates))
        if scored.bases:
            base = scored.bases[number]
            damages = conversion_loss.findings_of(base, corpus.name, case.settings.gates, NAME)
            blame = conversion_loss.blame(base, damages[0])
            found = [_blaming(finding, blame) for finding in found] + damages
        findings += found
    return [*findings, _arithmetic(known), *_kernels(scored), *_undivided(case, scored)]


def _arithmetic(known: Sequence[Reference]) -> Finding:
    """What the reference was computed in: a processor without bfloat16 computes in float32."""
    used = ", ".join(sorted({reference.arithmetic for reference in known}))
    return Finding(
        check=NAME,
        metric="arithmetic",
        verdict=Verdict.PASS,
        measured=used,
        detail=f"the reference was computed in {used}",
    )


def _kernels(scored: Outcome) -> list[Finding]:
    """What the engine computed with, as its log says."""
    if not scored.kernels:
        return []
    named = ", ".join(scored.kernels)
    return [
        Finding(
            check=NAME, metric="kernels", verdict=Verdict.PASS, measured=named, detail=f"served with {named}"
        )
    ]


def _unscorable(case: Case, known: Sequence[Reference], scored: Outcome) -> list[Finding]:
    """The findings of an artifact that cannot be scored; a base says whether the conversion is to blame."""
    detail, damages = scored.failure, _undivided(case, scored)
    for base, reference in zip(scored.bases, known, strict=False):  # there may be no base
        damages += conversion_loss.findings_of(base, reference.windows.corpus.name, case.settings.gates, NAME)
    if scored.bases:
        detail += f"; {conversion_loss.blame(scored.bases[0], damages[0])}"
    failed = Finding(check=NAME, metric="perplexity", verdict=Verdict.REGRESSION, detail=detail)
    return [failed, *damages]


def _undivided(case: Case, scored: Outcome) -> list[Finding]:
    """Why conversion and quantization are not told apart, of a GGUF."""
    if case.engine != "llama.cpp" or scored.bases:
        return []
    if scored.file_type in conversion_loss.UNQUANTIZED:
        return [conversion_loss.unquantized(scored.file_type, NAME)]
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
    noted = {
        "kld_median": (scores.kld_median, "median KL divergence"),
        "kld_99": (scores.kld_99, "99th percentile of the KL divergence"),
        "kld_999": (scores.kld_999, "99.9th percentile of the KL divergence"),
        "kld_max": (scores.kld_max, "largest KL divergence"),
        "rms_dp": (scores.rms_dp, "RMS change of the probability of the token that came"),
    }
    ours, theirs = scores.perplexity, scores.perplexity_reference
    return [
        Finding(
            check=NAME,
            metric="perplexity",
            verdict=Verdict.PASS,
            corpus=corpus,
            measured=ours.value,
            reference=theirs.value,
            error=ours.error,
            detail=f"{shown(ours)} beside {shown(theirs)} on {scores.tokens} tokens of {corpus}",
        ),
        *(_judged(gate, corpus) for gate in limited),
        *(
            Finding(
                check=NAME,
                metric=metric,
                verdict=Verdict.PASS,
                corpus=corpus,
                measured=estimate.value,
                error=estimate.error,
                detail=f"{text}: {shown(estimate)} on {corpus}",
            )
            for metric, (estimate, text) in noted.items()
        ),
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
