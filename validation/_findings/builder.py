"""Findings of facts that are either right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantool.records import Finding, Verdict

SHOWN = 4


@dataclass(frozen=True)
class Voice:
    """Makes the findings of one check."""

    check: str

    def say(
        self, metric: str, measured: float | str | None, problem: str, reference: float | str | None = None
    ) -> Finding:
        """PASS without a ``problem``, REGRESSION with one."""
        return Finding(
            check=self.check,
            metric=metric,
            verdict=Verdict.REGRESSION if problem else Verdict.PASS,
            measured=measured,
            reference=reference,
            detail=problem,
        )

    def skip(self, metric: str, reason: str) -> Finding:
        """SKIPPED with its reason."""
        return Finding(check=self.check, metric=metric, verdict=Verdict.SKIPPED, detail=reason)


def some(entries: Sequence[str], shown: int = SHOWN) -> str:
    """The first few and how many more there are."""
    more = f" and {len(entries) - shown} more" if len(entries) > shown else ""
    return ", ".join(entries[:shown]) + more
