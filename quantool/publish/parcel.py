"""What may be published: a packed folder whose artifacts all passed and whose files are still what was judged.

Files that were uploaded ahead of the commit need not be there any more (``ahead``). Artifacts that did not pass go out
only when the user says so this very time; what an earlier time wrote into the folder counts for nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from quantool import __version__
from quantool.config.schema import Publish
from quantool.errors import GateError, PublicationError
from quantool.publish.package import CARD, RECORD, SUMS
from quantool.records import FileRecord, Report, Upload, Verdict, sha256_of
from quantool.report.plots import CAPTIONS
from quantool.runtime.progress import Bar, Progress

AGAIN = "run `quantool run` again: it packages the folder anew and redoes only what changed"
REHASH = "run `quantool run CONFIG --rehash`: it reads every finished file again and remakes those whose bytes changed"
HIJACKING = frozenset({"preset.ini", "template", "system", "params", ".gitignore", ".gitattributes"})
"""Names at the root that change how the Hub, llama-server or Ollama treat a repository."""


@dataclass(frozen=True)
class Parcel:
    """A folder that may be published if its files are still those of ``sums``."""

    folder: Path
    sums: Mapping[str, str]
    """SHA-256 by name, of all files but SHA256SUMS."""
    repo_ids: tuple[str, ...]
    """Where its artifacts are meant to go; more than one is a mistake."""
    private: bool | None
    """What the configuration said about it; None when nothing."""
    levels: tuple[str, ...]
    source: str
    settings: Publish = field(default_factory=Publish)
    """What the configuration said about branch, tag and so on."""
    failed: tuple[Report, ...] = ()
    """Reports of artifacts that did not pass and are to be published all the same."""
    uploads: Mapping[str, Upload] = field(default_factory=dict)
    """Files that the Hub has already and this folder no longer, by name."""

    @property
    def title(self) -> str:
        """First line of the commit's message and title of the pull request."""
        given = (self.settings.commit_message or "").strip()
        return given.splitlines()[0] if given else f"{', '.join(self.levels)} by quantool {__version__}"

    @property
    def description(self) -> str:
        """The rest of the message."""
        lines = (self.settings.commit_message or "").strip().splitlines()[1:]
        lines.append(f"Made from {self.source}.")
        if self.failed:
            levels = ", ".join(report.artifact.level for report in self.failed)
            lines.append(f"Published with --allow-regression: {levels} did not pass.")
        return "\n".join(lines).strip()


Recorded = Callable[[str, Sequence[FileRecord]], Mapping[str, Upload]]
"""Which of some files were uploaded to a repository already, by name."""


def read_parcel(
    folder: Path,
    *,
    repo_id: str | None = None,
    allow_regression: bool = False,
    recorded: Recorded | None = None,
) -> Parcel:
    """Read what ``package.pack`` wrote; the artifacts themselves are not read.

    ``recorded`` is asked for files that are gone. Raises GateError when an artifact did not pass, unless that is
    allowed, and PublicationError when the folder is not complete.
    """
    record, sums = _record(folder), _sums(folder)
    plan, reports = record["plan"], _reports(folder, record)
    failed = tuple(report for report in reports if report.verdict() is not Verdict.PASS)
    _require_passed(folder, plan, reports, allow_regression=allow_regression)
    _require_judged(folder, sums, reports, _plots(folder, record))
    repo_ids = tuple(dict.fromkeys(output["repo_id"] for output in plan["outputs"] if output["repo_id"]))
    gone = {name for name in sums if not (folder / name).is_file()}
    files = [file for report in reports for file in report.artifact.files if file.name in gone]
    target = repo_id or (repo_ids[0] if len(repo_ids) == 1 else None)
    uploads = recorded(target, files) if recorded and target and files else {}
    if missing := [name for name in sums if name in gone - uploads.keys()]:
        raise PublicationError(f"{folder}: missing: {', '.join(missing)}", hint=AGAIN)
    return Parcel(
        folder=folder,
        sums=sums,
        repo_ids=repo_ids,
        private=plan["config"].get("private"),
        levels=tuple(report.artifact.level for report in reports),
        source=reports[0].reference,
        settings=_settings(folder, plan["config"]),
        failed=failed,
        uploads=uploads,
    )


def _settings(folder: Path, config: Mapping[str, Any]) -> Publish:
    try:
        return Publish.model_validate(config.get("publish") or {})
    except ValidationError as error:
        raise PublicationError(f"{folder / RECORD}: the key publish cannot be read", hint=AGAIN) from error


def destination(parcel: Parcel, repo_id: str | None) -> str:
    """``repo_id`` when given, else the repository that the configuration named."""
    if repo_id is not None:
        return repo_id
    if len(parcel.repo_ids) != 1:
        told = (
            f"is meant for several repositories: {', '.join(parcel.repo_ids)}"
            if parcel.repo_ids
            else "names no repository"
        )
        raise PublicationError(f"{parcel.folder} {told}", hint="name it with --repo-id")
    return parcel.repo_ids[0]


