"""What the card of a folder says, before anything else, about artifacts that did not pass."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantool.publish.packed_folder import NOTICE
from quantool.records import Finding, Report, Verdict

TITLE = re.compile(r"\A(---\n.*?\n---\n)?\s*(# [^\n]*\n)?", re.DOTALL)


def with_notice(card: str, reports: Sequence[Report]) -> str:
    """The card with a section on what did not pass, after its title; unchanged when everything passed."""
    failed = [report for report in reports if report.verdict() is not Verdict.PASS]
    if not failed:
        return card
    lines = [
        NOTICE,
        "",
        "These artifacts did not pass their checks; only `--allow-regression` publishes them:",
        "",
        *(f"- {report.artifact.level}: {_reason(report)}" for report in failed),
        "",
    ]
    title = TITLE.match(card)
    end = title.end() if title else 0
    section = "\n".join(lines)
    return f"{card[:end]}\n{section}\n{card[end:].lstrip()}"


def _reason(report: Report) -> str:
    findings = [_finding(finding) for finding in report.findings if finding.verdict.fails]
    return f"{report.verdict()} ({'; '.join(findings) or 'nothing was judged'})"


def _finding(finding: Finding) -> str:
    where = f" on {finding.corpus}" if finding.corpus else ""
    figures = [
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in (("measured", finding.measured), ("limit", finding.threshold))
        if value is not None
    ]
    return f"{finding.metric}{where}" + (f": {', '.join(figures)}" if figures else "")
