"""Perplexity and divergence of an artifact beside its reference, on every held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantool import __version__, process
from quantool.corpus import corpora
from quantool.errors import ConfigError, QuantizationError
from quantool.gates import over
from quantool.progress import Progress
from quantool.records import Finding, Gates, Verdict, fingerprint
from quantool.registry import Case, check
from quantool.validation._reference import Reference, references
from quantool.validation._scores import Estimate, Scores, Tokens, summarize

NAME = "perplexity"

WORKERS = {
    "llama.cpp": ("quantool.validation._llamacpp:score", ("llama-cpp-python", "torch")),
    "transformers": ("quantool.validation._transformers:score", ("torch", "transformers")),
}
"""Engine to worker and the libraries whose versions its scores depend on."""

NOISE = 2.0
"""Standard errors: a value beyond its gate by less is not a regression."""
ANOMALY_NOISE = 3.0
ANOMALY_RATIO = -0.02
"""A ln(PPL ratio) below this and below zero by ``ANOMALY_NOISE`` standard errors is too good to be true."""


class _WorkerError(QuantizationError):
    """The worker ended without an answer."""


@check(NAME)
def judge(case: Case, progress: Progress) -> Sequence[Finding]:
    """Perplexity, KL divergence and same-top-p beside the bf16 reference, on the reference's token ids."""
    if case.engine not in WORKERS:
        raise ConfigError(
            f"{case.name}: no engine {case.engine!r} to score with; known: {', '.join(WORKERS)}"
        )
    if not case.artifact.exists():
        raise ConfigError(f"artifact not found: {case.artifact}")
    known = references(case, corpora(case.config), progress)
    scored = _scores(case, known, progress)
    if isinstance(scored, str):
        return [Finding(check=NAME, metric="perplexity", verdict=Verdict.REGRESSION, detail=scored)]
    findings: list[Finding] = []
    for reference, tokens in zip(known, scored, strict=True):
        corpus = reference.windows.corpus
        findings += findings_of(summarize(tokens), corpus.name, merged(case.gates, corpus.gates))
    return findings


def merged(gates: Gates, own: Gates | None) -> Gates:
    """``gates`` with the fields that a corpus sets itself (None included: that gate is off)."""
    return gates if own is None else over(gates, own)


def _scores(case: Case, known: Sequence[Reference], progress: Progress) -> list[Tokens] | str:
    """Scores of the artifact on each corpus, recalled or computed; or why it cannot be scored."""
    _, libraries = WORKERS[case.engine]
    stamp = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(case)]
    versions = [__version__, *(version(library) for library in libraries)]
    keys = [fingerprint(reference.key, stamp, case.engine, versions) for reference in known]
    names = [f"scores/{case.name}/{reference.windows.corpus.name}" for reference in known]
    files = [_file(case, reference) for reference in known]
    missing = [
        number for number in range(len(known)) if case.workspace.recall(names[number], keys[number]) is None
    ]
    if missing:
        failure = _compute(
            case, [known[number] for number in missing], [files[number] for number in missing], progress
        )
        if failure:
            return failure
        for number in missing:
            case.workspace.keep(names[number], keys[number], [files[number]], {})
    return [Tokens.load(path) for path in files]


