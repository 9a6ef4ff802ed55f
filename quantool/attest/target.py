"""What ``quantool verify`` and ``diff`` are given: a folder, a file of one, or a repository on the Hub, brought here."""

from __future__ import annotations

import re
from pathlib import Path

from quantool.attest.release import CARD, PROVENANCE, RECORD, SIGNATURE, SUMS, Release, read_release
from quantool.errors import ConfigError, SourceError
from quantool.hub.download import Listing, fetch, list_repository
from quantool.runtime.progress import Progress

REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
RECORDS = (RECORD, SUMS, CARD, PROVENANCE, SIGNATURE)


def locate(target: str, levels: tuple[str, ...], progress: Progress) -> tuple[Path, tuple[str, ...]]:
    """The folder of a release with its files here, and the levels that are meant: all where there are none.

    Of a repository (``NAME/NAME[@REVISION]``) the files of other levels are not fetched. Raises ConfigError for what is
    nothing of these and for a level that a repository lacks, SourceError and DependencyError as a download does.
    """
    path = Path(target)
    if path.is_dir():
        return path, levels
    if path.is_file():
        return path.parent, levels or _levels_of(path)
    repo, listing = _listing(target, path)
    fetch(repo, listing, tuple(name for name in RECORDS if name in listing.sizes), None, None)
    unwanted = _other_files(listing.folder, levels)
    fetch(repo, listing, tuple(name for name in listing.sizes if name not in unwanted), None, progress)
    return listing.folder, levels


def locate_record(target: str) -> Release:
    """The release in a folder or a repository, of which no more than its record is fetched. Raises as ``locate``."""
    path = Path(target)
    if path.exists():
        return read_release(path if path.is_dir() else path.parent)
    repo, listing = _listing(target, path)
    fetch(repo, listing, tuple(name for name in (RECORD, CARD) if name in listing.sizes), None, None)
    return read_release(listing.folder)


def _listing(target: str, path: Path) -> tuple[str, Listing]:
    matched = REPOSITORY.fullmatch(target)
    if matched is None:
        raise ConfigError(
            f"{path} does not exist", hint="give a folder, a file, or a repository: NAMESPACE/NAME[@REVISION]"
        )
    listing = list_repository(matched["repo"], matched["revision"], None)
    if RECORD not in listing.sizes:
        raise ConfigError(f"{target} has no {RECORD}: quantool did not publish it")
    return matched["repo"], listing


def _levels_of(path: Path) -> tuple[str, ...]:
    """The level of the output that a file belongs to; of one that belongs to all, none."""
    try:
        outputs = read_release(path.parent).outputs
    except SourceError:  # verify says what is wrong with the record
        return ()
    of_file = [
        output.report.artifact.level
        for output in outputs
        if path.name in {file.name for file in output.report.artifact.files}
    ]
    return tuple(of_file)


def _other_files(folder: Path, levels: tuple[str, ...]) -> set[str]:
    """Files of outputs of other levels; of a record that is damaged, none. Raises as ``Release.of_levels``."""
    try:
        release = read_release(folder)
    except SourceError:  # verify says what is wrong with it
        return set()
    kept = {file.name for output in release.of_levels(levels) for file in output.report.artifact.files}
    return {file.name for output in release.outputs for file in output.report.artifact.files} - kept
