"""The model card of a folder to publish, made from records only, in the order that somebody who downloads it reads.

``SECTIONS`` are its parts in order. A template of the user's own (``card.template``) may arrange them anew or replace
them: it is given the sections and the records (``user_template.VARIABLES``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from quantool.card.holdings import adapters, expert_coverage, holdings, left_out_sentence, tags_of, task_of
from quantool.card.how_to_run import usage
from quantool.card.memory_table import memory_tables, which_file
from quantool.card.model_index import model_index
from quantool.card.redact import published, published_config
from quantool.card.user_template import render_card
from quantool.config.sampling import chosen, listed, recommended
from quantool.config.schema import Config
from quantool.plugins import find
from quantool.records import Finding, OutputPlan, Plan, Report, Source
from quantool.report.fitted import choice
from quantool.report.plots import CORPORA
from quantool.report.pooled import meaning, worst_pooled
from quantool.report.sections import checks, corpora, folded, not_run, pictures, unchecked
from quantool.report.table import headings, markdown, rows_of
from quantool.runtime.progress import amount
from quantool.tasks import PIPELINE_TAGS, TaskKind

SECTIONS = (
    "title", "introduction", "choosing", "usage", "sampling", "files", "plots", "corpora", "parity", "checks",
    "memory", "made", "reproduce", "unchecked",
)  # fmt: skip
"""Names of the parts between the front matter and the end; one that has nothing to say is empty. Those that few need,
from ``corpora`` on, are folded."""

PARITY = {"tokenizer": "tokenizer", "stop_tokens": "end of text", "chat_template": "chat template"}
"""Checks of what a chat is made of, and how the card calls that."""

COMPRESSED = frozenset({"awq", "fp8", "gptq", "smoothquant"})
"""Methods that write the layout of compressed-tensors."""

LINE = 1 << 16  # characters: no list is wrapped

NOT_TO_REPRODUCE = {"repo_id", "private", "publish", "disk_bounded", "card", "cache_dir", "dataset_cache_dir"}
"""Keys of a configuration that say where things go."""


def write_card(
    plan: Plan,
    outputs: Sequence[OutputPlan],
    reports: Sequence[Report],
    plots: Sequence[str] = (),
) -> str:
    """README.md: front matter for the Hub, files with their measured figures, how to run them, how they were made.

    ``plots`` are the names of pictures in the folder (``plots.draw``). Raises ConfigError for what is wrong in the
    user's own template.
    """
    config = Config.model_validate(plan.config)
    sampling = recommended(plan.source, config)
    front = front_text(plan, outputs, reports)
    sections = _sections(plan, outputs, reports, plots, sampling)
    card = "\n".join([front, *(sections[name] for name in SECTIONS if sections[name])])
    if config.card.template is None:
        return card
    return render_card(
        config.card.template,
        {
            "front_matter": front,
            "sections": sections,
            "card": card,
            "repo": outputs[0].repo,
            "repo_id": next((output.repo_id for output in outputs if output.repo_id), None),
            "plan": published(plan),
            "outputs": [published(output) for output in outputs],
            "reports": [published(report) | {"verdict": str(report.verdict())} for report in reports],
            "plots": list(plots),
            "sampling": dict(sampling),
        },
    )


def _sections(
    plan: Plan,
    outputs: Sequence[OutputPlan],
    reports: Sequence[Report],
    plots: Sequence[str],
    sampling: Mapping[str, float | str],
) -> dict[str, str]:
    known = chosen(plan.source, Config.model_validate(plan.config))
    left_out = unchecked(reports, not_run(Config.model_validate(plan.config), reports))
    figures = corpora(reports) + "\n" + "\n".join(pictures([name for name in plots if name == CORPORA]))
    parts = {
        "title": f"# {outputs[0].repo}\n",
        "introduction": left_out_sentence(outputs) + _introduction(plan, reports),
        "choosing": "## Which file\n\n" + which_file(plan.source.facts, reports) if reports else "",
        "usage": "## How to run it\n\n" + usage(plan, outputs, reports, known),
        "sampling": f"Recommended sampling: {listed(sampling)} ({_origin(plan)}).\n" if known else "",
        "files": "## Verdicts\n\n" + _files(reports),
        "plots": "\n".join(pictures([name for name in plots if name != CORPORA])),
        "corpora": folded("Figures by corpus", figures)
        if any(report.find("perplexity") for report in reports)
        else "",
        "parity": folded("Tokenizer and chat template", _parity(reports)),
        "checks": folded("Other checks", "\n".join(checks(reports))),
        "memory": folded("Memory by context", memory_tables(plan.source.facts, reports) if reports else ""),
        "made": folded("How it was made", _made(plan, outputs, reports)),
        "reproduce": folded("How to make it again", _reproduction(plan, outputs, reports)),
        "unchecked": folded(f"What was not checked ({len(left_out)})", "\n".join(left_out)),
    }
    return {name: parts[name] for name in SECTIONS}


def _introduction(plan: Plan, reports: Sequence[Report]) -> str:
    made_by = f"made and checked by quantool {plan.versions['quantool']}"
    measured = all(report.find("mean_kld") or worst_pooled(report) for report in reports)
    one = len(reports) == 1
    if measured:
        compared = f"{'It' if one else 'Every file'} was compared with the bf16 reference on held-out text."
    else:
        which = "It was not" if one else "Not every file was"
        compared = f"{which} compared with the bf16 reference on held-out text: see the verdicts below."
    made_of = _link(plan.source) + _prepared(plan.source)
    return f"{'A quantized version' if one else 'Quantized versions'} of {made_of}, {made_by}. {compared}\n"


def front_text(plan: Plan, outputs: Sequence[OutputPlan], reports: Sequence[Report]) -> str:
    """The front matter as text, ``model-index`` at its end; a list or a figure takes one line."""
    texts = published_config(plan.config).get("validation", {}).get("corpora", [])
    found = front_matter(plan.source, outputs)
    if index := model_index(outputs, reports, {text["name"]: text for text in texts}):
        found["model-index"] = index
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, default_flow_style=None, width=LINE)
    return f"---\n{text}---\n"


def front_matter(source: Source, outputs: Sequence[OutputPlan]) -> dict[str, Any]:
    """Metadata that the Hub reads (hub-docs, "Model Cards"); only what the source or the records say."""
    card, gguf = source.card, outputs[0].engine == "llama.cpp"
    found: dict[str, Any] = {"base_model": source.model_id if source.commit else None}
    found["base_model_relation"] = "quantized" if source.commit else None
    found |= {"license": card.license, "license_name": card.license_name, "license_link": card.license_link}
    kind = source.facts.task.kind
    known = source.facts.architecture.endswith("ForCausalLM") or not source.facts.task.generates
    task = card.pipeline_tag or (PIPELINE_TAGS[kind] if known else None)
    found |= {"language": list(card.languages), "pipeline_tag": task_of(outputs, task)}
    sentences = kind is TaskKind.EMBEDDING and source.facts.task.files
    found["library_name"] = "gguf" if gguf else "sentence-transformers" if sentences else "transformers"
    tags = tags_of(outputs, [tag for tag in card.tags if tag not in ("safetensors", "transformers")])
    found["tags"] = list(dict.fromkeys([*tags, *(["gguf"] if gguf else _tags(outputs[0])), "quantized"]))
    found["quantized_by"] = "quantool"
    return {key: value for key, value in found.items() if value not in (None, [], "")}


def _tags(output: OutputPlan) -> list[str]:
    """Of a folder for transformers; AutoAWQ's layout is not that of compressed-tensors."""
    if output.method not in COMPRESSED:
        return ["vllm"]
    layout = [] if output.options.get("format") == "autoawq" else ["compressed-tensors"]
    return [output.method, *layout, "vllm"]


