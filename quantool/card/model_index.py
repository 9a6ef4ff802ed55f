"""The measured figures as the Hub's ``model-index`` (hub-docs, "Model Cards", evaluation results)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantool.records import Finding, OutputPlan, Report

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

METRICS = {
    "perplexity": "perplexity",
    "ln_ppl_ratio": "ln(PPL / PPL of the reference)",
    "mean_kld": "mean KL divergence from the reference (nats)",
    "same_top_p": "same most likely token as the reference",
}
TASK = "text-generation"


def model_index(
    outputs: Sequence[OutputPlan], reports: Sequence[Report], corpora: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The value of ``model-index``; empty where nothing was measured.

    ``corpora`` are the evaluation texts of the configuration by name. A figure that is no number is left out: the Hub
    refuses it.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [result for report in reports for result in _results(report, corpora)]
    if not results:
        return []
    index: list[dict[str, Any]] = eval_results_to_model_index(outputs[0].repo, results)
    return index


def _results(report: Report, corpora: Mapping[str, Mapping[str, Any]]) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    for finding in report.findings:
        if finding.corpus is None or finding.metric not in METRICS or not _is_number(finding):
            continue
        text = corpora.get(finding.corpus, {})
        yield EvalResult(
            task_type=TASK,
            dataset_type=str(text.get("dataset") or finding.corpus),
            dataset_name=finding.corpus,
            dataset_config=text.get("config"),
            dataset_split=text.get("split") if text.get("dataset") else None,
            metric_type=finding.metric,
            metric_name=f"{report.artifact.level}: {METRICS[finding.metric]}",
            metric_value=round(float(finding.measured or 0), 6),
        )


def _is_number(finding: Finding) -> bool:
    return isinstance(finding.measured, float) and math.isfinite(finding.measured)
