"""The verdict of a run as files: ``report.json`` for programs, ``report.md`` for people, ``junit.xml`` for CI.

JUnit has no one schema; this is what Jenkins' (https://github.com/jenkinsci/xunit-plugin, junit-10.xsd), GitLab's
(https://docs.gitlab.com/ci/testing/unit_test_reports/) and the usual GitHub actions' readers have in common.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from quantool import __version__
from quantool.records import Finding, Report, Verdict
from quantool.report.finding_text import failures, fields, finding_name, number
from quantool.report.fitted import sentences
from quantool.report.holdings import of_reports
from quantool.report.loss_origin import losses
from quantool.report.plots import existing_plots
from quantool.report.sections import checks, corpora, pictures, unchecked
from quantool.report.table import headings, markdown, rows_of
from quantool.runtime.workspace import write_text

JSON, MARKDOWN, JUNIT = "report.json", "report.md", "junit.xml"
FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped: most control characters, lone surrogates."""


def write_report(
    reports: Sequence[Report], root: Path, folders: Sequence[Path], absent: Mapping[str, str]
) -> None:
    """Write the three files into ``root``; a file that would be the same is not touched.

    ``folders`` (``root``, or below it) are those where ``plots.draw`` was asked for pictures, ``absent`` the checks
    that did not run (``sections.not_run``).
    """
    plots = {_path_to(folder, root): existing_plots(folder) for folder in folders}
    relative = [_relative(report, root) for report in reports]
    record = as_record(relative, [path + plot for path, names in plots.items() for plot in names])
    texts = {
        JSON: json.dumps(record, indent=1, ensure_ascii=False) + "\n",
        MARKDOWN: as_markdown(reports, plots, absent),
        JUNIT: as_junit(reports, absent),
    }
    for name, text in texts.items():
        path = root / name
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)


def _relative(report: Report, root: Path) -> Report:
    """The report with its folder as seen from ``root``: an output folder that was moved says the same."""
    folder = report.artifact.folder
    if not folder.is_relative_to(root):
        return report
    artifact = report.artifact.model_copy(update={"folder": folder.relative_to(root)})
    return report.model_copy(update={"artifact": artifact})


def _path_to(folder: Path, root: Path) -> str:
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


def as_markdown(
    reports: Sequence[Report], plots: Mapping[str, tuple[str, ...]], absent: Mapping[str, str]
) -> str:
    """The verdict table, what failed, the figures by corpus, where the loss comes from and the other checks.

    ``plots`` are names of pictures by what leads to their folder (``""`` or a path that ends with a slash).
    """
    references = ", ".join(dict.fromkeys(f"`{report.reference}`" for report in reports))
    parts = [
        f"# quantool: {verdict_of(reports)}\n",
        f"Reference: {references}\n",
        *(f"{text[0].upper()}{text[1:]}.\n" for text in dict.fromkeys(r.prepared for r in reports) if text),
        markdown(headings(reports), rows_of(reports)),
        *_failed(reports),
        *(["## Figures by corpus\n", corpora(reports)] if any(r.find("perplexity") for r in reports) else []),
        *losses(reports),
        *_fitted(reports),
        *(line for path, names in plots.items() for line in pictures(names, path)),
    ]
    if held := of_reports(reports):
        parts += ["## What the artifacts hold\n", held + "\n"]
    if judged := checks(reports):
        parts += ["## Other checks\n", *judged]
    if left_out := unchecked(reports, absent):
        parts += ["## What was not checked\n", "\n".join(left_out) + "\n"]
    return "\n".join(parts)


def _fitted(reports: Sequence[Report]) -> list[str]:
    """How files whose types were chosen by measuring compare with stock levels."""
    lines = "".join(f"- {line}\n" for line in sentences(reports))
    return [f"## Types chosen by measuring\n\n{lines}"] if lines else []


def _failed(reports: Sequence[Report]) -> list[str]:
    """What failed, in short and then with its whole detail, verbatim: details hold markup, such as special tokens."""
    if not (lines := failures(reports)):
        return []
    details = [
        "\n".join([f"{report.artifact.level}: {finding.check}: {finding_name(finding)}", *fields(finding)])
        for report in reports
        for finding in report.findings
        if finding.verdict.fails
    ]
    text = "\n\n".join(["\n".join(lines), *details])
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"## What failed\n\n{fence}text\n{text}\n{fence}\n"]


def as_junit(reports: Sequence[Report], absent: Mapping[str, str]) -> str:
    """JUnit XML: one test suite an artifact, one test case a finding.

    REGRESSION and ANOMALOUS are failures of that type, SKIPPED is skipped, and so is each check that did not run
    (``absent``); each says why. An artifact that nothing could judge must not look green, so it gets a failed case of
    its own. Seconds are measured by check: its findings share them evenly.
    """
    root = ET.Element("testsuites", name="quantool")
    for report in reports:
        _suite(root, report, absent)
    for count in ("tests", "failures", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    root.set("errors", "0")
    root.set("time", f"{sum(report.seconds for report in reports):.3f}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, report: Report, absent: Mapping[str, str]) -> None:
    suite = ET.SubElement(root, "testsuite", name=_legal(report.artifact.output))
    properties = ET.SubElement(suite, "properties")
    for label, value in _properties(report).items():
        ET.SubElement(properties, "property", name=label, value=_legal(value))
    sizes = Counter(finding.check for finding in report.findings)
    names: Counter[tuple[str, str]] = Counter()
    for finding in report.findings:
        names[finding.check, finding_name(finding)] += 1
        count = names[finding.check, finding_name(finding)]
        label = finding_name(finding) if count == 1 else f"{finding_name(finding)} ({count})"
        seconds = report.check_seconds.get(finding.check, 0.0) / sizes[finding.check]
        _fill(_case(suite, report, finding.check, label, seconds), finding)
    for check, reason in absent.items():
        ET.SubElement(_case(suite, report, check, "did not run"), "skipped", message=_legal(reason))
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


def _case(suite: ET.Element, report: Report, check: str, label: str, seconds: float = 0.0) -> ET.Element:
    """A test case; the readers take what stands before the last dot of ``classname`` for a package."""
    package = report.artifact.output.replace("/", ".")
    return ET.SubElement(
        suite, "testcase", classname=_legal(f"{package}.{check}"), name=_legal(label), time=f"{seconds:.3f}"
    )


def _fill(case: ET.Element, finding: Finding) -> None:
    text = _legal("\n".join(fields(finding)))
    if finding.verdict.fails:
        message = f"{finding.verdict}: {_message(finding)}"
        ET.SubElement(case, "failure", message=_legal(message), type=finding.verdict).text = text
    elif finding.verdict is Verdict.SKIPPED:
        ET.SubElement(case, "skipped", message=_legal(finding.detail or "no reason was given"))
    elif finding.detail or finding.measured is not None:
        ET.SubElement(case, "system-out").text = text


def _message(finding: Finding) -> str:
    """One line: the first of the detail, else the measured value."""
    lines = finding.detail.strip().splitlines()
    return lines[0] if lines else f"{finding.metric} {number(finding.measured)}"


def _legal(text: str) -> str:
    r"""The text with what XML forbids written as ``\x00`` or ``\ud800``."""
    return FORBIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
