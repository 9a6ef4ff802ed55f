"""What the checks found, as Markdown: figures by corpus, every other check, pictures, and what nobody checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from quantool.config.schema import Config
from quantool.plugins import find
from quantool.records import Finding, Report, Verdict
from quantool.report.finding_text import figure, finding_name, number, one_line, percent, perplexity, verdict
from quantool.report.plots import CAPTIONS
from quantool.report.table import markdown

CORPUS_METRICS = ("perplexity", "ln_ppl_ratio", "mean_kld", "same_top_p")
NAMED = 6
"""Findings of a check that are named one by one; of more, those that passed are counted."""


def folded(summary: str, text: str) -> str:
    """Markdown behind a fold that a click opens; nothing for no text."""
    return f"<details><summary>{summary}</summary>\n\n{text.strip()}\n\n</details>\n" if text.strip() else ""


def corpora(reports: Sequence[Report]) -> str:
    """The table of figures by level and corpus, with what they mean; further figures behind a fold."""
    heads = ["level", "corpus", "perplexity", "reference", "ln(PPL/ref)", "mean KLD", "same top-p"]
    rows = [
        [
            report.artifact.level,
            corpus,
            *perplexity(report, corpus),
            figure(report.find("ln_ppl_ratio", corpus)),
            figure(report.find("mean_kld", corpus)),
            percent(report.find("same_top_p", corpus)),
        ]
        for report in reports
        for corpus in _scored(report)
    ]
    meaning = (
        "\nPerplexity of windows of tokens, second half scored, as llama-perplexity does, to the digits in which two on "
        "the same tokens can differ; KLD is the mean Kullback-Leibler divergence from the reference in nats; ± one "
        "standard error.\n"
    )
    return markdown(heads, rows) + meaning + _further(reports)


def _scored(report: Report) -> list[str]:
    """Corpora that have a perplexity."""
    return list(dict.fromkeys(f.corpus for f in report.findings if f.corpus and f.metric == "perplexity"))


def _further(reports: Sequence[Report]) -> str:
    """The further figures of the check that scores (quantiles of the divergence, RMS change of probability)."""
    metrics = list(
        dict.fromkeys(
            finding.metric
            for report in reports
            for finding in report.findings
            if _is_figure(report, finding) and finding.metric not in CORPUS_METRICS
        )
    )
    if not metrics:
        return ""
    rows = [
        [
            report.artifact.level,
            corpus,
            *(figure(report.find(metric, corpus)) for metric in metrics),
        ]
        for report in reports
        for corpus in _scored(report)
    ]
    table = markdown(["level", "corpus", *metrics], rows)
    return "\n" + folded("Further figures of the same tokens", table)


def _is_figure(report: Report, finding: Finding) -> bool:
    """Whether a finding belongs to the table by corpus: a number of a check that gives perplexities."""
    scoring = {found.check for found in report.findings if found.metric == "perplexity" and found.corpus}
    return bool(finding.check in scoring and finding.corpus and isinstance(finding.measured, float))


def pictures(names: Sequence[str], folder: str = "") -> list[str]:
    """The pictures of ``plots.draw`` as Markdown; ``folder`` leads to them and ends with a slash."""
    return [f"![{CAPTIONS[name]}]({quote(folder + name)})\n" for name in names]


def checks(reports: Sequence[Report]) -> list[str]:
    """Verdicts of everything that is no figure of a corpus, whatever checks there were; failures with their reason."""
    remarks, measured = [], []
    levels: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        level = report.artifact.level
        others = [finding for finding in report.findings if not _is_figure(report, finding)]
        remarks += [
            f"- {level}, {finding_name(finding)}: {finding.verdict}: {one_line(finding.detail)}"
            for finding in others
            if finding.detail and finding.verdict.fails
        ]
        by_check: dict[str, list[Finding]] = {}
        for finding in others:
            by_check.setdefault(finding.check, []).append(finding)
        for check, found in by_check.items():
            levels.setdefault((check, _summary(found)), []).append(level)
        measured += [
            [level, f.check, finding_name(f), figure(f), number(f.reference), number(f.threshold), verdict(f)]
            for f in others
            if isinstance(f.measured, float) and (f.error is not None or f.threshold is not None)
        ]
    if not levels:
        return []
    every = {report.artifact.level for report in reports}
    rows = [[check, _levels(names, every), summary] for (check, summary), names in sorted(levels.items())]
    parts = [markdown(["check", "levels", "findings"], rows)]
    if measured:
        heads = ["level", "check", "figure", "measured", "reference", "limit", "verdict"]
        parts.append(markdown(heads, measured))
    return [*parts, *(["\n".join(dict.fromkeys(remarks)) + "\n"] if remarks else [])]


def _levels(names: Sequence[str], every: set[str]) -> str:
    """The levels, or that it is all of several."""
    return "all" if len(every) > 1 and set(names) == every else ", ".join(dict.fromkeys(names))


def _summary(findings: Sequence[Finding]) -> str:
    """Findings with their verdicts; where there are many, those that passed are a number."""
    if len(findings) <= NAMED:
        return ", ".join(f"{finding_name(finding)} {finding.verdict}" for finding in findings)
    passed = sum(finding.verdict is Verdict.PASS for finding in findings)
    rest = [
        f"{finding_name(finding)} {finding.verdict}"
        for finding in findings
        if finding.verdict is not Verdict.PASS
    ]
    return ", ".join([f"{passed} PASS"] * bool(passed) + rest)


def not_run(config: Config, reports: Sequence[Report]) -> dict[str, str]:
    """Why a check left no finding at all, by its name."""
    settings = config.validation
    ran = {finding.check for report in reports for finding in report.findings}
    reasons = {}
    for check in find.names("checks"):
        if check in ran:
            continue
        if settings.checks is not None and check not in settings.checks:
            reasons[check] = "validation.checks leaves it out"
        elif getattr(settings, check, True) is None:
            reasons[check] = f"validation.{check} is not set"
        else:
            reasons[check] = "it does not concern artifacts of this kind"
    return reasons


def unchecked(reports: Sequence[Report], absent: Mapping[str, str]) -> list[str]:
    """What was skipped, with the reason and the levels, and the checks that did not run at all (``not_run``)."""
    reasons: dict[str, list[str]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.verdict is Verdict.SKIPPED:
                reason = one_line(finding.detail) or "no reason was given"
                levels = reasons.setdefault(f"{finding.check}, {finding_name(finding)}: {reason}", [])
                levels += [report.artifact.level] * (report.artifact.level not in levels)
    every = {report.artifact.level for report in reports}
    lines = [f"- {_levels(levels, every)}: {reason}" for reason, levels in reasons.items()]
    lines += [f"- {check} did not run: {reason}" for check, reason in absent.items()]
    return lines
