"""Taking a damaged commit back: a branch gets the files again that it had before, if they are proven to be those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantool.errors import PublicationError
from quantool.hub.client import headers
from quantool.hub.errors import hub_call
from quantool.publish.commit import (
    CommitLocation,
    Line,
    Message,
    deletion,
    large_file,
    post_commit,
    small_file,
)
from quantool.publish.packed_folder import git_hash
from quantool.publish.refs import head
from quantool.publish.verify import identity, list_files, looks

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile


def take_back(
    api: HfApi,
    repo_id: str,
    location: CommitLocation,
    parent: str,
    before: Mapping[str, RepoFile],
    names: Sequence[str],
) -> None:
    """Give the files ``names`` of a branch what commit ``parent`` has, by one commit on ``location``; verify it.

    ``before`` is what was listed of ``parent``. Raises PublicationError, with nothing done, when another question
    about ``parent`` is answered otherwise, or a file that is to be put back does not have the hash listed for it.
    """
    lines = _lines(api, repo_id, parent, before, names)
    title = "Take back: the upload was damaged"
    failure: PublicationError | None = None
    try:
        post_commit(api, repo_id, lines, Message(title), location.commit, (location.revision, False))
    except PublicationError as error:  # made all the same, if its answer was lost
        failure = error
    for _ in looks():
        try:
            if _is_restored(api, repo_id, location, before, names):
                return
        except PublicationError as error:
            raise failure or PublicationError(
                f"they were put back, but not verified: {error.message}"
            ) from error
    raise failure or PublicationError("the Hub does not list the files that were put back")


def _lines(
    api: HfApi, repo_id: str, parent: str, before: Mapping[str, RepoFile], names: Sequence[str]
) -> list[Line]:
    from huggingface_hub.hf_api import RepoFile

    with hub_call(f"look at what {parent} had"):
        paths = api.get_paths_info(repo_id, list(names), revision=parent)
        again = {entry.path: entry for entry in paths if isinstance(entry, RepoFile)}
    if doubtful := [name for name in names if identity(again.get(name)) != identity(before.get(name))]:
        raise PublicationError(f"the Hub says different things of {parent}: {', '.join(doubtful)}")
    lines = []
    for name in names:
        entry = before.get(name)
        if entry is None:
            lines.append(deletion(name))
        elif entry.lfs is not None:
            lines.append(large_file(name, entry.lfs.sha256, entry.size))
        else:
            lines.append(small_file(name, _content(api, repo_id, parent, entry)))
    return lines


def _content(api: HfApi, repo_id: str, parent: str, entry: RepoFile) -> bytes:
    """A small file of ``parent``, proven by its hash."""
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status

    with hub_call(f"read {entry.path} of {parent}"):
        address = hf_hub_url(repo_id, entry.path, revision=parent, endpoint=api.endpoint)
        response = get_session().get(address, headers=headers())
        hf_raise_for_status(response)
        content = bytes(response.content)
    if git_hash(content) != entry.blob_id:
        raise PublicationError(f"{entry.path} of {parent} arrived as something else")
    return content


def _is_restored(
    api: HfApi,
    repo_id: str,
    location: CommitLocation,
    before: Mapping[str, RepoFile],
    names: Sequence[str],
) -> bool:
    at = head(api, repo_id, location.revision)
    if at in (None, location.commit):
        return False
    there = list_files(api, repo_id, str(at))
    return all(identity(there.get(name)) == identity(before.get(name)) for name in names)
