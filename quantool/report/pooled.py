"""Figures of models that make one vector or a few logits of a text, for the tables and the choice of a file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantool.records import Finding, Report
from quantool.report.finding_text import figure

FIGURES = {
    "cosine": "cosine",
    "recall_at_10": "recall@10",
    "logit_error": "logit error",
    "same_label": "same label",
    "rank_correlation": "rank correlation",
}
"""Metric to the heading of its column."""
MEANING = {
    "cosine": "cosine: the mean cosine with the embeddings of the bf16 reference, each tokenized and pooled by its own "
    "files",
    "recall_at_10": "recall@10: how many of the reference's ten nearest passages are nearest here too",
    "logit_error": "logit error: the mean squared difference of the logits from the reference's over their variance",
    "same_label": "same label: how often the most likely label is the reference's",
    "rank_correlation": "rank correlation: Kendall's tau of the orders in which eight passages are put for a query",
}


def pooled_metrics(reports: Sequence[Report]) -> list[str]:
    """The metrics that some report has; empty for models that write text."""
    return [metric for metric in FIGURES if any(report.find(metric) for report in reports)]


def worst_pooled(report: Report) -> Finding | None:
    """The first of ``FIGURES`` that the report has, on the corpus where it is worst; None for models that write text."""
    for metric in FIGURES:
        if found := [f for f in report.findings if f.metric == metric]:
            return max(found, key=lambda finding: (finding.verdict.fails, loss(finding)))
    return None


def loss(finding: Finding) -> float:
    """What a cosine or an error of logits is as a mean KLD, by the relation of ``gates.task_limits``; infinite for none."""
    value = finding.measured
    if not isinstance(value, float) or math.isnan(value):
        return math.inf
    return 4 * (1 - value) if finding.metric == "cosine" else value / 2


def shown(finding: Finding | None) -> str:
    """A figure for a table; a cosine near 1 with the digits that tell levels apart."""
    if finding is not None and finding.metric == "cosine" and isinstance(finding.measured, float):
        return f"{finding.measured:.5f}"
    return figure(finding, plain=True)


def meaning(reports: Sequence[Report]) -> str:
    """What the columns say."""
    return "; ".join(MEANING[metric] for metric in pooled_metrics(reports))
