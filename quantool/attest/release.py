"""A published folder as it lies on somebody's machine: its record and SHA256SUMS, read without trust in either."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from quantool.errors import ConfigError, SourceError
from quantool.formats.json_file import JsonLimits, read_json
from quantool.ledger import Ledger
from quantool.records import Report

RECORD, SUMS, CARD = "quantool.json", "SHA256SUMS", "README.md"
CANARY, PROVENANCE, SIGNATURE = "canary.json", "provenance.json", "model.sig"
LIMITS = JsonLimits(bytes=1 << 27, values=4_000_000, unique=True)
"""Of the records of a release; a key that stands twice is read differently by every reader."""
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class ReleasedOutput:
    """One output of a release: what the plan promised of it, and its report."""

    id: str
    engine: str
    repo: str
    names: tuple[str, ...]
    """Files that the plan has for it."""
    ledger: Ledger | None
    report: Report
    verdict: str
    """As quantool.json states it, beside the findings that it follows from."""


@dataclass(frozen=True)
class Release:
    """What quantool.json says."""

    folder: Path
    plan: Mapping[str, Any]
    outputs: tuple[ReleasedOutput, ...]

    @property
    def version(self) -> str:
        """The quantool that made it."""
        return str(self.plan["versions"].get("quantool", "unknown"))

    def of_levels(self, levels: Sequence[str]) -> tuple[ReleasedOutput, ...]:
        """The outputs of ``levels``, all where there are none. Raises ConfigError for a level that no output has."""
        known = dict.fromkeys(output.report.artifact.level for output in self.outputs)
        if strange := [level for level in levels if level not in known]:
            raise ConfigError(
                f"no output of level {', '.join(strange)}", hint=f"there are {', '.join(known)}"
            )
        return tuple(
            output for output in self.outputs if not levels or output.report.artifact.level in levels
        )


def read_release(folder: Path) -> Release:
    """The release in ``folder``; ConfigError where there is none, SourceError where its record is damaged."""
    if not (folder / RECORD).is_file():
        raise ConfigError(
            f"{folder} has no {RECORD}, so nothing says what it should hold",
            hint="name a folder, a file or a repository that quantool published",
        )
    record = read_json(folder / RECORD, LIMITS)
    try:
        planned = {str(output["id"]): output for output in record["plan"]["outputs"]}
        outputs = tuple(_output(folder, planned, entry) for entry in record["reports"])
        if unjudged := planned.keys() - {output.id for output in outputs}:
            raise SourceError(f"{RECORD} has no report of {', '.join(sorted(unjudged))}")
        if len(outputs) != len({output.id for output in outputs}):
            raise SourceError(f"{RECORD} has two reports of one output")
        plan = dict(record["plan"])
        for part in ("source", "config", "versions"):
            plan[part] = dict(plan[part].items())
        return Release(folder, plan, outputs)
    except (ValidationError, LookupError, TypeError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        raise SourceError(f"{folder / RECORD} is damaged: no record of a release ({kind})") from error


def _output(folder: Path, planned: Mapping[str, Any], entry: Mapping[str, Any]) -> ReleasedOutput:
    fields = {key: value for key, value in entry.items() if key != "verdict"}
    report = Report.model_validate(fields | {"artifact": {**entry["artifact"], "folder": str(folder)}})
    output = planned[report.artifact.output]
    if not report.artifact.files:
        raise ValueError("an output without files")
    ledger = output.get("ledger")
    return ReleasedOutput(
        id=report.artifact.output,
        engine=str(output["engine"]),
        repo=str(output["repo"]),
        names=tuple(str(file["name"]) for file in output["files"]),
        ledger=None if ledger is None else Ledger.model_validate(ledger),
        report=report,
        verdict=str(entry.get("verdict")),
    )


def read_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS: hash by name. Raises SourceError when it is missing, or a line is not one that packing writes."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{SUMS} cannot be read") from error
    found: dict[str, str] = {}
    for line in lines[:-1]:
        matched = LINE.fullmatch(line)
        if matched is None or matched[2] in found or not _is_below(matched[2]):
            raise SourceError(f"{SUMS} has a line that packing does not write: {line[:80]!r}")
        found[matched[2]] = matched[1]
    if lines[-1] or list(found) != sorted(found):
        raise SourceError(f"{SUMS} is cut off, or its lines were moved")
    return found


def _is_below(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not name.startswith("/") and ".." not in parts and "/".join(parts) == name