def _link(source: Source) -> str:
    if source.commit is None:
        return f"**{source.name}**"
    return f"[{source.model_id}](https://huggingface.co/{source.model_id}) at commit `{source.commit}`"


def _prepared(source: Source) -> str:
    return f" ({source.prepared.described()})" if source.prepared is not None else ""


def _commits(source: Source, *, apart: bool) -> dict[str, str]:
    """The keys that pin the source; ``apart``: where the adapter has a key of its own beside its base."""
    prepared = source.prepared
    if not apart or prepared is None or prepared.adapter is None:
        return {"revision": source.commit} if source.commit else {}
    commits = {"revision": prepared.origin.commit, "adapter_revision": prepared.adapter.commit}
    return {key: commit for key, commit in commits.items() if commit}


def _files(reports: Sequence[Report]) -> str:
    """One row a level, with what the figures mean."""
    heads = ["level", *headings(reports)[:-1]]
    rows = [[report.artifact.level, *row[:-1]] for report, row in zip(reports, rows_of(reports), strict=True)]
    text = markdown(heads, rows)
    for report in reports:
        shards = [file.name for file in report.artifact.files if file.name.endswith(".gguf")]
        if len(shards) > 1:
            text += f"\n{report.artifact.level} has {len(shards)} parts, all of them needed; engines are given the first.\n"
    if explained := meaning(reports):
        return f"{text}\nFigures of the worst corpus; {explained}. bpw: bits per weight. SHA-256 of every file: `SHA256SUMS`; `quantool verify` checks a download.\n"
    return text + (
        "\nFigures of the worst corpus, the one with the largest mean KLD: the mean Kullback-Leibler divergence from the "
        "bf16 reference in nats, 0 for the same predictions. bpw: bits per weight. SHA-256 of every file: `SHA256SUMS`; `quantool verify` checks a download.\n"
    )