def _compute(case: Case, known: list[Reference], outputs: list[Path], progress: Progress) -> str | None:
    """Run the worker; returns why the artifact cannot be scored, or None when ``outputs`` are written."""
    worker, _ = WORKERS[case.engine]
    device = case.config.device or "auto"
    request: dict[str, Any] = {
        "models": [str(case.artifact)],
        "outputs": [[str(path) for path in outputs]],
        "windows": [str(reference.windows.path) for reference in known],
        "hidden": [str(reference.hidden) for reference in known],
        "source": str(case.source.folder),
        "head": known[0].head.fields(),
        "tokens": known[0].windows.vocabulary,
        "context": case.config.validation.context,
        "gpu": device == "cuda",
        "device": device,
        "trust_remote_code": case.source.trust_remote_code,
    }
    log = case.workspace.logs / f"{case.name.replace('/', '-')}.perplexity.log"
    with progress.bar(f"score {case.name}", "tok") as bar:
        try:
            answer = process.call(worker, request, log=log, bar=bar, failure=_WorkerError)
        except _WorkerError as error:
            # llama.cpp aborts on a file that breaks its assumptions; anything else (memory) says nothing about the file.
            if "SIGABRT" in error.message or "SIGSEGV" in error.message:
                return f"{case.engine} crashes on it: {error.message}\n{error.hint}"
            raise
    failure: str | None = answer["failures"][0]
    return failure


def _files(case: Case) -> list[Path]:
    """All files of the artifact; of a split GGUF every shard."""
    if case.artifact.is_dir():
        return sorted(path for path in case.artifact.rglob("*") if path.is_file())
    stem, _, total = case.artifact.stem.rpartition("-00001-of-")
    pattern = f"{stem}-?????-of-{total}.gguf" if stem else case.artifact.name
    return sorted(case.artifact.parent.glob(pattern))


def _file(case: Case, reference: Reference) -> Path:
    return case.workspace.work / "scores" / case.name / f"{reference.windows.corpus.name}.npz"


@dataclass(frozen=True)
class _Gate:
    """One gated number: ``sign`` is 1 for an upper limit, -1 for a lower one."""

    metric: str
    estimate: Estimate
    limit: float | None
    sign: int
    text: str


def findings_of(scores: Scores, corpus: str, gates: Gates) -> list[Finding]:
    """The findings of one corpus: perplexity, the three gated numbers, and the ones for the record."""
    ratio, share = scores.ln_ppl_ratio, scores.same_top_p
    gated = (
        _Gate("ln_ppl_ratio", ratio, gates.max_ln_ppl_ratio, 1, "ln(PPL/PPL of the reference)"),
        _Gate("mean_kld", scores.mean_kld, gates.max_mean_kld, 1, "mean KL divergence"),
        _Gate(
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
            detail=f"{_shown(ours)} beside {_shown(theirs)} on {scores.tokens} tokens of {corpus}",
        ),
        *(_gated(gate, corpus) for gate in gated),
        *(
            Finding(
                check=NAME,
                metric=metric,
                verdict=Verdict.PASS,
                corpus=corpus,
                measured=estimate.value,
                error=estimate.error,
                detail=f"{text}: {_shown(estimate)} on {corpus}",
            )
            for metric, (estimate, text) in noted.items()
        ),
    ]


def _gated(gate: _Gate, corpus: str) -> Finding:
    value, error = gate.estimate.value, gate.estimate.error
    verdict, detail = Verdict.PASS, f"{gate.text}: {_shown(gate.estimate)} on {corpus}"
    if gate.limit is not None:
        beyond = gate.sign * (value - gate.limit)
        side = "upper" if gate.sign > 0 else "lower"
        if not beyond <= NOISE * error:  # also when it is not a number
            verdict = Verdict.REGRESSION
            detail += f", beyond the {side} limit {gate.limit:g}"
        elif beyond > 0:
            detail += f", beyond the {side} limit {gate.limit:g} but within two standard errors of it"
        else:
            detail += f" ({side} limit {gate.limit:g})"
    if gate.metric == "ln_ppl_ratio" and value < ANOMALY_RATIO and value < -ANOMALY_NOISE * error:
        verdict = Verdict.ANOMALOUS
        detail += "; better than the reference beyond noise, so the comparison is probably broken"
    return Finding(
        check=NAME,
        metric=gate.metric,
        verdict=verdict,
        corpus=corpus,
        measured=value,
        error=error,
        threshold=gate.limit,
        detail=detail,
    )


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.5g} ± {estimate.error:.2g}"
