"""Sending files to the Hub ahead of the commit that makes them visible, and knowing them again without the files.

Until a commit names an upload nobody can see it. What the Hub has whole is not sent again. A file that was cut off in
the middle is: classic LFS has no way to go on inside a file, of Xet's chunks those that arrived are not repeated. The
calls are the same in huggingface_hub 1.33 and 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quantool.errors import PublicationError
from quantool.hub.errors import asking
from quantool.publish.verify import ends_of, is_heavy
from quantool.records import FileRecord, Upload
from quantool.runtime.progress import Progress, amount

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

IGNORE_NOTHING = "# every file of this commit is wanted\n"
SAMPLE = 512  # bytes from a file's beginning that the client sends along (lfs.UploadInfo)


def send(
    api: HfApi,
    repo_id: str,
    folder: Path,
    files: Sequence[FileRecord],
    target: tuple[str, bool],
    progress: Progress,
) -> list[CommitOperationAdd]:
    """Send the large files, one after the other (many at once often hang), and ready the small ones for the commit.

    ``target`` is the branch that the commit is for, and whether it will be a pull request. What the Hub has already
    is not sent.
    """
    from huggingface_hub import CommitOperationAdd

    def hand_over(batch: Sequence[FileRecord]) -> list[CommitOperationAdd]:
        additions = [CommitOperationAdd(file.name, folder / file.name) for file in batch]
        with asking(f"upload {batch[0].name} to {repo_id}"):
            api.preupload_lfs_files(
                repo_id,
                additions,
                revision=target[0],
                create_pr=target[1],
                num_threads=1,
                free_memory=False,
                gitignore_content=IGNORE_NOTHING,
            )
        return additions

    additions: list[CommitOperationAdd] = []
    heavy = [file for file in files if is_heavy(file)]
    for number, file in enumerate(heavy, start=1):
        label = f"upload {number}/{len(heavy)} {file.name} ({amount(file.bytes, 'B')})"
        with announced(progress, label):
            additions += hand_over([file])
    if light := [file for file in files if not is_heavy(file)]:
        additions += hand_over(light)
    return additions


def send_ahead(
    api: HfApi, repo_id: str, folder: Path, file: FileRecord, target: tuple[str, bool], progress: Progress
) -> Upload | None:
    """Send one large file that may be deleted here afterwards; None when the Hub wants it in the commit itself."""
    (addition,) = send(api, repo_id, folder, [file], target, progress)
    if addition._upload_mode != "lfs":  # noqa: SLF001 - nothing public tells
        return None
    if addition.upload_info.sha256.hex() != file.sha256:
        raise PublicationError(
            f"{folder / file.name} was changed after it was judged", hint="run again: it is made anew"
        )
    with (folder / file.name).open("rb") as content:
        sample = content.read(SAMPLE).hex()
    return Upload(file=file, sample=sample, ends=ends_of(folder / file.name))


def operation(upload: Upload) -> CommitOperationAdd:
    """The addition of a file that was sent before and is no longer here.

    It gets the state in which ``preupload_lfs_files(free_memory=True)`` leaves one: no content, uploaded as a large
    file. The client has no public way to build that anew in another process, so these three fields are set here.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(upload.file.name, b"")
    addition.upload_info = UploadInfo(
        size=upload.file.bytes,
        sample=bytes.fromhex(upload.sample),
        sha256=bytes.fromhex(upload.file.sha256),
    )
    addition._upload_mode = "lfs"  # noqa: SLF001 - see above
    addition._is_uploaded = True  # noqa: SLF001 - see above
    return addition


def lost(api: HfApi, repo_id: str, uploads: Sequence[Upload]) -> list[str]:
    """Names of uploads that the Hub wants to have again; it may clear away what no commit names.

    Asked by the batch call of classic LFS. Files that went through Xet are stored by their chunks, for which there is
    no such question: the commit is refused when one is missing.
    """
    from huggingface_hub.lfs import post_lfs_batch_info
    from huggingface_hub.utils._runtime import is_xet_available

    if not uploads or is_xet_available():
        return []
    names = {upload.file.sha256: upload.file.name for upload in uploads}
    with asking(f"ask {repo_id} for what was uploaded before"):
        answers, errors, _ = post_lfs_batch_info(
            [operation(upload).upload_info for upload in uploads],
            token=None,
            repo_type="model",
            repo_id=repo_id,
            endpoint=api.endpoint,
        )
    wanted = [answer["oid"] for answer in answers if answer.get("actions")]
    return [names[oid] for oid in (*wanted, *(error["oid"] for error in errors))]


@contextmanager
def announced(progress: Progress, label: str) -> Iterator[None]:
    """A line on a terminal, where the client draws bars of its own; elsewhere a bar of ours."""
    if progress.terminal:
        progress.say(label)
        yield
        return
    with progress.bar(label):
        yield
