"""Findings of one check, made of facts: what is right, what is wrong and why, what is left out and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from quantool.records import Finding, Verdict

SHOWN = 4
FOLDERS = re.compile(r"(?<![\w:/.<])/(?:[^\s/:'\"<>|=,;()]+/)+")


@dataclass(frozen=True)
class FindingBuilder:
    """Makes the findings of one check."""

    check: str

    def fact(
        self,
        metric: str,
        measured: float | str | None,
        problem: str = "",
        reference: float | str | None = None,
        *,
        note: str = "",
        corpus: str | None = None,
    ) -> Finding:
        """PASS without a ``problem``, REGRESSION with one; a ``note`` is said in both cases."""
        return Finding(
            check=self.check,
            metric=metric,
            verdict=Verdict.REGRESSION if problem else Verdict.PASS,
            corpus=corpus,
            measured=measured,
            reference=reference,
            detail="; ".join(filter(None, (problem, note))),
        )

    def equal(self, metric: str, measured: object, reference: object, problem: str = "") -> Finding:
        """PASS where both are the same, REGRESSION (for the ``problem``, if there is more to say) where not."""
        same = measured == reference
        return Finding(
            check=self.check,
            metric=metric,
            verdict=Verdict.PASS if same else Verdict.REGRESSION,
            measured=str(measured),
            reference=str(reference),
            detail="" if same else problem,
        )

    def fail(self, metric: str, reason: str, *, corpus: str | None = None) -> Finding:
        """REGRESSION of what could not even be measured."""
        return self.fact(metric, None, reason, corpus=corpus)

    def skip(
        self, metric: str, reason: str, *, corpus: str | None = None, measured: float | None = None
    ) -> Finding:
        """SKIPPED with its reason."""
        return Finding(
            check=self.check,
            metric=metric,
            verdict=Verdict.SKIPPED,
            corpus=corpus,
            measured=measured,
            detail=reason,
        )


def without_folders(text: str, *known: Path) -> str:
    """What an engine said, with names in the place of absolute paths: a finding is published, this machine's folders are not.

    ``known`` are folders that may have spaces in their names.
    """
    for folder in known:
        text = text.replace(f"{folder}/", "")
    return FOLDERS.sub("", text)
