"""The measured figures as the Hub's ``model-index`` (hub-docs, "Model Cards", evaluation results), in few lines.

Each level gives its figures on the corpus where it is worst and its mean over all; all others stand in the card and in
``quantool.json``. Of many levels each gives less, so that the front matter stays short.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from quantool.records import Finding, OutputPlan, Report
from quantool.report.table import worst

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

KLD, TOP = "mean_kld", "same_top_p"
METRICS = {
    KLD: "mean KL divergence from the reference (nats)",
    TOP: "same most likely token as the reference",
}
TASK = "text-generation"
LINES = 44
"""Lines that the index may have: with the rest of the front matter they are no more than 60."""
DIGITS = 4  # significant ones; the errors are of that size


def model_index(
    outputs: Sequence[OutputPlan], reports: Sequence[Report], corpora: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The value of ``model-index``; empty where nothing was measured.

    ``corpora`` are the evaluation texts of the configuration by name. A figure that is no number is left out: the Hub
    refuses it.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    for metrics, mean in (((KLD, TOP), True), ((KLD,), True), ((KLD,), False), ((), True)):
        results = [result for report in reports for result in _worst(report, corpora, metrics)]
        if mean:
            results += [result for report in reports for result in _mean(report)]
        if not results:
            continue
        index: list[dict[str, Any]] = eval_results_to_model_index(outputs[0].repo, results)
        if _lines(index) <= LINES:
            break
    else:
        return []
    return index


def _lines(index: Sequence[Mapping[str, Any]]) -> int:
    """Lines as ``card.front_text`` writes them: three for a corpus, one for a figure."""
    return 3 + sum(3 + len(result["metrics"]) for entry in index for result in entry["results"])


def _worst(
    report: Report, corpora: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]
) -> Iterator[EvalResult]:
    """The figures of the corpus that the card's main table shows."""
    from huggingface_hub import EvalResult

    divergence = worst(report)
    if divergence is None or divergence.corpus is None:
        return
    text = corpora.get(divergence.corpus, {})
    for metric in metrics:
        finding = report.find(metric, divergence.corpus)
        if finding is not None and _is_number(finding):
            yield EvalResult(
                task_type=TASK,
                dataset_type=str(text.get("dataset") or divergence.corpus),
                dataset_name=divergence.corpus,
                dataset_config=text.get("config"),
                dataset_split=text.get("split") if text.get("dataset") else None,
                metric_type=metric,
                metric_name=f"{report.artifact.level}: {METRICS[metric]}",
                metric_value=_rounded(finding.measured),
            )


def _mean(report: Report) -> Iterator[EvalResult]:
    """The mean over the corpora, where there are several."""
    from huggingface_hub import EvalResult

    values = {f.corpus: float(f.measured or 0) for f in report.findings if f.metric == KLD and _is_number(f)}
    if len(values) > 1:
        yield EvalResult(
            task_type=TASK,
            dataset_type="all",
            dataset_name=f"all {len(values)} corpora",
            metric_type=KLD,
            metric_name=f"{report.artifact.level}: {METRICS[KLD]}",
            metric_value=_rounded(fmean(values.values())),
        )


def _is_number(finding: Finding) -> bool:
    return (
        finding.corpus is not None and isinstance(finding.measured, float) and math.isfinite(finding.measured)
    )


def _rounded(value: float | str | None) -> float:
    return float(f"{float(value or 0):.{DIGITS}g}")
