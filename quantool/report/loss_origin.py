"""Where an artifact lost what it lost: in the tokenizer, in the conversion to GGUF, or in the quantization."""

from __future__ import annotations

from collections.abc import Sequence

from quantool.records import Report, Verdict
from quantool.report.finding_text import figure
from quantool.report.table import markdown

CONVERSION, QUANTIZATION = "conversion_kld", "quantization_kld"


def losses(reports: Sequence[Report]) -> list[str]:
    """Which of tokenizer, conversion and quantization lost what, where the checks could tell (of GGUF files)."""
    judged = [
        report for report in reports if report.find(CONVERSION) or report.find(QUANTIZATION) is not None
    ]
    if not judged:
        return []
    rows = [
        [
            report.artifact.level,
            _tokenizer(report),
            _largest(report, CONVERSION),
            _largest(report, QUANTIZATION),
            _broke(report),
        ]
        for report in judged
    ]
    return [
        "## Where the loss comes from\n",
        markdown(["level", "tokenizer", "conversion", "quantization", "broke"], rows),
        (
            "Tokenizer: ids of the source's tokenizer and of the artifact's on the same text. Conversion: mean KLD of the "
            "unquantized GGUF from the reference; quantization: of the level from that GGUF; both on the first windows of "
            "each corpus, the largest shown.\n"
        ),
    ]


def _tokenizer(report: Report) -> str:
    found = [finding for finding in report.findings if finding.check == "tokenizer"]
    failed = [finding.metric for finding in found if finding.verdict.fails]
    if failed:
        return ", ".join(dict.fromkeys(failed))
    return "same" if any(finding.verdict is Verdict.PASS for finding in found) else "-"


def _largest(report: Report, metric: str) -> str:
    """The largest of all corpora, with its error."""
    found = [
        (finding.measured, finding)
        for finding in report.findings
        if finding.metric == metric and isinstance(finding.measured, float)
    ]
    if not found:
        return "-"
    _, finding = max(found, key=lambda pair: pair[0])
    return f"{figure(finding)} ({finding.corpus})"


def _broke(report: Report) -> str:
    """What is to blame for what failed: conversion before quantization, which a broken base says nothing about."""
    broken = [
        name
        for name, failed in (
            ("tokenizer", any(f.verdict.fails for f in report.findings if f.check == "tokenizer")),
            ("conversion", any(f.verdict.fails for f in report.findings if f.metric == CONVERSION)),
        )
        if failed
    ]
    lost = [
        finding
        for finding in report.findings
        if finding.verdict is Verdict.REGRESSION
        and finding.check == "perplexity"
        and finding.metric != CONVERSION
    ]
    if lost and "conversion" not in broken:
        sound = any(f.metric == CONVERSION and f.verdict is Verdict.PASS for f in report.findings)
        unquantized = report.find(CONVERSION) is None
        broken.append(
            "quantization" if sound else "conversion" if unquantized else "conversion or quantization"
        )
    return ", ".join(broken) or "nothing"
