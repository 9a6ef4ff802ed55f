"""Publishing to the Hub through huggingface_hub: the large files first, one commit, then a look at what is there.

Nothing can be seen before the commit, and the Hub refuses it when the branch has moved since it was listed. What the
branch has already is not sent again; what else it has stays. A pull request leaves its branch alone: it is opened by
that one commit, and closed again when the upload was damaged. Tag and collection come last, when all was compared. The
calls are the same in huggingface_hub 1.33 and 2.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantool.errors import PublicationError
from quantool.hub.errors import asking, retold
from quantool.publish import refs
from quantool.publish.parcel import Parcel, hash_files
from quantool.publish.permissions import check_privacy, connect
from quantool.publish.refs import BRANCH
from quantool.publish.upload import announced, operation, send
from quantool.publish.verify import compare, is_same, listed
from quantool.records import FileRecord, Publication
from quantool.runtime.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo
    from huggingface_hub.hf_api import RepoFile

LOST = "LFS pointer pointed to a file that does not exist"
"""What the Hub says of a commit that names a large file it does not have."""


class SpoiledError(PublicationError):
    """The Hub does not have what was uploaded, or has it otherwise: it must be sent again.

    ``names`` are the files, as far as they are known; none stands for all.
    """

    def __init__(self, message: str, *, hint: str = "", names: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.names = names


@dataclass(frozen=True)
class Push:
    """One push: the folder, and where it goes."""

    api: HfApi
    repo_id: str
    parcel: Parcel
    progress: Progress
    parent: str
    """The commit of the branch that ours is made on."""
    has_branch: bool
    """Whether the branch is there; if not, it is made from ``main`` at the moment of the commit."""
    before: Mapping[str, RepoFile]
    """The files of ``parent``."""
    new: tuple[FileRecord, ...]
    """Files that ``parent`` lacks or has otherwise."""

    @property
    def branch(self) -> str:
        """The branch that is published to."""
        return self.parcel.settings.revision

    @property
    def as_request(self) -> bool:
        """Whether a pull request is to be opened."""
        return self.parcel.settings.mode == "pull_request"


@dataclass(frozen=True)
class Landed:
    """Where the files are: a commit, and the branch or pull request that shows it."""

    commit: str
    revision: str
    request: int | None = None


def publish(parcel: Parcel, repo_id: str, *, private: bool | None, progress: Progress) -> Publication:
    """Make a branch of ``repo_id``, or a pull request against it, hold the files of a parcel, and compare them there.

    The repository is created when missing: private unless ``private`` is False. A second call commits nothing, opens
    no second pull request, and does what the first one did not come to. Raises PublicationError when the folder is not
    what was judged, or the Hub refuses or stores something else; the branch then is what it was.
    """
    files = hash_files(parcel, progress)
    api = connect()
    with retold(progress):
        info = opened(api, repo_id, private)
        push = _prepared(api, repo_id, info, parcel, files, progress)
        landed = _land(push)
        read_back = _proven(push, landed, files)
        _finish(push, landed)
    place = f"discussions/{landed.request}" if landed.request else f"tree/{landed.commit}"
    return Publication(
        repo_id=repo_id,
        revision=landed.revision,
        commit=landed.commit,
        parent=push.parent,
        url=f"{api.endpoint}/{repo_id}/{place}",
        private=bool(info.private),
        tag=parcel.settings.tag,
        collection=parcel.settings.collection,
        allow_regression=bool(parcel.failed),
        files=files,
        sent=tuple(file.name for file in push.new),
        read_back=read_back,
    )


def opened(api: HfApi, repo_id: str, private: bool | None) -> ModelInfo:
    """The repository, created when missing."""
    info = refs.find(api, repo_id)
    if info is None:
        with asking(f"create {repo_id}"):
            api.create_repo(repo_id, private=private is not False, exist_ok=True)
        info = refs.find(api, repo_id)
    check_privacy(repo_id, info, private)
    if info is None or info.sha is None:
        raise PublicationError(
            f"{repo_id} was created, but the Hub shows no {BRANCH}", hint="run again in a minute"
        )
    return info


def _prepared(
    api: HfApi,
    repo_id: str,
    info: ModelInfo,
    parcel: Parcel,
    files: Sequence[FileRecord],
    progress: Progress,
) -> Push:
    """List what is there and tell what is new."""
    at = (
        str(info.sha)
        if parcel.settings.revision == BRANCH
        else refs.head(api, repo_id, parcel.settings.revision)
    )
    parent = at or str(info.sha)
    before = listed(api, repo_id, parent)
    new = tuple(file for file in files if not is_same(before.get(file.name), file, parcel.folder))
    if parcel.settings.tag is not None:
        there = refs.tag_at(api, repo_id, parcel.settings.tag)
        refs.require_tag_at(parcel.settings.tag, there, None if new else parent, repo_id)
    return Push(api, repo_id, parcel, progress, parent, at is not None, before, new)


def _land(push: Push) -> Landed:
    """Upload what is new and make the one commit; an open pull request that shows the same files is taken as it is."""
    if not push.new:
        if not push.has_branch and not push.as_request:
            refs.make_branch(push.api, push.repo_id, push.branch, push.parent)
        return Landed(push.parent, push.branch)
    if push.as_request and (found := _earlier_request(push)) is not None:
        return found
    uploads = push.parcel.uploads
    here = [file for file in push.new if file.name not in uploads]
    target = (push.branch if push.has_branch else BRANCH, push.as_request)
    additions = send(push.api, push.repo_id, push.parcel.folder, here, target, push.progress)
    additions += [operation(uploads[file.name]) for file in push.new if file.name in uploads]
    if not push.has_branch:
        refs.make_branch(push.api, push.repo_id, push.branch, push.parent)
    return _commit(push, additions)


def _earlier_request(push: Push) -> Landed | None:
    """The open pull request of an earlier try: one with our title whose files are ours."""
    for number in refs.open_requests(push.api, push.repo_id, push.parcel.title):
        revision = f"refs/pr/{number}"
        commit = refs.head(push.api, push.repo_id, revision)
        there = listed(push.api, push.repo_id, commit) if commit else {}
        if commit and all(is_same(there.get(file.name), file, push.parcel.folder) for file in push.new):
            push.progress.say(f"pull request {number} of {push.repo_id} has these files already")
            return Landed(commit, revision, number)
        push.progress.warn(
            f"{push.repo_id}: the open pull request {number} has the same title and other files; it is left alone"
        )
    return None


def _commit(push: Push, additions: Sequence[CommitOperationAdd]) -> Landed:
    """One commit on the parent. When its answer is lost or late, what the Hub holds tells whether it was made."""
    try:
        with asking(f"commit to {push.repo_id}"):
            made = push.api.create_commit(
                push.repo_id,
                additions,
                commit_message=push.parcel.title,
                commit_description=push.parcel.description,
                revision=push.branch,
                parent_commit=push.parent,
                create_pr=push.as_request,
                num_threads=1,
            )
        return Landed(str(made.oid), made.pr_revision or push.branch, made.pr_num)
    except PublicationError as error:
        with suppress(PublicationError):  # the first error is the one to tell
            if found := _earlier_request(push) if push.as_request else _made_all_the_same(push):
                return found
        if LOST in error.message and push.parcel.uploads:
            raise SpoiledError(
                error.message, hint="run again: what is missing is made and sent again"
            ) from error
        raise


def _made_all_the_same(push: Push) -> Landed | None:
    at = refs.head(push.api, push.repo_id, push.branch)
    there = listed(push.api, push.repo_id, at) if at not in (None, push.parent) else {}
    if at and all(is_same(there.get(file.name), file, push.parcel.folder) for file in push.new):
        return Landed(at, push.branch)
    return None


def _proven(push: Push, landed: Landed, files: Sequence[FileRecord]) -> tuple[str, ...]:
    """Names of the files read back in part; what is not what was sent is taken back."""
    try:
        with announced(push.progress, f"verify {push.repo_id}"):
            read_back = compare(push.api, push.repo_id, landed.commit, files, push.parcel)
    except PublicationError as error:
        shown = f"pull request {landed.request} of {push.repo_id}" if landed.request else push.repo_id
        raise PublicationError(
            f"{shown} is at {landed.commit} now, but could not be verified: {error.message}",
            hint=f"run again: that only verifies, nothing is sent twice{_open_ends(push)}",
        ) from error
    if isinstance(read_back, str):
        raise _withdraw(push, landed, read_back)
    return read_back


def _open_ends(push: Push) -> str:
    settings = push.parcel.settings
    waiting = [name for name, value in (("tag", settings.tag), ("collection", settings.collection)) if value]
    return f"; then {' and '.join(waiting)} follow" if waiting else ""


def _finish(push: Push, landed: Landed) -> None:
    """Tag, then collection; each error says how far it went."""
    settings, done = push.parcel.settings, f"{push.repo_id} is at {landed.commit} and verified"
    if settings.tag is not None:
        try:
            refs.set_tag(push.api, push.repo_id, settings.tag, landed.commit)
        except PublicationError as error:
            missing = ", nor is it in the collection" if settings.collection else ""
            raise PublicationError(
                f"{done}, but the tag {settings.tag} is not set{missing}: {error.message}",
                hint=f"{error.hint}. Run again afterwards: nothing is sent twice",
            ) from error
        done += f" and tagged {settings.tag}"
    if settings.collection is not None:
        try:
            refs.add_to_collection(push.api, push.repo_id, settings.collection)
        except PublicationError as error:
            raise PublicationError(
                f"{done}, but not in the collection: {error.message}",
                hint=f"{error.hint}. Run again afterwards: nothing is sent twice",
            ) from error


def _withdraw(push: Push, landed: Landed, differing: str) -> PublicationError:
    """Put the files that the commit touched back to what they were, or close the request; the error to raise."""
    told = f"{push.repo_id}: the Hub does not hold what was sent: {differing}"
    again = "run again; if it happens twice, tell the Hub"
    names = [file.name for file in push.new if f"{file.name}: " in differing]
    if landed.request is not None:
        try:
            refs.close_request(push.api, push.repo_id, landed.request, f"The upload was damaged: {differing}")
        except PublicationError as error:
            return PublicationError(
                f"{told}. Pull request {landed.request} could not be closed: {error.message}",
                hint=f"close it on the Hub and do not merge it; {push.branch} is what it was",
            )
        return SpoiledError(
            f"{told}. Pull request {landed.request} is closed, {push.branch} is what it was",
            hint=again,
            names=names,
        )
    if not push.new:
        return PublicationError(
            told, hint=f"{landed.revision} is at {landed.commit}; delete these files there and publish again"
        )
    try:
        _put_back(push, landed.commit)
    except PublicationError as error:
        return PublicationError(
            f"{told}. It could not be taken back: {error.message}",
            hint=f"{landed.revision} shows the damaged commit {landed.commit}: revert it there at once",
        )
    return SpoiledError(
        f"{told}. {landed.revision} shows the files of {push.parent} again", hint=again, names=names
    )


def _put_back(push: Push, commit: str) -> None:
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    operations = [
        CommitOperationCopy(file.name, file.name, src_revision=push.parent)
        if file.name in push.before
        else CommitOperationDelete(file.name)
        for file in push.new
    ]
    with asking(f"take {commit} back"):
        push.api.create_commit(
            push.repo_id,
            operations,
            commit_message="Take back: the upload was damaged",
            revision=push.branch,
            parent_commit=commit,
        )
