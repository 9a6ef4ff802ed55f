"""What the checks found, as Markdown: figures by corpus, every other check, pictures, and what nobody checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import quote

from quantool.records import Finding, Report, Verdict
from quantool.report.plots import CAPTIONS
from quantool.report.table import markdown

CORPUS_METRICS = ("perplexity", "ln_ppl_ratio", "mean_kld", "same_top_p")
NAMED = 6
"""Findings of a check that are named one by one; of more, those that passed are counted."""


def corpora(reports: Sequence[Report]) -> str:
    """The table of figures by level and corpus, with what they mean; further figures behind a fold."""
    heads = ["level", "corpus", "perplexity", "reference", "ln(PPL/ref)", "mean KLD", "same top-p"]
    rows = []
    for report in reports:
        for corpus in _scored(report):
            ppl, ratio, kld, top = (report.find(metric, corpus) for metric in CORPUS_METRICS)
            rows.append(
                [
                    report.artifact.level,
                    corpus,
                    _number(ppl, 4),
                    f"{ppl.reference:.4f}" if ppl and isinstance(ppl.reference, float) else "-",
                    _number(ratio, 6, errors=True),
                    _number(kld, 6, errors=True),
                    _percent(top),
                ]
            )
    told = (
        "\nPerplexity of windows of tokens, second half scored, as llama-perplexity does; KLD is the mean "
        "Kullback-Leibler divergence from the reference in nats, ± one standard error.\n"
    )
    return markdown(heads, rows) + told + _folded(reports)


def _scored(report: Report) -> list[str]:
    """Corpora that have a perplexity."""
    return list(dict.fromkeys(f.corpus for f in report.findings if f.corpus and f.metric == "perplexity"))


def _folded(reports: Sequence[Report]) -> str:
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
            *(_figure(report.find(metric, corpus)) for metric in metrics),
        ]
        for report in reports
        for corpus in _scored(report)
    ]
    table = markdown(["level", "corpus", *metrics], rows)
    return f"\n<details><summary>Further figures of the same tokens</summary>\n\n{table}\n</details>\n"


def _is_figure(report: Report, finding: Finding) -> bool:
    """Whether a finding belongs to the table by corpus: a number of a check that gives perplexities."""
    scoring = {found.check for found in report.findings if found.metric == "perplexity" and found.corpus}
    return bool(finding.check in scoring and finding.corpus and isinstance(finding.measured, float))


def _number(finding: Finding | None, digits: int, *, errors: bool = False) -> str:
    if finding is None or not isinstance(finding.measured, float):
        return "-"
    error = f" ± {finding.error:.{digits}f}" if errors and finding.error is not None else ""
    return f"{finding.measured:.{digits}f}{error}"


def _figure(finding: Finding | None) -> str:
    return _value(finding.measured, finding.error, digits=4) if finding else "-"


def _percent(finding: Finding | None) -> str:
    return f"{100 * finding.measured:.2f} %" if finding and isinstance(finding.measured, float) else "-"


def pictures(names: Sequence[str], folder: str = "") -> list[str]:
    """The pictures of ``plots.draw`` as Markdown; ``folder`` leads to them and ends with a slash."""
    return [f"![{CAPTIONS[name]}]({quote(folder + name)})\n" for name in names]


def checks(reports: Sequence[Report]) -> list[str]:
    """Verdicts of everything that is no figure of a corpus, whatever checks there were; failures with their reason."""
    rows, remarks, measured = [], [], []
    for report in reports:
        others = [finding for finding in report.findings if not _is_figure(report, finding)]
        remarks += [
            f"- {report.artifact.level}, {_name(finding)}: {finding.verdict}: {_line(finding.detail)}"
            for finding in others
            if finding.detail and finding.verdict.fails
        ]
        by_check: dict[str, list[Finding]] = {}
        for finding in others:
            by_check.setdefault(finding.check, []).append(finding)
        rows += [[report.artifact.level, check, _summary(found)] for check, found in by_check.items()]
        measured += [
            [report.artifact.level, f.check, _name(f), _value(f.measured, f.error), _value(f.reference),
             _value(f.threshold), str(f.verdict)]
            for f in others
            if isinstance(f.measured, float) and (f.error is not None or f.threshold is not None)
        ]  # fmt: skip
    if not rows:
        return []
    parts = ["## Other checks\n", markdown(["level", "check", "findings"], rows)]
    if measured:
        heads = ["level", "check", "figure", "measured", "reference", "limit", "verdict"]
        parts.append(markdown(heads, measured))
    return [*parts, *(["\n".join(dict.fromkeys(remarks)) + "\n"] if remarks else [])]


def _summary(findings: Sequence[Finding]) -> str:
    """Findings with their verdicts; where there are many, those that passed are a number."""
    if len(findings) <= NAMED:
        return ", ".join(f"{_name(finding)} {finding.verdict}" for finding in findings)
    passed = sum(finding.verdict is Verdict.PASS for finding in findings)
    rest = [
        f"{_name(finding)} {finding.verdict}" for finding in findings if finding.verdict is not Verdict.PASS
    ]
    return ", ".join([f"{passed} PASS"] * bool(passed) + rest)


def _name(finding: Finding) -> str:
    return f"{finding.metric} [{finding.corpus}]" if finding.corpus else finding.metric


def _value(value: float | str | None, error: float | None = None, digits: int = 6) -> str:
    if not isinstance(value, float):
        return value or "-"
    return f"{value:.{digits}g}" + (f" ± {error:.2g}" if error is not None else "")


def _line(detail: str) -> str:
    """The detail in one line: a line break would end the entry of a list."""
    return " ".join(detail.split())


def unchecked(reports: Sequence[Report], known: Iterable[str] = ()) -> list[str]:
    """What was skipped, with the reason and the levels; ``known`` names checks of which some may not have run."""
    reasons: dict[str, list[str]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.verdict is Verdict.SKIPPED:
                said = _line(finding.detail) or "no reason was given"
                levels = reasons.setdefault(f"{finding.check}, {_name(finding)}: {said}", [])
                levels += [report.artifact.level] * (report.artifact.level not in levels)
    lines = [f"- {', '.join(levels)}: {reason}" for reason, levels in reasons.items()]
    ran = {finding.check for report in reports for finding in report.findings}
    if missing := [name for name in known if name not in ran]:
        lines.append(f"- not run: {', '.join(missing)}")
    return ["## What was not checked\n", "\n".join(lines) + "\n"] if lines else []
