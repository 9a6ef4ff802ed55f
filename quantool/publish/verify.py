"""Whether the Hub holds what was sent: sizes and hashes from its listing, compared with those of the bytes sent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from quantool.hub.errors import hub_call, unreadable
from quantool.publish.packed_folder import OutgoingFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

PAUSES = (1.0, 2.0, 4.0)
"""Seconds between two looks at what may not be there yet: a listing can lag behind the commit."""
MAX_FILES = 100_000  # in one repository; the Hub advises against as many


@dataclass(frozen=True)
class Mismatch:
    """What a commit's listing has otherwise than it was sent."""

    files: Mapping[str, str]
    """What is wrong, by name."""
    is_proven: bool
    """Whether the Hub, asked twice, lists all files and says of these that they are other ones: neither what was sent
    nor what the parent has. Anything else may be an old or a foreign answer."""

    def __str__(self) -> str:
        """All of it on a line."""
        return "; ".join(f"{name}: {why}" for name, why in self.files.items())


def list_files(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """The files of a revision by name. An empty answer is asked for again."""
    from huggingface_hub.hf_api import RepoFile

    what = f"list {repo_id} at {revision[:12]}"
    for _ in looks():
        with hub_call(what):
            tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
            entries = list(islice(tree, MAX_FILES + 1))
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        if len(entries) > MAX_FILES or not all(map(_is_sound, files.values())):
            raise unreadable(what)
        if files:
            break
    return files


def _is_sound(entry: RepoFile) -> bool:
    texts = [entry.path, entry.blob_id, *([entry.lfs.sha256] if entry.lfs else [])]
    return isinstance(entry.size, int) and all(isinstance(text, str) for text in texts)


def looks() -> Iterator[int]:
    """Count tries, with a pause between them."""
    for number, pause in enumerate((*PAUSES, 0.0)):
        yield number
        time.sleep(pause)


def identity(entry: RepoFile | None) -> tuple[int, str] | None:
    """Size and hash of a listed file: SHA-256 of a large one, git's of another. None for a file that is not there."""
    if entry is None:
        return None
    return entry.size, entry.lfs.sha256 if entry.lfs is not None else entry.blob_id


def is_same(entry: RepoFile | None, file: OutgoingFile) -> bool:
    """Whether the Hub's file has the size and the hash of the bytes to send."""
    if entry is None or entry.size != file.record.bytes:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == file.record.sha256
    return entry.blob_id == file.git_hash()


def compare(
    api: HfApi, repo_id: str, commit: str, files: Sequence[OutgoingFile], parent: Mapping[str, RepoFile]
) -> Mismatch | None:
    """Compare every file at ``commit`` with what was sent; None when all are the same.

    A listing that differs is asked for again, a few times. ``parent`` are the files before the commit.
    """
    listings: list[dict[str, RepoFile]] = []
    differing: dict[str, str] = {}
    for _ in looks():
        listings.append(list_files(api, repo_id, commit))
        there = listings[-1]
        differing = {
            file.name: _difference(there.get(file.name), file)
            for file in files
            if not is_same(there.get(file.name), file)
        }
        if not differing:
            return None
    there, before = listings[-1], listings[-2]
    is_whole = all(file.name in there for file in files) and parent.keys() <= there.keys()
    other = {
        name: why
        for name, why in differing.items()
        if identity(there.get(name)) == identity(before.get(name)) != identity(parent.get(name))
    }
    return Mismatch(other, True) if is_whole and other else Mismatch(differing, False)


def _difference(entry: RepoFile | None, file: OutgoingFile) -> str:
    if entry is None:
        return "missing"
    if entry.size != file.record.bytes:
        return f"{entry.size} bytes instead of {file.record.bytes}"
    return "another hash"
