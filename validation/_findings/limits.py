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


def gated(gate: Gate, corpus: str | None, check: str) -> Finding:
    """REGRESSION when the number is beyond its limit by more than ``NOISE`` standard errors, or is no number; else PASS."""
    value, error = gate.estimate.value, gate.estimate.error
    verdict, detail = Verdict.PASS, f"{gate.text}: {shown(gate.estimate)}"
    if corpus is not None:
        detail += f" on {corpus}"
    if gate.limit is not None:
        beyond = gate.sign * (value - gate.limit)
        limit = f"{'upper' if gate.sign > 0 else 'lower'} limit {gate.limit:g}"
        if not beyond <= NOISE * error:  # also when it is not a number
            verdict = Verdict.REGRESSION
            detail += f", beyond the {limit}"
            detail += " by more than two standard errors" if error else ""
        elif beyond > 0:
            detail += f", within noise of the {limit}: beyond it by less than two standard errors"
        else:
            detail += f" ({limit})"
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
