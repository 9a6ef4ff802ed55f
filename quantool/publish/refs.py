"""Branches, tags, pull requests and collections: where a commit goes, and what points at it afterwards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantool.config.schema import Publish
from quantool.errors import PublicationError
from quantool.hub.errors import hub_call, unreadable

if TYPE_CHECKING:
    from huggingface_hub import GitRefs, HfApi, ModelInfo

BRANCH = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
# git-check-ref-format(1), and nothing that looks like a commit
NAME = re.compile(
    r"(?![-/])(?![0-9a-f]{40}$)(?!.*(?:\.\.|//|/\.|@\{|\.lock(?:/|$)))[^\x00-\x20\x7f~^:?*\[\\]+(?<![./])"
)


ASK_WHO = "ask the Hub what the token may do"


def find(api: HfApi, repo_id: str, revision: str = BRANCH) -> ModelInfo | None:
    """The repository at the head of ``revision``; None when there is no such repository or no such revision."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    what = f"look at {repo_id}" + (f" at {revision}" if revision != BRANCH else "")
    with hub_call(what):
        try:
            info = api.model_info(repo_id, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
    if not (isinstance(info.sha, str) and COMMIT.fullmatch(info.sha) and isinstance(info.private, bool)):
        raise unreadable(what)
    return info


def head(api: HfApi, repo_id: str, revision: str) -> str | None:
    """The commit at the head of a branch; None when there is no such branch."""
    found = find(api, repo_id, revision)
    return None if found is None else str(found.sha)


def check_names(settings: Publish) -> None:
    """PublicationError for a branch or tag that git would not take."""
    for kind, name in (("branch", settings.revision), ("tag", settings.tag)):
        if name is not None and not (NAME.fullmatch(name) and name != "HEAD"):
            raise PublicationError(
                f"publish: {name!r} is no name for a {kind}",
                hint="letters, digits and . _ - / as git has them",
            )


def check_refs(api: HfApi, repo_id: str, found: ModelInfo | None, settings: Publish) -> None:
    """Refuse a branch that cannot be committed to, and a tag that stands elsewhere already: it is never moved."""
    if settings.revision == BRANCH and settings.tag is None:
        return
    if found is None:
        if settings.revision.startswith("refs/") or (
            settings.mode == "pull_request" and settings.revision != BRANCH
        ):
            raise _no_branch(repo_id, settings.revision)
        return
    refs = _refs(api, repo_id)
    branches = {branch.name for branch in refs.branches}
    special = settings.revision.startswith("refs/")
    if settings.revision not in branches and settings.revision in _tags(refs):
        raise PublicationError(
            f"publish.revision: {settings.revision} is a tag of {repo_id}",
            hint="name a branch; tags stay where they are",
        )
    as_request = settings.mode == "pull_request"
    there = settings.revision in branches or (
        special and not as_request and head(api, repo_id, settings.revision) is not None
    )
    if not there and (special or as_request):
        raise _no_branch(repo_id, settings.revision)
    if settings.tag is not None:
        at = head(api, repo_id, settings.revision) if there else str(found.sha)
        require_tag_at(settings.tag, _tags(refs).get(settings.tag), at, repo_id)


def _no_branch(repo_id: str, revision: str) -> PublicationError:
    return PublicationError(
        f"{repo_id} has no {revision}: there is nothing to open or extend a pull request against",
        hint="set publish.revision to a branch that is there; only mode: commit makes missing branches",
    )


def _refs(api: HfApi, repo_id: str) -> GitRefs:
    what = f"list the branches and tags of {repo_id}"
    with hub_call(what):
        refs = api.list_repo_refs(repo_id)
    texts = [text for ref in (*refs.branches, *refs.tags) for text in (ref.name, ref.target_commit)]
    if not all(isinstance(text, str) for text in texts):
        raise unreadable(what)
    return refs


def _tags(refs: GitRefs) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in refs.tags}


def tag_at(api: HfApi, repo_id: str, tag: str) -> str | None:
    """The commit of a tag; None when there is no such tag."""
    return _tags(_refs(api, repo_id)).get(tag)


def require_tag_at(tag: str, at: str | None, commit: str | None, repo_id: str) -> None:
    """PublicationError when the tag stands on another commit."""
    if at not in (None, commit):
        raise PublicationError(
            f"{repo_id} has a tag {tag} already, on commit {at}; a tag is never moved",
            hint="choose another publish.tag (--tag), or delete that one on the Hub",
        )


def check_collection(api: HfApi, slug: str, who: Mapping[str, Any] | None) -> None:
    """PublicationError when there is no such collection, or it is known to belong to somebody else."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", slug) is None:
        raise PublicationError(
            f"publish.collection: {slug!r} is no collection",
            hint="NAMESPACE/TITLE-ID, the end of its address",
        )
    with hub_call(f"look at the collection {slug}"):
        owner = api.get_collection(slug).slug.partition("/")[0].lower()
    if who is None:
        return
    with hub_call(ASK_WHO):
        own = {who["name"].lower()} | {org["name"].lower() for org in who.get("orgs", ())}
    if owner not in own:
        raise PublicationError(
            f"the collection {slug} belongs to {owner}, not to {who['name']} or an organization of theirs",
            hint="name a collection that this token may change",
        )


def make_branch(api: HfApi, repo_id: str, branch: str, start: str) -> None:
    """Create a branch at commit ``start``."""
    with hub_call(f"create the branch {branch} of {repo_id}"):
        api.create_branch(repo_id, branch=branch, revision=start)


def set_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Put the tag on the commit; PublicationError when it stands on another one."""
    at = tag_at(api, repo_id, tag)
    require_tag_at(tag, at, commit, repo_id)
    if at == commit:
        return
    try:
        with hub_call(f"set the tag {tag}"):
            api.create_tag(repo_id, tag=tag, revision=commit)
    except PublicationError:
        if tag_at(api, repo_id, tag) != commit:  # else it was set and the answer was lost
            raise


def add_to_collection(api: HfApi, repo_id: str, slug: str) -> None:
    """Add the repository, unless it is in the collection already."""
    with hub_call(f"add {repo_id} to the collection {slug}"):
        api.add_collection_item(slug, repo_id, "model", exists_ok=True)


def open_requests(api: HfApi, repo_id: str, title: str) -> list[int]:
    """Numbers of the open pull requests with this title, newest first."""
    with hub_call(f"list the pull requests of {repo_id}"):
        return sorted(
            (
                found.num
                for found in api.get_repo_discussions(
                    repo_id, discussion_type="pull_request", discussion_status="open"
                )
                if found.title == title
            ),
            reverse=True,
        )


def close_request(api: HfApi, repo_id: str, number: int, comment: str) -> None:
    """Close a pull request without merging it."""
    with hub_call(f"close pull request {number} of {repo_id}"):
        api.change_discussion_status(repo_id, number, "closed", comment=comment)
