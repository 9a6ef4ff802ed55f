"""Publishing to the Hub: the large files first, one commit, then a look at what is there.

Nothing can be seen before the commit, and the Hub refuses it when the branch has moved since it was listed. What the
branch has already is not sent again; what else it has stays. A pull request leaves its branch alone: it is opened by
that one commit, and closed again when the upload was damaged. Tag and collection come last, when all was compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantool.errors import PublicationError
from quantool.hub.errors import HubRefusedError, client_warnings, hub_call
from quantool.publish import refs
from quantool.publish.commit import CommitLocation, Line, Message, check_card, large_file, post_commit
from quantool.publish.packed_folder import CARD, OutgoingFile, PackedFolder
from quantool.publish.permissions import check_privacy, connect
from quantool.publish.refs import BRANCH
from quantool.publish.take_back import take_back
from quantool.publish.upload import upload, upload_bar
from quantool.publish.verify import Mismatch, compare, is_same, list_files, looks
from quantool.records import Publication
from quantool.runtime.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo
    from huggingface_hub.hf_api import RepoFile

MISSING_OBJECT = "LFS pointer pointed to a file that does not exist"
"""What the Hub says of a commit that names a large file it does not have."""


class DamagedUploadError(PublicationError):
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
    packed: PackedFolder
    progress: Progress
    parent: str
    """The commit of the branch that ours is made on."""
    has_branch: bool
    """Whether the branch is there; if not, it is made from ``main`` at the moment of the commit."""
    before: Mapping[str, RepoFile]
    """The files of ``parent``."""
    new: tuple[OutgoingFile, ...]
    """Files that ``parent`` lacks or has otherwise."""

    @property
    def branch(self) -> str:
        """The branch that is published to."""
        return self.packed.settings.revision

    @property
    def as_request(self) -> bool:
        """Whether a pull request is to be opened."""
        return self.packed.settings.mode == "pull_request"

    @property
    def message(self) -> Message:
        """What the commit says of itself."""
        return Message(self.packed.title, self.packed.description)


def push(
    packed: PackedFolder,
    files: Sequence[OutgoingFile],
    repo_id: str,
    *,
    private: bool | None,
    progress: Progress,
) -> Publication:
    """Make a branch of ``repo_id``, or a pull request against it, hold ``files``, and compare them there.

    The repository is created when missing: private unless ``private`` is False. A second call commits nothing, opens
    no second pull request, and does what the first one did not come to. Raises PublicationError when the Hub refuses
    or stores something else; the branch then is what it was, or the message says what it shows.
    """
    api = connect()
    with client_warnings(progress):
        info = ensure_repository(api, repo_id, private)
        work = _prepare(api, repo_id, info, packed, files, progress)
        location = _upload_and_commit(work)
        if work.new:
            _verify(work, location, files)
        _set_tag_and_collection(work, location)
    place = f"discussions/{location.request}" if location.request else f"tree/{location.commit}"
    return Publication(
        repo_id=repo_id,
        revision=location.revision,
        commit=location.commit,
        parent=work.parent,
        url=f"{api.endpoint}/{repo_id}/{place}",
        private=bool(info.private),
        tag=packed.settings.tag,
        collection=packed.settings.collection,
        allow_regression=bool(packed.failed),
        files=tuple(file.record for file in files),
        sent=tuple(file.name for file in work.new),
    )


def ensure_repository(api: HfApi, repo_id: str, private: bool | None) -> ModelInfo:
    """The repository, created when missing."""
    info = refs.find(api, repo_id)
    if info is None:
        with hub_call(f"create {repo_id}"):
            api.create_repo(repo_id, private=private is not False, exist_ok=True)
        info = refs.find(api, repo_id)
    check_privacy(repo_id, info, private)
    if info is None:
        raise PublicationError(
            f"{repo_id} was created, but the Hub shows no {BRANCH}", hint="run again in a minute"
        )
    return info


def _prepare(
    api: HfApi,
    repo_id: str,
    info: ModelInfo,
    packed: PackedFolder,
    files: Sequence[OutgoingFile],
    progress: Progress,
) -> Push:
    """List what is there and tell what is new; what the Hub would refuse is refused before the upload."""
    settings = packed.settings
    head = str(info.sha) if settings.revision == BRANCH else refs.head(api, repo_id, settings.revision)
    parent = head or str(info.sha)
    before = list_files(api, repo_id, parent)
    new = tuple(file for file in files if not is_same(before.get(file.name), file))
    if settings.tag is not None:
        there = refs.tag_at(api, repo_id, settings.tag)
        refs.require_tag_at(settings.tag, there, None if new else parent, repo_id)
    for card in (file.content for file in new if file.name == CARD):
        if card is not None:
            check_card(api, card, progress)
    return Push(api, repo_id, packed, progress, parent, head is not None, before, new)


def _upload_and_commit(push: Push) -> CommitLocation:
    """Upload what is new and make the one commit; an open pull request that shows the same files is taken as it is."""
    if not push.new:
        if not push.has_branch and not push.as_request:
            refs.make_branch(push.api, push.repo_id, push.branch, push.parent)
        return CommitLocation(push.parent, push.branch)
    if push.as_request and (earlier := _earlier_request(push)) is not None:
        return earlier
    uploaded = push.packed.uploaded
    here = [file for file in push.new if file.name not in uploaded]
    target = (push.branch if push.has_branch else BRANCH, push.as_request)
    lines = upload(push.api, push.repo_id, push.packed.folder, here, target, push.progress)
    lines += [
        large_file(file.name, file.record.sha256, file.record.bytes)
        for file in push.new
        if file.name in uploaded
    ]
    if not push.has_branch:
        refs.make_branch(push.api, push.repo_id, push.branch, push.parent)
    return _commit(push, lines)


def _earlier_request(push: Push) -> CommitLocation | None:
    """The open pull request of an earlier try: one with our title whose files are ours."""
    for number in refs.open_requests(push.api, push.repo_id, push.packed.title):
        revision = f"refs/pr/{number}"
        commit = refs.head(push.api, push.repo_id, revision)
        there = list_files(push.api, push.repo_id, commit) if commit else {}
        if commit and all(is_same(there.get(file.name), file) for file in push.new):
            push.progress.say(f"pull request {number} of {push.repo_id} has these files already")
            return CommitLocation(commit, revision, number)
        push.progress.warn(
            f"{push.repo_id}: the open pull request {number} has the same title and other files; it is left alone"
        )
    return None


def _commit(push: Push, lines: Sequence[Line]) -> CommitLocation:
    """One commit on the parent. When its answer is lost, late or odd, what the Hub holds tells whether it was made."""
    try:
        return post_commit(
            push.api, push.repo_id, lines, push.message, push.parent, (push.branch, push.as_request)
        )
    except PublicationError as error:
        is_refused = isinstance(error, HubRefusedError) and error.status < 500
        with suppress(PublicationError):  # the first error is the one to tell
            if (location := _unanswered_commit(push, once=is_refused)) is not None:
                return location
        if MISSING_OBJECT in error.message and push.packed.uploaded:
            raise DamagedUploadError(
                error.message, hint="run again: what is missing is made and sent again"
            ) from error
        if is_refused:
            raise
        raise PublicationError(
            error.message,
            hint=f"{error.hint}. If the commit was made all the same, {push.api.endpoint}/{push.repo_id}/commits/"
            f"{push.branch} shows it, and the next run finds it",
        ) from error


def _unanswered_commit(push: Push, *, once: bool) -> CommitLocation | None:
    """The commit or pull request whose answer did not arrive, as soon as the Hub shows it."""
    for _ in looks():
        location = _earlier_request(push) if push.as_request else _advanced_branch(push)
        if location is not None or once:
            return location
    return None


def _advanced_branch(push: Push) -> CommitLocation | None:
    head = refs.head(push.api, push.repo_id, push.branch)
    there = list_files(push.api, push.repo_id, head) if head not in (None, push.parent) else {}
    if head and all(is_same(there.get(file.name), file) for file in push.new):
        return CommitLocation(head, push.branch)
    return None


def _verify(push: Push, location: CommitLocation, files: Sequence[OutgoingFile]) -> None:
    """Compare what the Hub lists with what was sent; what is proven to be damaged is taken back."""
    shown = f"pull request {location.request} of {push.repo_id}" if location.request else push.repo_id
    hint = f"run again: that only verifies, nothing is sent twice{_still_to_do(push)}"
    try:
        with upload_bar(push.progress, f"verify {push.repo_id}"):
            mismatch = compare(push.api, push.repo_id, location.commit, files, push.before)
    except PublicationError as error:
        raise PublicationError(
            f"{shown} is at {location.commit} now, but could not be verified: {error.message}", hint=hint
        ) from error
    if mismatch is None:
        return
    if not mismatch.is_proven:
        raise PublicationError(
            f"{shown} is at {location.commit} now, but the Hub does not list all that was sent: {mismatch}",
            hint=f"nothing was taken back, as its list may be an old one: compare {push.api.endpoint}/{push.repo_id}"
            f"/tree/{location.commit} with {push.packed.folder}/SHA256SUMS, or {hint}",
        )
    raise _withdraw(push, location, mismatch)


def _still_to_do(push: Push) -> str:
    settings = push.packed.settings
    waiting = [name for name, value in (("tag", settings.tag), ("collection", settings.collection)) if value]
    return f"; then {' and '.join(waiting)} follow" if waiting else ""


def _set_tag_and_collection(push: Push, location: CommitLocation) -> None:
    """Tag, then collection; each error says how far it went."""
    settings, done = push.packed.settings, f"{push.repo_id} is at {location.commit} and verified"
    if settings.tag is not None:
        try:
            refs.set_tag(push.api, push.repo_id, settings.tag, location.commit)
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


def _withdraw(push: Push, location: CommitLocation, mismatch: Mismatch) -> PublicationError:
    """Put the files that the commit touched back to what they were, or close the request; the error to raise."""
    what = f"{push.repo_id}: the Hub does not hold what was sent: {mismatch}"
    again = "run again; if it happens twice, tell the Hub"
    names = tuple(mismatch.files)
    if location.request is not None:
        try:
            refs.close_request(
                push.api, push.repo_id, location.request, f"The upload was damaged: {mismatch}"
            )
        except PublicationError as error:
            return DamagedUploadError(
                f"{what}. Pull request {location.request} could not be closed: {error.message}",
                hint=f"close it on the Hub and do not merge it; {push.branch} is what it was",
                names=names,
            )
        return DamagedUploadError(
            f"{what}. Pull request {location.request} is closed, {push.branch} is what it was",
            hint=again,
            names=names,
        )
    try:
        take_back(
            push.api, push.repo_id, location, push.parent, push.before, [file.name for file in push.new]
        )
    except PublicationError as error:
        return DamagedUploadError(
            f"{what}. It could not be taken back: {error.message}",
            hint=f"{location.revision} shows the damaged commit {location.commit} unless its page says otherwise: put "
            f"the files of {push.parent} back there, or run again, which sends the damaged ones anew",
            names=names,
        )
    return DamagedUploadError(
        f"{what}. {location.revision} shows the files of {push.parent} again", hint=again, names=names
    )