def _parity(reports: Sequence[Report]) -> str:
    """Verdicts on tokenizer, end of text and chat template, each by level."""
    rows = []
    for report in reports:
        verdicts = {check: _verdict(report, check) for check in PARITY}
        if any(verdicts.values()):
            rows.append([report.artifact.level, *(verdicts[check] or "-" for check in PARITY)])
    if not rows:
        return ""
    return "Compared with the source's, id for id.\n\n" + markdown(["level", *PARITY.values()], rows)


def _verdict(report: Report, check: str) -> str:
    found: tuple[Finding, ...] = tuple(finding for finding in report.findings if finding.check == check)
    return str(report.model_copy(update={"findings": found}).verdict()) if found else ""


def _origin(plan: Plan) -> str:
    own = plan.config.get("validation")
    given = isinstance(own, dict) and own.get("generation")
    return "validation.generation" if given else "generation_config.json of the source"


def _shared_kind(name: str, reports: Sequence[Report]) -> str:
    """What a file is that artifacts share."""
    if name in adapters(reports):
        return "adapter"
    return "importance matrix" if name.endswith(".gguf") else "types of its tensors"


def _made(plan: Plan, outputs: Sequence[OutputPlan], reports: Sequence[Report]) -> str:
    facts, versions = plan.source.facts, _versions(plan, outputs, reports)
    lines = [
        f"- source: {_link(plan.source)}{_prepared(plan.source)}, {facts.architecture}, {amount(facts.parameters, '')} parameters, {facts.dtype}",
        f"- seed {plan.seed}; " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    lines += holdings(outputs)
    for report in reports:
        details = report.artifact.details
        if details.get("base"):
            lines.append(f"- {report.artifact.level}: made from {str(details['base']).upper()}")
        if chosen := choice(report):
            lines.append(f"- {report.artifact.level}: {chosen}")
        if note := details.get("note"):
            lines.append(f"- {note}")
        lines += [
            f"- {_shared_kind(file.name, [report])}: `{file.name}`, SHA-256 `{file.sha256}`"
            for file in report.artifact.shared
        ]
    samples = any(report.artifact.details.get("samples") for report in reports)
    if samples or any("imatrix" in output.needs for output in outputs):
        lines.append(f"- calibration: {_calibration(plan)}")
    lines += expert_coverage(reports)
    lines.append("- plan, findings and thresholds of every check: `quantool.json`")
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _calibration(plan: Plan) -> str:
    """Text, part of it, number of documents and how they were chosen."""
    config = Config.model_validate(plan.config)
    if config.dataset_path is not None:
        named = f"`{config.dataset_path.name}`"
    else:
        parts = (config.dataset_id, config.dataset_config, config.split)
        named = " ".join(f"`{part}`" for part in parts if part)
    drawn = f"shuffled with seed {config.dataset_seed}" if config.shuffle else "the first ones"
    return f"{named}, at most {config.sample_size} documents, {drawn}"


def _versions(plan: Plan, outputs: Sequence[OutputPlan], reports: Sequence[Report]) -> dict[str, str]:
    """The versions of what took part: other methods' libraries, engines and checks say nothing about these files."""
    config = Config.model_validate(plan.config)
    needs = {need for output in outputs for need in find.find_method(output.method).needs}
    compressed, gguf = "llmcompressor" in needs, any(output.engine == "llama.cpp" for output in outputs)
    tasks = any(finding.check == "lm_eval" for report in reports for finding in report.findings)
    texts = (
        config.dataset_id or config.eval_dataset or any(text.dataset for text in config.validation.corpora)
    )
    absent = {
        "llmcompressor": not compressed,
        "compressed-tensors": not compressed,
        "llama-cpp-python": not gguf,
        "llama.cpp": not gguf,
        "gguf": not gguf,
        "xllamacpp": not gguf,
        "lm_eval": not tasks,
        "datasets": not (texts or tasks or compressed),
        "huggingface-hub": plan.source.commit is None,
    }
    return {name: version for name, version in plan.versions.items() if not absent.get(name, False)}


def _reproduction(plan: Plan, outputs: Sequence[OutputPlan], reports: Sequence[Report]) -> str:
    """The configuration as YAML, pinned to the source's commit, without places of the machine."""
    kept = {key: value for key, value in published_config(plan.config).items() if key not in NOT_TO_REPRODUCE}
    kept |= _commits(plan.source, apart="adapter" in kept)
    libraries = [
        f"{name}=={version}"
        for name, version in _versions(plan, outputs, reports).items()
        if name in ("quantool", "llama-cpp-python", "transformers", "torch", "llmcompressor")
    ]
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return (
        "Save this as `job.yaml`, with the files that it names beside it, and run `quantool job.yaml`. "
        f"Versions: {', '.join(libraries)}; other compilers and processors may round differently.\n\n"
        f"```yaml\n{text}```\n"
    )
