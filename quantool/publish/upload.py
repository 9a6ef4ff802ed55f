"""Sending files to the Hub ahead of the commit that makes them visible.

Until a commit names an upload nobody can see it. What the Hub has whole is not sent again. A file that was cut off in
the middle is: classic LFS has no way to go on inside a file, of Xet's chunks those that arrived are not repeated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quantool.errors import PublicationError
from quantool.hub.errors import hub_call
from quantool.publish.commit import Line, large_file, small_file
from quantool.publish.packed_folder import REHASH, OutgoingFile
from quantool.records import FileRecord, sha256_of
from quantool.runtime.progress import Progress, amount

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

IGNORE_NOTHING = "# every file of this commit is wanted\n"


def upload(
    api: HfApi,
    repo_id: str,
    folder: Path,
    files: Sequence[OutgoingFile],
    target: tuple[str, bool],
    progress: Progress,
) -> list[Line]:
    """Send the large files, one after the other (many at once often hang); the lines of the commit for all.

    ``target`` is the branch that the commit is for, and whether it will be a pull request.
    """
    lines: list[Line] = []
    heavy = [file for file in files if file.is_heavy]
    for number, file in enumerate(heavy, start=1):
        label = f"upload {number}/{len(heavy)} {file.name} ({amount(file.record.bytes, 'B')})"
        with upload_bar(progress, label):
            if upload_large(api, repo_id, folder, file.record, target):
                lines.append(large_file(file.name, file.record.sha256, file.record.bytes))
            else:
                lines.append(small_file(file.name, _content(file, folder)))
    light = {file.name: _content(file, folder) for file in files if not file.is_heavy}
    return lines + _upload_small(api, repo_id, light, target)


def upload_large(api: HfApi, repo_id: str, folder: Path, file: FileRecord, target: tuple[str, bool]) -> bool:
    """Send one large file, hashing it on the way; False when the Hub wants it in the commit itself.

    PublicationError when the bytes that were sent are not those that were judged.
    """
    from huggingface_hub import CommitOperationAdd

    path = folder / file.name
    with hub_call(f"upload {file.name} to {repo_id}"):
        before = _identity(path)
        addition = CommitOperationAdd(file.name, path)
        _hand_over(api, repo_id, [addition], target)
        sent = addition.path_or_fileobj == b""  # what the client puts there once it has uploaded a large file
        digest = addition.upload_info.sha256.hex() if sent else file.sha256
    if digest != file.sha256 or (_identity(path) != before and sha256_of(path) != file.sha256):
        raise PublicationError(f"{path} was changed after it was judged", hint=REHASH)
    return sent


def _upload_small(
    api: HfApi, repo_id: str, contents: dict[str, bytes], target: tuple[str, bool]
) -> list[Line]:
    """Lines for small files; some of them may be large ones to the Hub (by its .gitattributes) and are sent now."""
    from huggingface_hub import CommitOperationAdd

    if not contents:
        return []
    with hub_call(f"upload {next(iter(contents))} to {repo_id}"):
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        _hand_over(api, repo_id, additions, target)
        sent = {addition.path_in_repo for addition in additions if addition.path_or_fileobj == b""}
    return [
        large_file(name, hashlib.sha256(content).hexdigest(), len(content))
        if name in sent and content
        else small_file(name, content)
        for name, content in contents.items()
    ]


def _hand_over(
    api: HfApi, repo_id: str, additions: Sequence[CommitOperationAdd], target: tuple[str, bool]
) -> None:
    api.preupload_lfs_files(
        repo_id,
        additions,
        revision=target[0],
        create_pr=target[1],
        num_threads=1,
        free_memory=True,
        gitignore_content=IGNORE_NOTHING,
    )


def _content(file: OutgoingFile, folder: Path) -> bytes:
    if file.content is not None:
        return file.content
    content = (folder / file.name).read_bytes()
    if hashlib.sha256(content).hexdigest() != file.record.sha256:
        raise PublicationError(f"{folder / file.name} was changed after it was judged", hint=REHASH)
    return content


def _identity(path: Path) -> tuple[int, int, int, int]:
    """What changes with every write to a file: the time of its last change cannot be set back, unlike the other."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def missing_uploads(api: HfApi, repo_id: str, files: Sequence[FileRecord]) -> list[str]:
    """Names of uploaded files that the Hub wants to have again; it may clear away what no commit names.

    Asked by the batch call of classic LFS. Files that went through Xet are stored by their chunks, for which there is
    no such question: the commit is refused when one is missing.
    """
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

    if not files or _uses_xet():
        return []
    names = {file.sha256: file.name for file in files}
    infos = [
        UploadInfo(size=file.bytes, sample=b"", sha256=bytes.fromhex(file.sha256)) for file in files
    ]  # the sample is for another question
    with hub_call(f"ask {repo_id} for what was uploaded before"):
        answers, errors, _ = post_lfs_batch_info(
            infos, token=None, repo_type="model", repo_id=repo_id, endpoint=api.endpoint
        )
        wanted = [answer["oid"] for answer in answers if answer.get("actions")]
        return [names[oid] for oid in (*wanted, *(error["oid"] for error in errors))]


def _uses_xet() -> bool:
    from importlib.util import find_spec

    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


@contextmanager
def upload_bar(progress: Progress, label: str) -> Iterator[None]:
    """A line on a terminal, where the client draws bars of its own; elsewhere a bar of ours."""
    if progress.terminal:
        progress.say(label)
        yield
        return
    with progress.bar(label):
        yield
