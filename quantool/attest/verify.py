"""``quantool verify``: every proof that a release offers, in order; nothing is taken from a record that failed before it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantool.attest import proofs
from quantool.attest.digests import sha256_of_files
from quantool.attest.proofs import Proof, Proven
from quantool.attest.release import (
    CANARY,
    LIMITS,
    RECORD,
    SUMS,
    Release,
    ReleasedOutput,
    read_release,
    read_sums,
)
from quantool.attest.signature import Trust
from quantool.errors import SourceError
from quantool.formats.json_file import read_json
from quantool.plugins import find
from quantool.plugins.contract import Download
from quantool.records import FileRecord, Finding, Verdict, sha256_of
from quantool.report.finding_text import number
from quantool.runtime.progress import Progress


@dataclass(frozen=True)
class Scope:
    """What of a release is to be proven, and who is trusted."""

    trust: Trust = field(default_factory=Trust)
    levels: tuple[str, ...] = ()
    """Of these outputs alone the files are read; empty: of all."""
    replays: bool = True
    """Whether the artifacts are run."""
    device: str = "cpu"
    trust_remote_code: bool = False


def verify(folder: Path, scope: Scope, progress: Progress) -> tuple[Proof, ...]:
    """The proofs of the release in ``folder``.

    Raises ConfigError where there is none, or it has no such level, and as ``Trust.require`` does.
    """
    scope.trust.require()
    try:
        release: Release | None = read_release(folder)
        damage = ""
    except SourceError as error:
        release, damage = None, error.message.replace(f"{folder}/", "")
    try:
        sums = read_sums(folder)
    except SourceError as error:
        return (proofs.failed("hashes", error.message),)
    chosen = () if release is None else release.of_levels(scope.levels)
    found, hashed = _hashes(folder, sums, release, chosen, progress)
    signed = proofs.signature(folder, {**sums, SUMS: sha256_of(folder / SUMS)}, scope.trust)
    if release is None:
        return (signed, hashed, proofs.failed("record", damage))
    held = [
        proofs.file_names(folder, sums, release),
        proofs.record(folder, release),
        proofs.provenance(folder, sums, release),
        *(proofs.tensors(folder, output) for output in chosen),
    ]
    sound = {name for name, digest in found.items() if digest == sums[name]}
    replayed = _replayed(release, chosen, sums, sound, scope, progress) if scope.replays else ()
    return (signed, hashed, *held, *replayed)


def _hashes(
    folder: Path,
    sums: Mapping[str, str],
    release: Release | None,
    chosen: Sequence[ReleasedOutput],
    progress: Progress,
) -> tuple[Mapping[str, str | None], Proof]:
    """The hashes of all files but those of outputs that were not chosen."""
    outputs = release.outputs if release is not None else ()
    left_out = {
        file.name for output in outputs if output not in chosen for file in output.report.artifact.files
    }
    wanted = [name for name in sums if name not in left_out]
    total = sum((folder / name).stat().st_size for name in wanted if (folder / name).is_file())
    started, done = time.monotonic(), 0
    with progress.bar(f"hash {folder.name}", "B") as bar:

        def advance(size: int) -> None:
            nonlocal done
            done += size
            bar.move(done, total)

        found = sha256_of_files(folder, wanted, advance)
    return found, proofs.hashes(sums, found, total, time.monotonic() - started)


def _replayed(
    release: Release,
    chosen: Sequence[ReleasedOutput],
    sums: Mapping[str, str],
    sound: set[str],
    scope: Scope,
    progress: Progress,
) -> list[Proof]:
    """What the checks left at the release, compared with what the artifacts compute here."""
    try:
        left = _left(release.folder) if CANARY in sound else {}
    except SourceError as error:
        return [proofs.failed(CANARY, error.message.replace(f"{release.folder}/", ""))]
    made: list[Proof] = []
    for output in chosen:
        level, files = output.report.artifact.level, [file.name for file in output.report.artifact.files]
        kept = {name: entries[output.id] for name, entries in left.items() if output.id in entries}
        if damaged := [name for name in (CANARY, *files) if name in sums and name not in sound]:
            reason = f"not run: {damaged[0]} is not the one that was released"
            made.append(proofs.unchecked(f"canary {level}", reason))
            continue
        lacking = [name for name in _replayed_checks(output) if name not in kept]
        made += [proofs.failed(f"{name} {level}", f"{RECORD} has it, {CANARY} has not") for name in lacking]
        if not kept and not lacking:
            reason = f"quantool {release.version} left nothing to compare with"
            made.append(proofs.unchecked(f"canary {level}", reason))
        with progress.step(f"replay {level}"):
            for name, entry in kept.items():
                made += _replay(release.folder, output, name, entry, scope, progress)
    return made


def _left(folder: Path) -> dict[str, dict[str, Any]]:
    """canary.json: by check, then by output. Raises SourceError for what packing does not write."""
    left = read_json(folder / CANARY, LIMITS)
    if not all(isinstance(entries, dict) for entries in left.values()):
        raise SourceError(f"{CANARY} is damaged: no tables by check and output")
    return left


def _replayed_checks(output: ReleasedOutput) -> list[str]:
    """The checks that passed the output and leave something to replay."""
    passed = (finding.check for finding in output.report.findings if finding.verdict is Verdict.PASS)
    known = find.names("checks")
    return [name for name in dict.fromkeys(passed) if name in known and find.find_check(name).replay]


def _replay(
    folder: Path,
    output: ReleasedOutput,
    check: str,
    left: Mapping[str, Any],
    scope: Scope,
    progress: Progress,
) -> list[Proof]:
    artifact = output.report.artifact
    title = f"{check} {artifact.level}"
    replay = find.find_check(check).replay if check in find.names("checks") else None
    if replay is None:
        return [proofs.unchecked(title, f"this quantool replays no {check}")]
    files = tuple(
        FileRecord(name=file.name, bytes=(folder / file.name).stat().st_size, sha256=file.sha256)
        for file in artifact.files
    )
    with tempfile.TemporaryDirectory(prefix="quantool-verify-") as scratch:
        download = Download(
            artifact=folder / files[0].name if output.engine == "llama.cpp" else folder,
            engine=output.engine,
            name=output.id,
            left=left,
            files=files,
            scratch=Path(scratch),
            device=scope.device,
            trust_remote_code=scope.trust_remote_code,
        )
        try:
            return [_proof(finding, artifact.level) for finding in replay(download, progress)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # of what stands in canary.json
            return [proofs.failed(title, f"{CANARY} is damaged ({type(error).__name__}: {error})")]


def _proof(finding: Finding, level: str) -> Proof:
    name = f"{finding.metric} {level}"
    if finding.verdict is Verdict.SKIPPED:
        return proofs.unchecked(name, finding.detail)
    if finding.verdict.fails:
        return proofs.failed(name, finding.detail)
    limit = f", limit {number(finding.threshold)}" if finding.threshold is not None else ""
    shown = number(finding.measured) + limit + (f"; {finding.detail}" if finding.detail else "")
    return Proof(name=name, outcome=Proven.OK, detail=shown)


def table(made: Sequence[Proof]) -> str:
    """The proofs as text, one line each."""
    width = max(len(entry.name) for entry in made)
    outcomes = max(len(entry.outcome) for entry in made)
    return "\n".join(
        f"{entry.name.ljust(width)}  {entry.outcome.ljust(outcomes)}  {entry.detail}".rstrip()
        for entry in made
    )


def is_proven(made: Sequence[Proof]) -> bool:
    """Whether none failed."""
    return all(entry.outcome is not Proven.FAILED for entry in made)
