"""One level at a time: a judged level is uploaded before the commit and deleted here, and a later run knows that.

What was uploaded is a stage of the workspace, by repository, file name and hash, without a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantool.config.schema import Publish
from quantool.hub.client import publishing
from quantool.hub.errors import client_warnings
from quantool.publish import refs
from quantool.publish.packed_folder import OutgoingFile
from quantool.publish.permissions import connect
from quantool.publish.push import ensure_repository
from quantool.publish.upload import missing_uploads, upload_bar, upload_large
from quantool.records import Artifact, FileRecord, fingerprint
from quantool.runtime.progress import Progress, amount
from quantool.runtime.workspace import Workspace


@dataclass(frozen=True)
class Target:
    """Where the commit will be made in the end."""

    repo_id: str
    private: bool | None
    settings: Publish


def recorded(workspace: Workspace, repo_id: str, files: Sequence[FileRecord]) -> set[str]:
    """Names of those of ``files`` that were uploaded to the repository."""
    endpoint = connect().endpoint
    return {
        file.name
        for file in files
        if workspace.recall(_stage(repo_id, file), fingerprint(endpoint, repo_id, file.sha256))
    }


def _stage(repo_id: str, file: FileRecord) -> str:
    return f"upload/{repo_id}/{file.name}"


def is_whole(workspace: Workspace, target: Target, artifact: Artifact, progress: Progress) -> bool:
    """Whether the files of an artifact that are gone were uploaded, and the Hub still has them."""
    gone = missing(artifact)
    if len(recorded(workspace, target.repo_id, gone)) < len(gone):
        return False
    api, settings = connect(), target.settings
    with publishing(settings.connect_timeout, settings.read_timeout), client_warnings(progress):
        if refs.find(api, target.repo_id) is None:
            return False
        cleared = missing_uploads(api, target.repo_id, gone)
    if cleared:
        progress.warn(f"{target.repo_id} no longer has what was uploaded: {', '.join(cleared)}; made again")
    return not cleared


def missing(artifact: Artifact) -> list[FileRecord]:
    """Files of an artifact that are not there (any more)."""
    return [file for file in artifact.files if not (artifact.folder / file.name).exists()]


def ship(workspace: Workspace, target: Target, artifact: Artifact, progress: Progress) -> None:
    """Upload the large files of an artifact, then delete them here; what was uploaded before is not sent again."""
    done = recorded(workspace, target.repo_id, artifact.files)
    gone = {file.name for file in missing(artifact)}
    todo = [file for file in artifact.files if _is_heavy(file) and file.name not in gone | done]
    if todo:
        api, settings = connect(), target.settings
        with publishing(settings.connect_timeout, settings.read_timeout), client_warnings(progress):
            ensure_repository(api, target.repo_id, target.private)
            branch = settings.revision
            if refs.head(api, target.repo_id, branch) is None:
                branch = refs.BRANCH
            place = (branch, settings.mode == "pull_request")
            for file in todo:
                with upload_bar(progress, f"upload {file.name} ({amount(file.bytes, 'B')})"):
                    is_stored = upload_large(api, target.repo_id, artifact.folder, file, place)
                if is_stored:
                    key = fingerprint(api.endpoint, target.repo_id, file.sha256)
                    workspace.keep(_stage(target.repo_id, file), key, (), file.model_dump(mode="json"))
                    done.add(file.name)
    workspace.release(artifact.folder / name for name in done)


def _is_heavy(file: FileRecord) -> bool:
    return OutgoingFile(file).is_heavy


def drop(workspace: Workspace, artifact: Artifact) -> None:
    """Delete the large files of an artifact that is not published: its report is what remains."""
    workspace.release(artifact.folder / file.name for file in artifact.files if _is_heavy(file))


def forget(workspace: Workspace, repo_id: str, folder: Path, files: Sequence[FileRecord]) -> None:
    """Let files that are gone be made and sent again."""
    for file in files:
        workspace.keep(_stage(repo_id, file), "", (), {})
    workspace.reclaim(folder / file.name for file in files)
