"""The model card of a folder to publish, made from records only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import yaml

from quantool.plots import CAPTIONS
from quantool.progress import amount
from quantool.records import Finding, OutputPlan, Plan, Report, Source, Verdict
from quantool.table import HEADINGS, columns, markdown

CORPUS_METRICS = ("perplexity", "ln_ppl_ratio", "mean_kld", "same_top_p")


def write_card(
    plan: Plan, outputs: Sequence[OutputPlan], reports: Sequence[Report], plots: Sequence[str] = ()
) -> str:
    """README.md: front matter for the Hub, files with their measured figures, how they were made.

    ``plots`` are the names of pictures in the folder (``plots.draw``).
    """
    source = plan.source
    repo_id = next((output.repo_id for output in outputs if output.repo_id), None)
    parts = [
        "---\n"
        + yaml.safe_dump(front_matter(source, outputs), sort_keys=False, allow_unicode=True)
        + "---\n",
        f"# {outputs[0].repo}\n",
        _introduction(plan, reports),
        "## Files\n",
        _files(reports),
        "## Figures by corpus\n",
        corpora(reports),
        *pictures(plots),
        *checks(reports),
        *_sampling(source),
        "## Use\n",
        _usage(outputs, repo_id),
        "## How it was made\n",
        _made(plan, reports),
    ]
    return "\n".join(parts)


def _introduction(plan: Plan, reports: Sequence[Report]) -> str:
    made_by = f"made and checked by quantool {plan.versions['quantool']}"
    measured = all(report.find("mean_kld") for report in reports)
    compared = (
        "Every file was compared with the bf16 reference on held-out text; the verdicts are below."
        if measured
        else "Not every file was compared with the bf16 reference on held-out text: see the checks below."
    )
    return f"Quantized versions of {_link(plan.source)}, {made_by}. {compared}\n"


def front_matter(source: Source, outputs: Sequence[OutputPlan]) -> dict[str, Any]:
    """Metadata that the Hub reads (hub-docs, "Model Cards"); only what the source or the records say."""
    card, gguf = source.card, outputs[0].engine == "llama.cpp"
    found: dict[str, Any] = {"base_model": source.model_id if source.commit else None}
    found["base_model_relation"] = "quantized" if source.commit else None
    found |= {"license": card.license, "license_name": card.license_name, "license_link": card.license_link}
    found |= {"language": list(card.languages), "pipeline_tag": card.pipeline_tag}
    found["library_name"] = "gguf" if gguf else "transformers"
    tags = [tag for tag in card.tags if tag not in ("safetensors", "transformers")]
    found["tags"] = [*tags, *(["gguf"] if gguf else []), "quantized"]
    found["quantized_by"] = "quantool"
    return {key: value for key, value in found.items() if value not in (None, [], "")}


def _link(source: Source) -> str:
    if source.commit is None:
        return f"**{source.name}**"
    return f"[{source.model_id}](https://huggingface.co/{source.model_id}) at commit `{source.commit}`"


def _files(reports: Sequence[Report]) -> str:
    rows = [columns(report)[:-1] for report in reports]
    return markdown(HEADINGS[:-1], rows) + "\nSHA-256 of every file: `SHA256SUMS`.\n"


def corpora(reports: Sequence[Report]) -> str:
    """The table of figures by level and corpus, with what they mean."""
    heads = ["level", "corpus", "perplexity", "reference", "ln(PPL/ref)", "mean KLD", "same top-p"]
    rows = []
    for report in reports:
        for corpus in dict.fromkeys(
            f.corpus for f in report.findings if f.corpus and f.metric == "perplexity"
        ):
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
    return markdown(heads, rows) + (
        "\nPerplexity of windows of tokens, second half scored, as llama-perplexity does; KLD is the mean "
        "Kullback-Leibler divergence from the reference in nats, ± one standard error.\n"
    )


def _number(finding: Finding | None, digits: int, *, errors: bool = False) -> str:
    if finding is None or not isinstance(finding.measured, float):
        return "-"
    error = f" ± {finding.error:.{digits}f}" if errors and finding.error is not None else ""
    return f"{finding.measured:.{digits}f}{error}"


def _percent(finding: Finding | None) -> str:
    return f"{100 * finding.measured:.2f} %" if finding and isinstance(finding.measured, float) else "-"


def pictures(names: Sequence[str], folder: str = "") -> list[str]:
    """The pictures of ``plots.draw`` as Markdown; ``folder`` leads to them and ends with a slash."""
    return [f"![{CAPTIONS[name]}]({quote(folder + name)})\n" for name in names]


def checks(reports: Sequence[Report]) -> list[str]:
    """Verdicts of everything that is no figure of a corpus; failures and omissions with their reason."""
    rows, remarks = [], []
    for report in reports:
        others = [finding for finding in report.findings if finding.corpus is None]
        remarks += [
            f"- {report.artifact.level}, {finding.metric}: {finding.verdict}: {finding.detail}"
            for finding in others
            if finding.detail and (finding.verdict.fails or finding.verdict is Verdict.SKIPPED)
        ]
        by_check: dict[str, list[Finding]] = {}
        for finding in others:
            by_check.setdefault(finding.check, []).append(finding)
        rows += [
            [report.artifact.level, check, ", ".join(f"{f.metric} {f.verdict}" for f in found)]
            for check, found in by_check.items()
        ]
    if not rows:
        return []
    return [
        "## Other checks\n",
        markdown(["level", "check", "findings"], rows),
        "\n".join(dict.fromkeys(remarks)) + "\n",
    ]


def _sampling(source: Source) -> list[str]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    known = {name: source.generation[name] for name in names if source.generation.get(name) is not None}
    if not known:
        return []
    listed = ", ".join(f"{name} {value}" for name, value in known.items())
    return ["## Recommended sampling\n", f"{listed} (generation_config.json of the source).\n"]


def _usage(outputs: Sequence[OutputPlan], repo_id: str | None) -> str:
    name = outputs[0].files[0].name
    if outputs[0].engine == "llama.cpp":
        remote = f"llama-server -hf {repo_id}:{outputs[0].level}\n" if repo_id else ""
        return f"```sh\n{remote}llama-server -m {name}\n```\n"
    return f"```sh\nvllm serve {repo_id or outputs[0].repo}\n```\n"


def _made(plan: Plan, reports: Sequence[Report]) -> str:
    facts, versions = plan.source.facts, plan.versions
    lines = [
        f"- source: {_link(plan.source)}, {facts.architecture}, {amount(facts.parameters, '')} parameters, {facts.dtype}",
        f"- seed {plan.seed}; " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    for report in reports:
        details = report.artifact.details
        if details.get("base"):
            lines.append(f"- {report.artifact.level}: made from {str(details['base']).upper()}")
        if note := details.get("note"):
            lines.append(f"- {note}")
        lines += [
            f"- importance matrix: `{file.name}`, SHA-256 `{file.sha256}`" for file in report.artifact.shared
        ]
    lines.append("- plan, findings and thresholds of every check: `quantool.json`")
    return "\n".join(dict.fromkeys(lines)) + "\n"
