"""One level at a time: a judged level is uploaded ahead of the commit and deleted here, and a later run knows that.

What was uploaded is a stage of the workspace, by repository, file name and hash, without a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantool.config.schema import Publish
from quantool.hub.errors import retold
from quantool.publish import push, refs
from quantool.publish import upload as uploads
from quantool.publish.permissions import connect
from quantool.publish.verify import is_heavy
from quantool.records import Artifact, FileRecord, Upload, fingerprint
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace


@dataclass(frozen=True)
class Target:
    """Where the commit will be made in the end."""

    repo_id: str
    private: bool | None
    settings: Publish


def recorded(workspace: Workspace, repo_id: str, files: Sequence[FileRecord]) -> dict[str, Upload]:
    """Those of ``files`` that were uploaded to the repository, by name."""
    endpoint = connect().endpoint
    kept = {
        file.name: workspace.recall(_stage(repo_id, file), fingerprint(endpoint, repo_id, file.sha256))
        for file in files
    }
    return {name: Upload.model_validate(found) for name, found in kept.items() if found}


def _stage(repo_id: str, file: FileRecord) -> str:
    return f"upload/{repo_id}/{file.name}"


def is_whole(workspace: Workspace, target: Target, artifact: Artifact, progress: Progress) -> bool:
    """Whether the files of an artifact that are gone were uploaded, and the Hub still has them."""
    gone = missing(artifact)
    found = recorded(workspace, target.repo_id, gone)
    if len(found) < len(gone):
        return False
    api = connect()
    with retold(progress):
        if refs.find(api, target.repo_id) is None:
            return False
        lost = uploads.lost(api, target.repo_id, list(found.values()))
    if lost:
        progress.warn(f"{target.repo_id} no longer has what was uploaded: {', '.join(lost)}; made again")
    return not lost


def missing(artifact: Artifact) -> list[FileRecord]:
    """Files of an artifact that are not there (any more)."""
    return [file for file in artifact.files if not (artifact.folder / file.name).exists()]


def ship(workspace: Workspace, target: Target, artifact: Artifact, progress: Progress) -> None:
    """Upload the large files of an artifact, then delete them here; what was uploaded before is not sent again."""
    done = recorded(workspace, target.repo_id, artifact.files)
    gone = {file.name for file in missing(artifact)}
    todo = [file for file in artifact.files if is_heavy(file) and file.name not in gone | done.keys()]
    if todo:
        api = connect()
        with retold(progress):
            push.opened(api, target.repo_id, target.private)
            branch = target.settings.revision
            if refs.head(api, target.repo_id, branch) is None:
                branch = refs.BRANCH
            place = (branch, target.settings.mode == "pull_request")
            for file in todo:
                upload = uploads.send_ahead(api, target.repo_id, artifact.folder, file, place, progress)
                if upload is not None:
                    _keep(workspace, api.endpoint, target.repo_id, upload)
                    done[file.name] = upload
    workspace.release(artifact.folder / name for name in done)


def _keep(workspace: Workspace, endpoint: str, repo_id: str, upload: Upload) -> None:
    key = fingerprint(endpoint, repo_id, upload.file.sha256)
    workspace.keep(_stage(repo_id, upload.file), key, (), upload.model_dump(mode="json"))


def drop(workspace: Workspace, artifact: Artifact) -> None:
    """Delete the large files of an artifact that is not published: its report is what remains."""
    workspace.release(artifact.folder / file.name for file in artifact.files if is_heavy(file))


def forget(workspace: Workspace, repo_id: str, folder: Path, files: Sequence[FileRecord]) -> None:
    """Let files that are gone be made and sent again."""
    for file in files:
        workspace.keep(_stage(repo_id, file), "", (), {})
    workspace.reclaim(folder / file.name for file in files)
