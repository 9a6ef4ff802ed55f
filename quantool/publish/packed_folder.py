"""A folder that packing wrote: what it holds, whether that may be published, and its files as they are sent."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from quantool import __version__
from quantool.attest.release import CANARY, PROVENANCE, SIGNATURE
from quantool.card.modelfile import MODELFILE
from quantool.config.schema import Publish
from quantool.errors import ConfigError, GateError, PublicationError
from quantool.records import FileRecord, Report, Verdict, sha256_of
from quantool.report.plots import CAPTIONS
from quantool.runtime.progress import Progress

RECORD = "quantool.json"
SUMS = "SHA256SUMS"
CARD = "README.md"
AGAIN = "run `quantool run` again: it packages the folder anew and redoes only what changed"
REHASH = "run `quantool run CONFIG --rehash`: it reads every finished file again and remakes those whose bytes changed"
NOTICE = "## Not everything passed"
"""Heading in the card of a folder with an artifact that did not pass."""
HIJACKING = frozenset({"preset.ini", "template", "system", "params", ".gitignore", ".gitattributes"})
"""Names at the root that change how the Hub, llama-server or Ollama treat a repository."""
UNRECORDED = frozenset({CARD, RECORD, CANARY, PROVENANCE})
"""What packing writes besides pictures and the Modelfile; no record holds its hash."""
HEAVY = 10_000_000
"""Bytes from which the Hub takes a file as a large one only."""
HEAVY_ENDS = (".gguf", ".safetensors")


@dataclass(frozen=True)
class PackedFolder:
    """A folder that packing wrote, as its record and SHA256SUMS have it."""

    folder: Path
    sums: Mapping[str, str]
    """SHA-256 by name, of all files but SHA256SUMS."""
    reports: tuple[Report, ...]
    repo_ids: tuple[str, ...]
    """Where its artifacts are meant to go; more than one is a mistake."""
    private: bool | None
    """What the configuration said about it; None when nothing."""
    settings: Publish = field(default_factory=Publish)
    """What the configuration said about branch, tag and so on."""
    uploaded: frozenset[str] = frozenset()
    """Names of files that the Hub has already and this folder no longer."""

    @property
    def failed(self) -> tuple[Report, ...]:
        """Reports of artifacts that did not pass."""
        return tuple(report for report in self.reports if report.verdict() is not Verdict.PASS)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of files that are not there (any more)."""
        return tuple(name for name in self.sums if not (self.folder / name).is_file())

    @property
    def title(self) -> str:
        """First line of the commit's message and title of the pull request."""
        given = (self.settings.commit_message or "").strip()
        levels = ", ".join(report.artifact.level for report in self.reports)
        return given.splitlines()[0] if given else f"{levels} by quantool {__version__}"

    @property
    def description(self) -> str:
        """The rest of the message."""
        lines = (self.settings.commit_message or "").strip().splitlines()[1:]
        lines.append(f"Made from {self.reports[0].reference}.")
        if self.failed:
            levels = ", ".join(report.artifact.level for report in self.failed)
            lines.append(f"Published with --allow-regression: {levels} did not pass.")
        return "\n".join(lines).strip()


@dataclass(frozen=True)
class OutgoingFile:
    """A file to publish. Of a small one the very bytes are kept that were hashed: they are what is sent."""

    record: FileRecord
    content: bytes | None = None
    path: Path | None = None
    """Where a large one lies; None when it was uploaded and deleted."""

    def git_hash(self) -> str | None:
        """The name that git gives its content (gitformat-loose: SHA-1 over a header and the bytes)."""
        content = self.path.read_bytes() if self.content is None and self.path is not None else self.content
        return None if content is None else git_hash(content)

    @property
    def name(self) -> str:
        """Below the folder, and in the repository."""
        return self.record.name

    @property
    def is_heavy(self) -> bool:
        """Whether it is sent alone, to the Hub's storage of large files."""
        return self.record.bytes >= HEAVY or self.name.endswith(HEAVY_ENDS)


