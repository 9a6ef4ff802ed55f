"""A finding in words: its name, its figures with the digits that their errors allow, its verdict, why it failed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantool.records import Finding, Report, Verdict

PLAIN_DECIMALS = 6
"""Decimals up to which a figure is written out; smaller ones get an exponent."""
SHORT = 160
"""Characters of a detail that a line holds; the whole of it stands in report.md and report.json."""
WITHIN_NOISE = "within noise"
"""What the detail of a figure says that misses its limit by less than its own error."""


def finding_name(finding: Finding) -> str:
    """The metric, with the corpus in brackets when there is one."""
    return f"{finding.metric} [{finding.corpus}]" if finding.corpus else finding.metric


def decimals(error: float) -> int:
    """Decimals that a figure with this standard error deserves.

    The Particle Data Group's rule (Review of Particle Physics, Introduction 5.3): of the error's three leading digits
    100 to 354 keep two, 355 to 949 one, and 950 to 999 are rounded up to 1000, of which two are kept.
    """
    exponent = math.floor(math.log10(error))
    leading = error / 10.0**exponent
    return -exponent + (1 if leading < 3.55 else 0)


def number(value: float | str | None, error: float | None = None, *, plain: bool = False) -> str:
    """A value and ``± error`` (left out when ``plain``), both with the digits that the error allows.

    Without an error six significant digits, integers in full; ``-`` for None; text as it is.
    """
    if not isinstance(value, float):
        return value or "-"
    if error is None or not math.isfinite(value) or not math.isfinite(error) or error <= 0:
        return str(int(value)) if value.is_integer() else f"{value:.6g}"
    places = decimals(error)
    if places > PLAIN_DECIMALS:
        return _with_exponent(value, error, places, plain=plain)
    places = max(places, 0)
    return f"{value:.{places}f}" + ("" if plain else f" ± {error:.{places}f}")


def _with_exponent(value: float, error: float, places: int, *, plain: bool) -> str:
    """``8.26e-05 ± 2.7e-06``: both end at the same decimal."""
    digits = places + math.floor(math.log10(abs(value))) if value else 0
    digits_of_error = places + math.floor(math.log10(error))
    return f"{value:.{max(digits, 0)}e}" + ("" if plain else f" ± {error:.{max(digits_of_error, 0)}e}")


def figure(finding: Finding | None, *, plain: bool = False) -> str:
    """What was measured; ``-`` when nothing was."""
    return number(finding.measured, finding.error, plain=plain) if finding else "-"


def percent(finding: Finding | None, *, plain: bool = False) -> str:
    """A share as percentage; ``-`` when it was not measured."""
    if finding is None or not isinstance(finding.measured, float):
        return "-"
    error = None if finding.error is None else 100 * finding.error
    return f"{number(100 * finding.measured, error, plain=plain)} %"


def perplexity(report: Report, corpus: str | None) -> tuple[str, str]:
    """The artifact's perplexity and the reference's, on the same tokens.

    Their common error, that of the text, cancels when they are compared: their digits are those that the error of
    ln(PPL/PPL of the reference) leaves.
    """
    found, ratio = report.find("perplexity", corpus), report.find("ln_ppl_ratio", corpus)
    if found is None or not isinstance(found.measured, float):
        return "-", "-"
    error = found.measured * ratio.error if ratio is not None and ratio.error else None
    return number(found.measured, error, plain=True), number(found.reference, error, plain=True)


def verdict(finding: Finding) -> str:
    """The verdict, with the reason why a figure beyond its limit passes."""
    if finding.verdict is Verdict.PASS and WITHIN_NOISE in finding.detail:
        return f"{finding.verdict} ({WITHIN_NOISE})"
    return str(finding.verdict)


def one_line(detail: str, length: int | None = None) -> str:
    """The detail without line breaks, cut after ``length`` characters when given."""
    text = " ".join(detail.split())
    return text if length is None or len(text) <= length else f"{text[: length - 2].rstrip()} …"


def failures(reports: Sequence[Report]) -> list[str]:
    """What failed, each once in one short line: levels, verdict, check, metric, then figures and limit or the reason.

    Corpora of one metric stand in one line, levels with the same failure as well.
    """
    levels: dict[str, list[str]] = {}
    for report in reports:
        for line in _failures_of(report):
            levels.setdefault(line, []).append(report.artifact.level)
    return [f"{', '.join(dict.fromkeys(names))}: {line}" for line, names in levels.items()]


def _failures_of(report: Report) -> list[str]:
    figures: dict[str, list[str]] = {}
    for finding in report.findings:
        if finding.verdict.fails:
            text, limit = _reason(finding)
            start = f"{finding.verdict} in {finding.check}: {finding.metric}"
            figures.setdefault(f"{start}\0{limit}", []).append(text)
    lines = []
    for key, texts in figures.items():
        start, _, limit = key.partition("\0")
        lines.append(f"{start} {', '.join(text for text in dict.fromkeys(texts) if text)}".rstrip() + limit)
    return lines


def _reason(finding: Finding) -> tuple[str, str]:
    """What was measured and on which corpus; the limit, or where there is none the beginning of the detail."""
    where = f" on {finding.corpus}" if finding.corpus else ""
    measured = figure(finding) if isinstance(finding.measured, float) else ""
    if measured and finding.threshold is not None:
        return f"{measured}{where}", f", limit {finding.threshold:g}"
    lines = finding.detail.strip().splitlines()
    detail = one_line(lines[0], SHORT) if lines else ""
    return f"{measured}{where}".strip(), f": {detail}" if detail else ""


def fields(finding: Finding) -> list[str]:
    """Every field that is there, one a line, the detail last."""
    values = {
        "measured": finding.measured,
        "standard error": finding.error,
        "reference": finding.reference,
        "threshold": finding.threshold,
    }
    lines = [f"{field}: {number(value)}" for field, value in values.items() if value is not None]
    return [*lines, finding.detail] if finding.detail else lines
