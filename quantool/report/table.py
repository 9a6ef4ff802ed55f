"""The verdict table, for the terminal, the card and CI summaries."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from quantool.records import Finding, MachineState, Plan, Report
from quantool.report.finding_text import failures, figure, percent, perplexity
from quantool.report.holdings import of_outputs
from quantool.report.pooled import FIGURES, pooled_metrics, shown, worst_pooled
from quantool.runtime.progress import amount, span

HEADINGS = (
    "file", "size", "bpw", "worst corpus", "perplexity", "reference", "mean KLD", "same top-p", "template", "verdict",
    "SHA-256",
)  # fmt: skip
NUMBERS = frozenset({"size", "bpw", "perplexity", "reference", "mean KLD", "same top-p", *FIGURES.values()})
"""Columns whose cells end at the same place."""
DISPENSABLE = (
    "SHA-256", "template", "reference", "perplexity", "worst corpus", "bpw", "same top-p", "mean KLD",
)  # fmt: skip
"""Columns that a narrow terminal goes without, the first ones first."""
SHORTEST = 12  # characters that are left of a file's name
SHOWN = 12  # hexadecimal digits of a hash; all of them stand in SHA256SUMS


def headings(reports: Sequence[Report]) -> tuple[str, ...]:
    """The columns of a table: ``HEADINGS``, or those of models that make vectors or logits of a text."""
    metrics = pooled_metrics(reports)
    return (*HEADINGS[:4], *(FIGURES[metric] for metric in metrics), *HEADINGS[-2:]) if metrics else HEADINGS


def columns(report: Report, metrics: Sequence[str] = ()) -> list[str]:
    """One row: the figures of the corpus where the divergence is worst, which is named.

    ``metrics`` are those of models that make vectors or logits of a text, where that is what the table is about.
    """
    artifact = report.artifact
    divergence = worst_pooled(report) if metrics else worst(report)
    corpus = divergence.corpus if divergence else None
    largest = max(artifact.files, key=lambda file: file.bytes)
    if metrics:
        figures = [shown(report.find(metric, corpus)) for metric in metrics]
    else:
        figures = [
            *perplexity(report, corpus),
            figure(divergence, plain=True),
            percent(report.find("same_top_p", corpus), plain=True),
            _template(report),
        ]
    return [
        file_name(report),
        amount(artifact.bytes(), "B"),
        f"{artifact.bits_per_weight:.2f}",
        corpus or "-",
        *figures,
        str(report.verdict()),
        largest.sha256[:SHOWN],
    ]


def rows_of(reports: Sequence[Report]) -> list[list[str]]:
    """The rows below ``headings``."""
    metrics = pooled_metrics(reports)
    return [columns(report, metrics) for report in reports]


def file_name(report: Report) -> str:
    """What engines are given: the GGUF file (the first of several), or the folder."""
    first = report.artifact.files[0].name
    return first if first.endswith(".gguf") else report.artifact.folder.name


def worst(report: Report) -> Finding | None:
    """The mean KLD of the corpus where it is largest; one that failed or is no number is worse than any other."""
    found = [f for f in report.findings if f.metric == "mean_kld" and isinstance(f.measured, float)]
    return max(found, key=_badness, default=None)


def _badness(finding: Finding) -> tuple[bool, float]:
    value = float(finding.measured or 0)
    return finding.verdict.fails, math.inf if math.isnan(value) else value


def _template(report: Report) -> str:
    found = tuple(finding for finding in report.findings if finding.check == "chat_template")
    return str(report.model_copy(update={"findings": found}).verdict()) if found else "-"


def terminal_width() -> int | None:
    """Columns of the terminal that shows standard output, or what COLUMNS says; None when neither is there."""
    if os.environ.get("COLUMNS", "").isdecimal() or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def table(reports: Sequence[Report], width: int | None = None) -> str:
    """The table in plain text, aligned; numbers to the right.

    ``width`` is the longest line that there is room for: columns are left out (``DISPENSABLE``), then names of files
    shortened, until they fit.
    """
    rows = [list(headings(reports)), *rows_of(reports)]
    dispensable = [name for name in DISPENSABLE if name in rows[0]]
    while width is not None and dispensable and _total(rows) > width:
        left_out = rows[0].index(dispensable.pop(0))
        rows = [row[:left_out] + row[left_out + 1 :] for row in rows]
    if width is not None and (excess := _total(rows) - width) > 0:
        longest = max(SHORTEST, max(len(row[0]) for row in rows) - excess)
        rows = [[_shortened(row[0], longest), *row[1:]] for row in rows]
    return "\n".join(_aligned(rows, right={i for i, head in enumerate(rows[0]) if head in NUMBERS}))


def _total(rows: Sequence[Sequence[str]]) -> int:
    return max(map(len, _aligned(rows, right={len(rows[0]) - 1})))


def _shortened(name: str, length: int) -> str:
    """A name without its middle: the beginning says the model, the end the level."""
    if len(name) <= length:
        return name
    end = 2 * (length - 1) // 3
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"


def planned(plan: Plan, machine: MachineState, width: int | None = None) -> str:
    """The plan for people: source, outputs with sizes, stages with disk, memory and state.

    ``width`` is the longest line that there is room for: names of files are shortened until they fit.
    """
    facts = plan.source.facts
    lines = [
        f"source   {plan.source.label()}",
        f"model    {facts.architecture}, {amount(facts.parameters, '')} parameters, {facts.dtype}",
        f"         context {facts.context}, vocabulary {facts.vocabulary}",
        "",
    ]
    heads = ("output", "file", "bytes", "bpw", "peak RAM", "state")
    rows = [heads] + [
        (
            output.id,
            f"{output.repo}/{file.name}",
            f"{file.bytes:,}",
            f"{output.bits_per_weight:.2f}" if output.bits_per_weight else "-",
            amount(output.peak_ram, "B"),
            "done" if output.id in machine.done else "to do",
        )
        for output in plan.outputs
        for file in output.files
    ]
    if width is not None and (excess := _total(rows) - width) > 0:
        longest = max(SHORTEST, max(len(row[1]) for row in rows) - excess)
        rows = [(row[0], _shortened(row[1], longest), *row[2:]) for row in rows]
    lines += _aligned(rows, right={2, 3, 4})
    lines += ["", *(f"holds    {statement} ({ids})" for ids, statement in of_outputs(plan.outputs)), ""]
    stages = [("stage", "writes", "peak RAM", "time", "state")]
    stages += [
        (
            stage.name,
            amount(stage.writes, "B"),
            amount(stage.peak_ram, "B"),
            span(machine.seconds.get(stage.name, 0.0)),
            "done" if stage.name in machine.done else "to do",
        )
        for stage in plan.stages
    ]
    lines += _aligned(stages, right={1, 2, 3})
    waiting = [stage for stage in plan.stages if stage.name not in machine.done]
    highest = max((stage.peak_ram for stage in waiting), default=0)
    lines += [
        "",
        f"time     about {span(sum(machine.seconds.get(stage.name, 0.0) for stage in waiting))} on this machine",
        *(f"         without that of the check {name}: {why}" for name, why in machine.untimed.items()),
        f"memory   {amount(highest, 'B')} needed at most, {amount(machine.ram, 'B')} here",
        f"disk     {amount(machine.peak_disk, 'B')} to write, {amount(machine.free_disk, 'B')} free",
    ]
    if machine.engines:
        lines.append("engines  " + ", ".join(f"{name} {place}" for name, place in machine.engines.items()))
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join('---' for _ in heads)}|"]
    lines += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def write_step_summary(reports: Sequence[Report]) -> None:
    """Append the table to the file that GitHub Actions shows, when it names one."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("## quantool\n\n" + markdown(headings(reports), rows_of(reports)) + "\n")
            file.writelines(f"- {line}\n" for line in failures(reports))
