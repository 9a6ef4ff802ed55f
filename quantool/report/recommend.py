"""Which of several files to take when nobody has a reason of his own: the smallest that is still close to the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantool.records import Report, Verdict
from quantool.report.pooled import loss, worst_pooled
from quantool.report.table import file_name, worst

CLOSE = 0.05
"""Nats of mean KLD on the worst corpus up to which a file counts as close to its reference.

By ``gates.py``'s relation of KLD and equal first choices (1 - 0.43 sqrt(KLD)) that is nine tokens in ten. Of the
published figures of LLaMA-3-8B (llama.cpp, tools/perplexity/README.md) Q4_K_M (0.031), IQ4_XS (0.036) and Q4_K_S (0.043)
are within it, Q3_K_L (0.087) is not; smaller models need more bits for the same.
"""
USUAL = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""Where nothing was measured, the first of these that there is: llama.cpp takes Q4_K_M when nobody says."""


@dataclass(frozen=True)
class Recommendation:
    """One artifact of several, and why."""

    report: Report
    reason: str


def recommend(reports: Sequence[Report]) -> Recommendation | None:
    """The smallest artifact that passed and is ``CLOSE`` to its reference, else the closest; None when none passed."""
    passed = [report for report in reports if report.verdict() is Verdict.PASS]
    if not passed:
        return None
    by_size = sorted(passed, key=lambda report: report.artifact.bytes())
    divergence = {report.artifact.output: _divergence(report) for report in by_size}
    measured = [report for report in by_size if divergence[report.artifact.output] is not None]
    if not measured:
        levels = {report.artifact.level: report for report in reversed(by_size)}
        usual = next((levels[level] for level in USUAL if level in levels), by_size[0])
        return Recommendation(usual, "a usual choice; nothing was measured")
    close = [report for report in measured if (divergence[report.artifact.output] or 0.0) <= CLOSE]
    limit = _limit(measured[0])
    if close:
        return Recommendation(
            close[0], f"the smallest that stays close to the original ({limit} on every text)"
        )
    nearest = min(measured, key=lambda report: divergence[report.artifact.output] or 0.0)
    return Recommendation(nearest, f"the closest to the original here (none has a {limit} on every text)")


def _limit(report: Report) -> str:
    """What is close, in the figure that the report has."""
    found = worst_pooled(report)
    if found is None:
        return f"mean KLD of at most {CLOSE:g} nats"
    if found.metric == "cosine":
        return f"cosine of at least {1 - CLOSE / 4:g}"
    return f"logit error of at most {2 * CLOSE:g}"


def _divergence(report: Report) -> float | None:
    if (pooled := worst_pooled(report)) is not None:
        return loss(pooled)
    found = worst(report)
    return found.measured if found is not None and isinstance(found.measured, float) else None


def folders(reports: Sequence[Report]) -> list[str]:
    """A line for each folder to publish, with the file that its card recommends where it holds several."""
    lines = []
    for folder in dict.fromkeys(report.artifact.folder for report in reports):
        own = [report for report in reports if report.artifact.folder == folder]
        chosen = recommend(own) if len(own) > 1 else None
        lines.append(f"folder: {folder}" + (f" (recommended: {file_name(chosen.report)})" if chosen else ""))
    return lines