def hash_files(parcel: Parcel, progress: Progress) -> tuple[FileRecord, ...]:
    """All files to publish, SHA256SUMS among them, read now; PublicationError when one is not what was judged."""
    folder, names = parcel.folder, [*sorted(parcel.sums), SUMS]
    with progress.bar(f"check {folder.name}", "B") as bar:
        here = {
            file.name: file for file in _hashed(folder, [n for n in names if n not in parcel.uploads], bar)
        }
    files = tuple(here[name] if name in here else parcel.uploads[name].file for name in names)
    changed = [file.name for file in files if file.sha256 != parcel.sums.get(file.name, file.sha256)]
    if changed:
        raise PublicationError(
            f"{folder}: not what was judged, the content differs from {SUMS}: {', '.join(changed)}",
            hint=REHASH,
        )
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if others := sorted(found - set(names)):
        progress.warn(f"{folder}: not published, no record names them: {', '.join(others)}")
    return files


def _hashed(folder: Path, names: Sequence[str], bar: Bar) -> Iterator[FileRecord]:
    sizes = {name: (folder / name).stat().st_size for name in names}
    done = 0
    for name in names:
        yield FileRecord(name=name, bytes=sizes[name], sha256=sha256_of(folder / name))
        done += sizes[name]
        bar.move(done, sum(sizes.values()))


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        plan = record["plan"]
        _ = (
            [(output["id"], output["repo_id"]) for output in plan["outputs"]],
            dict(plan["config"]),
            record["reports"],
        )
    except OSError as error:
        raise PublicationError(
            f"{folder} is no folder to publish: {RECORD}: {error.strerror}",
            hint="name one that `quantool run` made, with its quantool.json",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise PublicationError(
            f"{folder / RECORD} is damaged ({type(error).__name__}: {error})", hint=AGAIN
        ) from error
    return dict(record)


def _reports(folder: Path, record: Mapping[str, Any]) -> tuple[Report, ...]:
    """The reports, with the folder that packing left out; their verdicts are drawn anew from the findings."""
    try:
        return tuple(
            Report.model_validate(
                {key: value for key, value in entry.items() if key != "verdict"}
                | {"artifact": {**entry["artifact"], "folder": str(folder)}}
            )
            for entry in record["reports"]
        )
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise PublicationError(f"{folder / RECORD}: a report cannot be read", hint=AGAIN) from error


def _plots(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the pictures that packing drew, by name; a record of before there were any has none."""
    try:
        drawn = [FileRecord.model_validate(entry) for entry in record.get("plots", [])]
    except (ValidationError, TypeError) as error:
        raise PublicationError(f"{folder / RECORD}: plots cannot be read", hint=AGAIN) from error
    if others := [file.name for file in drawn if file.name not in CAPTIONS]:
        raise PublicationError(f"{folder / RECORD}: no plots of quantool: {', '.join(others)}", hint=AGAIN)
    return {file.name: file.sha256 for file in drawn}


def _require_passed(
    folder: Path, plan: Mapping[str, Any], reports: Sequence[Report], *, allow_regression: bool
) -> None:
    verdicts = {report.artifact.output: report.verdict() for report in reports}
    failed = [
        f"{output['id']}: not judged" for output in plan["outputs"] if output["id"] not in verdicts
    ]  # nothing allows that
    if not allow_regression:
        failed += [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict is not Verdict.PASS]
    if failed or not reports:
        told = "; ".join(dict.fromkeys(failed)) or "nothing in it was judged"
        raise GateError(
            f"{folder} is not published: {told}",
            hint=f"findings: {folder / CARD}; drop the level, change what validation.gates asks for, or publish it "
            "with a warning in the card: --allow-regression",
        )


def _sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS: hash by name. Names stay below the folder."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PublicationError(f"{folder / SUMS}: {error.strerror}", hint=AGAIN) from error
    found: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None or match[2] in found or not _is_below(match[2]):
            raise PublicationError(f"{folder / SUMS}: not a line that quantool writes: {line!r}", hint=AGAIN)
        found[match[2]] = match[1]
    if hijacking := sorted(HIJACKING & set(found)):
        raise PublicationError(
            f"{folder}: {', '.join(hijacking)} would change how the repository is used",
            hint="remove or rename it",
        )
    return found


def _is_below(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (
        not name.startswith("/")
        and "\\" not in name
        and not {"..", ".git"} & set(parts)
        and "/".join(parts) == name
    )


def _require_judged(
    folder: Path, named: Mapping[str, str], reports: Sequence[Report], plots: Mapping[str, str]
) -> None:
    """Every file to publish is a plot or one of a report, with the hash that is recorded, and none is left out."""
    judged = dict(plots) | {
        file.name: file.sha256
        for report in reports
        for file in (*report.artifact.files, *report.artifact.shared)
    }
    listed = {name: digest for name, digest in named.items() if name not in (CARD, RECORD)}
    differing = sorted(name for name in judged.keys() | listed.keys() if judged.get(name) != listed.get(name))
    if differing or not {CARD, RECORD} <= named.keys():
        told = ", ".join(differing) or f"{CARD} or {RECORD} is missing"
        raise PublicationError(f"{folder}: {SUMS} and the reports in {RECORD} disagree: {told}", hint=AGAIN)
