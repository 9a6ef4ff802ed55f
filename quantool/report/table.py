"""The verdict table, for the terminal, the card and CI summaries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quantool.records import Finding, MachineState, Plan, Report
from quantool.runtime.progress import amount

HEADINGS = (
    "file", "size", "bpw", "corpus", "perplexity", "reference", "mean KLD", "same top-p", "template", "verdict",
    "SHA-256",
)  # fmt: skip
SHOWN = 12  # hexadecimal digits of a hash; all of them stand in SHA256SUMS


def columns(report: Report) -> list[str]:
    """One row: the figures of the corpus where the divergence is worst, which is named."""
    artifact = report.artifact
    worst = _worst(report)
    corpus = worst.corpus if worst else None
    ppl, top = report.find("perplexity", corpus), report.find("same_top_p", corpus)
    first, largest = artifact.files[0], max(artifact.files, key=lambda file: file.bytes)
    return [
        first.name if first.name.endswith(".gguf") else artifact.folder.name,
        amount(artifact.bytes(), "B"),
        f"{artifact.bits_per_weight:.2f}",
        corpus or "-",
        f"{ppl.measured:.4f}" if ppl and isinstance(ppl.measured, float) else "-",
        f"{ppl.reference:.4f}" if ppl and isinstance(ppl.reference, float) else "-",
        f"{worst.measured:.5f}" if worst else "-",
        f"{100 * top.measured:.2f} %" if top and isinstance(top.measured, float) else "-",
        _template(report),
        str(report.verdict()),
        largest.sha256[:SHOWN],
    ]


def _worst(report: Report) -> Finding | None:
    """The mean KLD of the corpus that has the largest."""
    found = [f for f in report.findings if f.metric == "mean_kld" and isinstance(f.measured, float)]
    return max(found, key=lambda finding: float(finding.measured or 0), default=None)


def _template(report: Report) -> str:
    found = tuple(finding for finding in report.findings if finding.check == "chat_template")
    return str(report.model_copy(update={"findings": found}).verdict()) if found else "-"


def table(reports: Sequence[Report]) -> str:
    """The table in plain text, aligned; numbers to the right."""
    rows = [list(HEADINGS), *(columns(report) for report in reports)]
    return "\n".join(_aligned(rows, right={1, 2, 4, 5, 6, 7}))


def failures(reports: Sequence[Report]) -> str:
    """What failed, one line a finding: measured, reference, threshold, detail."""
    lines = []
    for report in reports:
        for finding in report.findings:
            if finding.verdict.fails:
                where = f" on {finding.corpus}" if finding.corpus else ""
                limit = f", limit {finding.threshold:g}" if finding.threshold is not None else ""
                measured = f" {finding.measured:.6g}" if isinstance(finding.measured, float) else ""
                lines.append(
                    f"{report.artifact.level}: {finding.verdict} in {finding.check}: {finding.metric}{where}"
                    f"{measured}{limit}. {finding.detail}".rstrip()
                )
    return "\n".join(lines)


def planned(plan: Plan, machine: MachineState) -> str:
    """The plan for people: source, outputs with sizes, stages with disk, memory and state."""
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
    lines += _aligned(rows, right={2, 3, 4})
    lines.append("")
    stages = [("stage", "writes", "peak RAM", "state")]
    stages += [
        (
            stage.name,
            amount(stage.writes, "B"),
            amount(stage.peak_ram, "B"),
            "done" if stage.name in machine.done else "to do",
        )
        for stage in plan.stages
    ]
    lines += _aligned(stages, right={1, 2})
    lines += [
        "",
        f"disk     {amount(machine.peak_disk, 'B')} to write, {amount(machine.free_disk, 'B')} free",
    ]
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
            file.write("## quantool\n\n" + markdown(HEADINGS, [columns(report) for report in reports]) + "\n")
            if said := failures(reports):
                file.write("\n".join(f"- {line}" for line in said.splitlines()) + "\n")
