"""The verdict of a run as files: ``report.json`` for programs, ``report.md`` for people, ``junit.xml`` for CI.

JUnit has no one schema; this is what Jenkins' (https://github.com/jenkinsci/xunit-plugin, junit-10.xsd), GitLab's
(https://docs.gitlab.com/ci/testing/unit_test_reports/) and the usual GitHub actions' readers have in common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from quantool import __version__
from quantool.records import Finding, Report, Verdict
from quantool.report.loss_origin import losses
from quantool.report.plots import found
from quantool.report.sections import checks, corpora, pictures, unchecked
from quantool.report.table import HEADINGS, columns, failures, markdown
from quantool.runtime.workspace import write_text

JSON, MARKDOWN, JUNIT = "report.json", "report.md", "junit.xml"
FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped: most control characters, lone surrogates."""


def write_report(reports: Sequence[Report], root: Path, folders: Sequence[Path]) -> None:
    """Write the three files into ``root``; a file that would be the same is not touched.

    ``folders`` (``root``, or below it) are those where ``plots.draw`` was asked for pictures.
    """
    plots = {_way(folder, root): found(folder) for folder in folders}
    placed = [_placed(report, root) for report in reports]
    record = as_record(placed, [way + name for way, names in plots.items() for name in names])
    texts = {
        JSON: json.dumps(record, indent=1, ensure_ascii=False) + "\n",
        MARKDOWN: as_markdown(reports, plots),
        JUNIT: as_junit(reports),
    }
    for name, text in texts.items():
        path = root / name
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)


def _placed(report: Report, root: Path) -> Report:
    """The report with its folder as seen from ``root``: an output folder that was moved says the same."""
    folder = report.artifact.folder
    if not folder.is_relative_to(root):
        return report
    artifact = report.artifact.model_copy(update={"folder": folder.relative_to(root)})
    return report.model_copy(update={"artifact": artifact})


def _way(folder: Path, root: Path) -> str:
    """What leads from ``root`` to files of ``folder``."""
    return "" if folder == root else f"{folder.relative_to(root).as_posix()}/"


def verdict_of(reports: Sequence[Report]) -> Verdict:
    """The verdict of all: PASS when every artifact has it, else the first of the worst."""
    verdicts = {report.verdict() for report in reports}
    order = (Verdict.REGRESSION, Verdict.ANOMALOUS, Verdict.SKIPPED, Verdict.PASS)
    return next((verdict for verdict in order if verdict in verdicts), Verdict.SKIPPED)


def as_record(reports: Sequence[Report], plots: Sequence[str]) -> dict[str, Any]:
    """JSON values: the overall verdict, every report with its own, names of the pictures."""
    return {
        "quantool": __version__,
        "verdict": verdict_of(reports),
        "reports": [report.model_dump(mode="json") | {"verdict": report.verdict()} for report in reports],
        "plots": list(plots),
    }


def as_markdown(reports: Sequence[Report], plots: dict[str, tuple[str, ...]]) -> str:
    """The verdict table, what failed, the figures by corpus, where the loss comes from and the other checks.

    ``plots`` are names of pictures by what leads to their folder (``""`` or a path that ends with a slash).
    """
    references = ", ".join(dict.fromkeys(f"`{report.reference}`" for report in reports))
    parts = [
        f"# quantool: {verdict_of(reports)}\n",
        f"Reference: {references}\n",
        markdown(HEADINGS, [columns(report) for report in reports]),
        *_failed(reports),
        *(["## Figures by corpus\n", corpora(reports)] if any(map(_has_figures, reports)) else []),
        *losses(reports),
        *(line for way, names in plots.items() for line in pictures(names, way)),
        *checks(reports),
        *unchecked(reports),
    ]
    return "\n".join(parts)


def _failed(reports: Sequence[Report]) -> list[str]:
    """What failed, verbatim: details hold markup, such as special tokens and templates."""
    said = failures(reports)
    if not said:
        return []
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", said)), default=0))
    return [f"## What failed\n\n{fence}text\n{said}\n{fence}\n"]


