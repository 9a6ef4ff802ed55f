"""Publishing to the Hub through huggingface_hub: the large files first, one commit, then a look at what is there.

Nothing can be seen before the commit, and the Hub refuses it when ``main`` has moved since it was listed. What ``main``
has already is not sent again; what else it has stays. The calls are the same in huggingface_hub 1.33 and 2.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from quantool import __version__
from quantool.errors import PublicationError
from quantool.preflight import BRANCH, check_privacy, connect, find
from quantool.progress import Progress, amount
from quantool.publication import Parcel, hash_files, read_parcel
from quantool.records import FileRecord, Publication
from quantool.refusal import asking, retold

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo
    from huggingface_hub.hf_api import RepoFile

HEAVY_ENDS = (".gguf", ".safetensors")
HEAVY = 10_000_000
"""Bytes from which the Hub takes a file as a large one only."""
HEAD, TAIL = 1 << 20, 1 << 16
"""Bytes read back from the beginning and the end of a large file."""
IGNORE_NOTHING = "# every file of this commit is wanted\n"


def publish(folder: Path, repo_id: str, *, private: bool | None, progress: Progress) -> Publication:
    """Make ``main`` of ``repo_id`` hold the files of a packed folder, by one commit, and compare them there.

    The repository is created when missing: private unless ``private`` is False. A second call commits nothing. Raises
    GateError and PublicationError (``publication.read_parcel``) for a folder that must not be published, and
    PublicationError when the Hub refuses or stores something else; ``main`` then is what it was.
    """
    parcel = read_parcel(folder)
    files = hash_files(parcel, progress)
    api = connect()
    with retold(progress):
        info = _opened(api, repo_id, private)
        parent = str(info.sha)
        before = _listed(api, repo_id, parent)
        new = [file for file in files if not _is_same(before.get(file.name), file, folder)]
        commit = parent
        if new:
            additions = _upload(api, repo_id, folder, new, progress)
            commit = _commit(api, repo_id, parcel, additions, parent, new)
        try:
            with _announced(progress, f"verify {repo_id}"):
                read_back = _verify(api, repo_id, commit, files, folder)
        except PublicationError as error:
            raise PublicationError(
                f"{repo_id} is at {commit} now, but could not be verified: {error.message}",
                hint="run again: that only verifies, nothing is sent twice",
            ) from error
        if isinstance(read_back, str):
            raise _withdraw(api, repo_id, commit, parent, before, new, read_back)
    return Publication(
        repo_id=repo_id,
        commit=commit,
        parent=parent,
        url=f"{api.endpoint}/{repo_id}/tree/{commit}",
        private=bool(info.private),
        files=files,
        sent=tuple(file.name for file in new),
        read_back=read_back,
    )


def _opened(api: HfApi, repo_id: str, private: bool | None) -> ModelInfo:
    """The repository, created when missing."""
    info = find(api, repo_id)
    if info is None:
        with asking(f"create {repo_id}"):
            api.create_repo(repo_id, private=private is not False, exist_ok=True)
        info = find(api, repo_id)
    check_privacy(repo_id, info, private)
    if info is None or info.sha is None:
        raise PublicationError(
            f"{repo_id} was created, but the Hub shows no {BRANCH}", hint="run again in a minute"
        )
    return info


def _listed(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    from huggingface_hub.hf_api import RepoFile

    with asking(f"list {repo_id} at {revision[:12]}"):
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_same(entry: RepoFile | None, file: FileRecord, folder: Path) -> bool:
    """Whether the Hub's file has the size and the hash of ours (SHA-256 of large files, git's of the others)."""
    if entry is None or entry.size != file.bytes:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == file.sha256
    content = (folder / file.name).read_bytes()  # small: the Hub takes nothing over 10 MB into git
    return (
        entry.blob_id
        == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    )


def _is_heavy(file: FileRecord) -> bool:
    return file.bytes >= HEAVY or file.name.endswith(HEAVY_ENDS)


def _upload(
    api: HfApi, repo_id: str, folder: Path, new: Sequence[FileRecord], progress: Progress
) -> list[CommitOperationAdd]:
    """Send the large files, one after the other (many at once often hang), and ready the small ones for the commit."""
    from huggingface_hub import CommitOperationAdd

    def send(files: Sequence[FileRecord]) -> list[CommitOperationAdd]:
        additions = [CommitOperationAdd(file.name, folder / file.name) for file in files]
        with asking(f"upload {files[0].name} to {repo_id}"):
            api.preupload_lfs_files(
                repo_id,
                additions,
                revision=BRANCH,
                num_threads=1,
                free_memory=False,
                gitignore_content=IGNORE_NOTHING,
            )
        return additions

    additions: list[CommitOperationAdd] = []
    heavy = [file for file in new if _is_heavy(file)]
    for number, file in enumerate(heavy, start=1):
        with _announced(progress, f"upload {number}/{len(heavy)} {file.name} ({amount(file.bytes, 'B')})"):
            additions += send([file])
    if light := [file for file in new if not _is_heavy(file)]:
        additions += send(light)
    return additions


@contextmanager
def _announced(progress: Progress, label: str) -> Iterator[None]:
    """A line on a terminal, where the client draws bars of its own; elsewhere a bar of ours."""
    if progress.terminal:
        progress.say(label)
        yield
        return
    with progress.bar(label):
        yield


def _commit(
    api: HfApi,
    repo_id: str,
    parcel: Parcel,
    additions: Sequence[CommitOperationAdd],
    parent: str,
    new: Sequence[FileRecord],
) -> str:
    """One commit on ``parent``. When its answer is lost or late, what ``main`` holds tells whether it was made."""
    try:
        with asking(f"commit to {repo_id}"):
            made = api.create_commit(
                repo_id,
                additions,
                commit_message=f"{', '.join(parcel.levels)} by quantool {__version__}",
                commit_description=f"Made from {parcel.source}.",
                revision=BRANCH,
                parent_commit=parent,
                num_threads=1,
            )
        return str(made.oid)
    except PublicationError:
        with suppress(PublicationError):  # the first error is the one to tell
            head = str(getattr(find(api, repo_id), "sha", parent))
            there = _listed(api, repo_id, head) if head != parent else {}
            if all(_is_same(there.get(file.name), file, parcel.folder) for file in new):
                return head
        raise


def _verify(
    api: HfApi, repo_id: str, commit: str, files: Sequence[FileRecord], folder: Path
) -> tuple[str, ...] | str:
    """Compare every file at ``commit``; the names of those read back in part, or what differs."""
    there = _listed(api, repo_id, commit)
    differing = [
        f"{file.name}: {_told(there.get(file.name), file)}"
        for file in files
        if not _is_same(there.get(file.name), file, folder)
    ]
    heavy = [file for file in files if _is_heavy(file)]
    if not differing:
        damaged = _read_back(api, f"{repo_id}@{commit}", heavy, folder)
        differing = [f"{name}: the bytes read back differ" for name in damaged]
    return "; ".join(differing) if differing else tuple(file.name for file in heavy)


def _told(entry: RepoFile | None, file: FileRecord) -> str:
    if entry is None:
        return "missing"
    if entry.size != file.bytes:
        return f"{entry.size} bytes instead of {file.bytes}"
    return "another hash"


def _read_back(api: HfApi, place: str, heavy: Sequence[FileRecord], folder: Path) -> list[str]:
    """Names of large files whose beginning (a GGUF's header) or end is not ours; asks for these bytes alone."""
    from huggingface_hub import HfFileSystem

    remote = HfFileSystem(endpoint=api.endpoint, token=True, skip_instance_cache=True)
    damaged = []
    for file in heavy:
        parts = [(0, min(file.bytes, HEAD))]
        if file.bytes > HEAD:
            parts.append((max(file.bytes - TAIL, HEAD), min(file.bytes - HEAD, TAIL)))
        with (
            (folder / file.name).open("rb") as ours,
            asking(f"read {place}/{file.name} back"),
            remote.open(f"{place}/{file.name}", "rb", cache_type="none") as theirs,
        ):
            if not all(_bytes_at(theirs, *part) == _bytes_at(ours, *part) for part in parts):
                damaged.append(file.name)
    return damaged


def _bytes_at(file: IO[bytes], start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _withdraw(
    api: HfApi,
    repo_id: str,
    commit: str,
    parent: str,
    before: Mapping[str, RepoFile],
    new: Sequence[FileRecord],
    differing: str,
) -> PublicationError:
    """Put the files that the commit touched back to what they were; the error to raise."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    told = f"{repo_id}: the Hub does not hold what was sent: {differing}"
    if not new:
        return PublicationError(told, hint=f"main is at {commit}; delete these files there and publish again")
    operations = [
        CommitOperationCopy(file.name, file.name, src_revision=parent)
        if file.name in before
        else CommitOperationDelete(file.name)
        for file in new
    ]
    try:
        with asking(f"take {commit} back"):
            api.create_commit(
                repo_id,
                operations,
                commit_message="Take back: the upload was damaged",
                revision=BRANCH,
                parent_commit=commit,
            )
    except PublicationError as error:
        return PublicationError(
            f"{told}. It could not be taken back: {error.message}",
            hint=f"main shows the damaged commit {commit}: revert it there at once",
        )
    return PublicationError(
        f"{told}. main shows the files of {parent} again", hint="run again; if it happens twice, tell the Hub"
    )
