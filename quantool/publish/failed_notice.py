"""``--allow-regression``: a folder with artifacts that did not pass says so in its card and its record."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from quantool.errors import PublicationError
from quantool.publish.package import CARD, RECORD, SUMS
from quantool.records import Finding, Report, Verdict, sha256_of
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import write_text

HEADING = "## Not everything passed"
BEGINNING = re.compile(r"\A(---\n.*?\n---\n)?\s*(# [^\n]*\n)?", re.DOTALL)


def allow(folder: Path, reports: Sequence[Report], progress: Progress) -> None:
    """Print what did not pass into the card, note the permission in the record, and renew both in SHA256SUMS.

    Raises PublicationError when card or record are not what packing wrote.
    """
    failed = [report for report in reports if report.verdict() is not Verdict.PASS]
    if not failed:
        return
    for report in failed:
        progress.warn(
            f"{report.artifact.output} did not pass ({report.verdict()}) and is published all the same: "
            "--allow-regression"
        )
    sums = (folder / SUMS).read_text(encoding="utf-8")
    before = {name: sha256_of(folder / name) for name in (CARD, RECORD)}
    if changed := [name for name, digest in before.items() if f"{digest}  {name}\n" not in sums]:
        raise PublicationError(
            f"{folder}: not what packing wrote: {', '.join(changed)}",
            hint="run `quantool run` again: it packages the folder anew",
        )
    write_text(folder / CARD, with_warning((folder / CARD).read_text(encoding="utf-8"), failed))
    record = json.loads((folder / RECORD).read_text(encoding="utf-8")) | {"allow_regression": True}
    write_text(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for name, digest in before.items():
        sums = sums.replace(f"{digest}  {name}\n", f"{sha256_of(folder / name)}  {name}\n")
    write_text(folder / SUMS, sums)


def with_warning(card: str, failed: Sequence[Report]) -> str:
    """The card with a section on what did not pass, after its title; a card that has it stays as it is."""
    lines = [f"- {report.artifact.level}: {_why(report)}" for report in failed]
    section = "\n".join(
        [
            HEADING,
            "",
            "Published with `--allow-regression` although these artifacts did not pass their checks:",
            "",
            *lines,
            "",
        ]
    )
    if section in card:
        return card
    found = BEGINNING.match(card)
    end = found.end() if found else 0
    return f"{card[:end]}\n{section}\n{card[end:].lstrip()}"


def _why(report: Report) -> str:
    told = [_told(finding) for finding in report.findings if finding.verdict.fails]
    return f"{report.verdict()}" + (f" ({'; '.join(told)})" if told else " (nothing was judged)")


def _told(finding: Finding) -> str:
    where = f" on {finding.corpus}" if finding.corpus else ""
    figures = [
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in (("measured", finding.measured), ("limit", finding.threshold))
        if value is not None
    ]
    return f"{finding.metric}{where}" + (f": {', '.join(figures)}" if figures else "")