def _has_figures(report: Report) -> bool:
    return report.find("perplexity") is not None


def as_junit(reports: Sequence[Report]) -> str:
    """JUnit XML: one test suite an artifact, one test case a finding.

    REGRESSION and ANOMALOUS are failures of that type, SKIPPED is skipped; each says why. An artifact that nothing
    could judge must not look green, so it gets a failed case of its own. Seconds are those of the whole artifact:
    nobody measures single findings.
    """
    root = ET.Element("testsuites", name="quantool")
    for report in reports:
        _suite(root, report)
    for count in ("tests", "failures", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    root.set("errors", "0")
    root.set("time", f"{sum(report.seconds for report in reports):.3f}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, report: Report) -> None:
    suite = ET.SubElement(root, "testsuite", name=_legal(report.artifact.output))
    properties = ET.SubElement(suite, "properties")
    for name, value in _properties(report).items():
        ET.SubElement(properties, "property", name=name, value=_legal(value))
    names: dict[tuple[str, str], int] = {}
    for finding in report.findings:
        name = finding.metric + (f" [{finding.corpus}]" if finding.corpus else "")
        names[finding.check, name] = count = names.get((finding.check, name), 0) + 1
        case = _case(suite, report, finding.check, name if count == 1 else f"{name} ({count})")
        _tell(case, finding)
    if report.verdict() is Verdict.SKIPPED:
        case = _case(suite, report, "quantool", "verdict")
        ET.SubElement(case, "failure", message="nothing could be judged", type=Verdict.SKIPPED)
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", "0")
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    suite.set("time", f"{report.seconds:.3f}")


def _properties(report: Report) -> dict[str, str]:
    largest = max(report.artifact.files, key=lambda file: file.bytes)
    return {
        "verdict": str(report.verdict()),
        "reference": report.reference,
        "bytes": str(report.artifact.bytes()),
        "bits_per_weight": f"{report.artifact.bits_per_weight:.4f}",
        "file": largest.name,
        "sha256": largest.sha256,
    }


def _case(suite: ET.Element, report: Report, check: str, name: str) -> ET.Element:
    """A test case; the readers take what stands before the last dot of ``classname`` for a package."""
    package = report.artifact.output.replace("/", ".")
    return ET.SubElement(
        suite, "testcase", classname=_legal(f"{package}.{check}"), name=_legal(name), time="0"
    )


def _tell(case: ET.Element, finding: Finding) -> None:
    if finding.verdict.fails:
        message = f"{finding.verdict}: {_summary(finding)}"
        failure = ET.SubElement(case, "failure", message=_legal(message), type=finding.verdict)
        failure.text = _legal(_figures(finding))
    elif finding.verdict is Verdict.SKIPPED:
        ET.SubElement(case, "skipped", message=_legal(finding.detail or "no reason was given"))
    elif finding.detail or finding.measured is not None:
        ET.SubElement(case, "system-out").text = _legal(_figures(finding))


def _summary(finding: Finding) -> str:
    """One line: the first of the detail, else the measured value."""
    lines = finding.detail.strip().splitlines()
    return lines[0] if lines else f"{finding.metric} {_value(finding.measured)}"


def _figures(finding: Finding) -> str:
    """Every field that is there, one a line, the detail last."""
    fields = {
        "measured": finding.measured,
        "standard error": finding.error,
        "reference": finding.reference,
        "threshold": finding.threshold,
    }
    lines = [f"{name}: {_value(value)}" for name, value in fields.items() if value is not None]
    return "\n".join([*lines, finding.detail] if finding.detail else lines)


def _value(value: float | str | None) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.6g}"  # a count in full
    return str(value)


def _legal(text: str) -> str:
    r"""The text with what XML forbids written as ``\x00`` or ``\ud800``."""
    return FORBIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