def git_hash(content: bytes) -> str:
    """The name that git gives a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read_packed_folder(folder: Path) -> PackedFolder:
    """Read what packing wrote; the artifacts themselves are not read. PublicationError when it is damaged."""
    return packed_folder(folder, _record(folder), _sums(folder))


def packed_folder(folder: Path, record: Mapping[str, Any], sums: Mapping[str, str]) -> PackedFolder:
    """The folder with this quantool.json and SHA256SUMS; PublicationError when the two do not agree."""
    plan, reports = record["plan"], _reports(folder, record)
    unjudged = {output["id"] for output in plan["outputs"]} - {report.artifact.output for report in reports}
    if unjudged or not reports:
        names = "; ".join(f"{name}: not judged" for name in sorted(unjudged))
        raise _refusal(folder, names or "nothing in it was judged")
    _require_judged(folder, sums, reports, _plots(folder, record) | _modelfile(folder, record))
    return PackedFolder(
        folder=folder,
        sums=sums,
        reports=reports,
        repo_ids=tuple(dict.fromkeys(output["repo_id"] for output in plan["outputs"] if output["repo_id"])),
        private=plan["config"].get("private"),
        settings=_settings(folder, plan["config"]),
    )


def require_publishable(packed: PackedFolder, *, allow_regression: bool) -> None:
    """GateError when an artifact did not pass, unless that is allowed this very time and the card says so."""
    if not packed.failed:
        return
    if not allow_regression:
        verdicts = [f"{report.artifact.output}: {report.verdict()}" for report in packed.failed]
        raise _refusal(packed.folder, "; ".join(verdicts))
    if NOTICE not in (packed.folder / CARD).read_text(encoding="utf-8", errors="replace"):
        raise PublicationError(f"{packed.folder / CARD} does not say what did not pass", hint=AGAIN)


def _refusal(folder: Path, why: str) -> GateError:
    return GateError(
        f"{folder} is not published: {why}",
        hint=f"findings: {folder / CARD}; drop the level, change what validation.gates asks for, or publish it "
        "with a warning in the card: --allow-regression",
    )


def destination(packed: PackedFolder, repo_id: str | None) -> str:
    """``repo_id`` when given, else the repository that the configuration named."""
    if repo_id is not None:
        return repo_id
    if len(packed.repo_ids) != 1:
        why = (
            f"is meant for several repositories: {', '.join(packed.repo_ids)}"
            if packed.repo_ids
            else "names no repository"
        )
        raise ConfigError(f"{packed.folder} {why}", hint="name it with --repo-id")
    return packed.repo_ids[0]


def require_complete(packed: PackedFolder) -> None:
    """PublicationError when a file is neither here nor on the Hub already."""
    if missing := [name for name in packed.missing if name not in packed.uploaded]:
        raise PublicationError(f"{packed.folder}: missing: {', '.join(missing)}", hint=AGAIN)


def outgoing_files(packed: PackedFolder, progress: Progress, *, hash_large: bool) -> tuple[OutgoingFile, ...]:
    """All files to publish, SHA256SUMS among them; PublicationError when one is not what was judged.

    Small ones are read here, and never again. Large ones are hashed with ``hash_large``: before hours of uploading a
    folder that may have lain about. Those that a run has just made are not, as each is hashed when it is sent.
    """
    require_complete(packed)
    signed = [SIGNATURE] if (packed.folder / SIGNATURE).is_file() else []
    folder, names, files = packed.folder, [*sorted(packed.sums), SUMS, *signed], []
    judged = {file.name: file for report in packed.reports for file in report.artifact.files}
    total = sum(file.bytes for file in judged.values())  # the others are small beside them
    with progress.bar(f"check {folder.name}", "B") as bar:
        done = 0
        for name in names:
            if name in packed.uploaded:
                file = OutgoingFile(judged[name])
            else:
                file = _outgoing_file(folder / name, name, None if hash_large else packed.sums.get(name))
            files.append(file)
            done += file.record.bytes
            bar.move(min(done, total), total)
    sums = packed.sums
    if changed := [
        file.name for file in files if file.record.sha256 != sums.get(file.name, file.record.sha256)
    ]:
        raise PublicationError(
            f"{folder}: not what was judged, the content differs from {SUMS}: {', '.join(changed)}",
            hint=REHASH,
        )
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if others := sorted(there - set(names)):
        progress.warn(f"{folder}: not published, no record names them: {', '.join(others)}")
    return tuple(files)


def _outgoing_file(path: Path, name: str, known: str | None) -> OutgoingFile:
    """A small file with its content, a large one with the hash that is ``known`` of it, else with that of its bytes."""
    size = path.stat().st_size
    if size >= HEAVY:
        return OutgoingFile(FileRecord(name=name, bytes=size, sha256=known or sha256_of(path)), path=path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return OutgoingFile(FileRecord(name=name, bytes=len(content), sha256=digest), content)


def _settings(folder: Path, config: Mapping[str, Any]) -> Publish:
    try:
        return Publish.model_validate(config.get("publish") or {})
    except ValidationError as error:
        raise PublicationError(f"{folder / RECORD}: the key publish cannot be read", hint=AGAIN) from error


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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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


def _modelfile(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The hash of the Modelfile that packing wrote, by its name; empty where there is none."""
    if (entry := record.get("modelfile")) is None:
        return {}
    try:
        return {MODELFILE: FileRecord.model_validate(entry).sha256}
    except ValidationError as error:
        raise PublicationError(f"{folder / RECORD}: modelfile cannot be read", hint=AGAIN) from error


def _sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS: hash by name. Names stay below the folder."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PublicationError(f"{folder / SUMS}: {error.strerror}", hint=AGAIN) from error
    except UnicodeDecodeError as error:
        raise PublicationError(f"{folder / SUMS} is no text", hint=AGAIN) from error
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
    listed = {name: digest for name, digest in named.items() if name not in UNRECORDED}
    differing = sorted(name for name in judged.keys() | listed.keys() if judged.get(name) != listed.get(name))
    if differing or not {CARD, RECORD} <= named.keys():
        what = ", ".join(differing) or f"{CARD} or {RECORD} is missing"
        raise PublicationError(f"{folder}: {SUMS} and the reports in {RECORD} disagree: {what}", hint=AGAIN)
