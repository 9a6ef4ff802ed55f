"""Numbers against their limits: what lies within its own error bar of a limit is no regression."""

from __future__ import annotations

from dataclasses import dataclass

from quantool.records import Finding, Verdict
from quantool.validation._findings.statistics import Estimate

NOISE = 2.0
"""Standard errors: a value beyond its gate by less is not a regression."""


@dataclass(frozen=True)
class Gate:
    """One gated number: ``sign`` is 1 for an upper limit, -1 for a lower one."""

    metric: str
    estimate: Estimate
    limit: float | None
    sign: int
    text: str


def gated(gate: Gate, corpus: str, check: str) -> Finding:
    """REGRESSION when the number is beyond its limit by more than ``NOISE`` standard errors, or is no number; else PASS."""
    value, error = gate.estimate.value, gate.estimate.error
    verdict, detail = Verdict.PASS, f"{gate.text}: {shown(gate.estimate)} on {corpus}"
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
    return Finding(
        check=check,
        metric=gate.metric,
        verdict=verdict,
        corpus=corpus,
        measured=value,
        error=error,
        threshold=gate.limit,
        detail=detail,
    )


def shown(estimate: Estimate) -> str:
    """The number and its error, for sentences."""
    return f"{estimate.value:.5g} ± {estimate.error:.2g}"
