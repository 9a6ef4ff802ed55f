"""Whether the Hub would take what a run makes: asked before any work, so that hours later only the Hub can refuse."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantool import __version__
from quantool.errors import PublicationError
from quantool.refusal import asking
from quantool.snapshot import LOG_IN

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

BRANCH = "main"


def preflight(wanted: Mapping[str, bool | None]) -> None:
    """Refuse what could not be published in the end, before any work: repository ids, and whether each is private.

    Asks who the token belongs to and what it may do. Raises PublicationError.
    """
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise PublicationError(
            "nothing can be published while HF_HUB_OFFLINE is set",
            hint="unset it, or set push_to_hub to false and run `quantool publish` later",
        )
    _check_names(tuple(wanted))
    with asking("log in to the Hub"):
        token = get_token()
    if not token:
        raise PublicationError("there is no token to publish with", hint=f"{LOG_IN}; it needs write access")
    api = connect()
    if not os.environ.get(
        "HF_OIDC_RESOURCE"
    ):  # a token of that exchange belongs to a repository, not to a person
        with asking("ask the Hub what the token may do"):
            who = api.whoami()
        for repo_id in wanted:
            if why := lacks(who, repo_id):
                raise PublicationError(
                    f"the token cannot write to {repo_id}: {why}",
                    hint="make one with write access to it at Settings, Access Tokens, and set HF_TOKEN",
                )
    for repo_id, private in wanted.items():
        check_privacy(repo_id, find(api, repo_id), private)


def _check_names(repo_ids: Sequence[str]) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    for repo_id in repo_ids:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise PublicationError(
                f"{repo_id!r} is no name for a repository",
                hint="NAMESPACE/NAME, of letters, digits and . _ -",
            ) from error
        if "/" not in repo_id:
            raise PublicationError(
                f"repo_id {repo_id!r} names no user or organization", hint=f"write it as NAMESPACE/{repo_id}"
            )
    folders = [repo_id.rpartition("/")[2] for repo_id in repo_ids]
    if len(set(folders)) < len(folders):
        raise PublicationError(
            f"{', '.join(repo_ids)}: repositories of one run need different names after the slash",
            hint="each gets a folder of that name below output_path",
        )


def lacks(who: Mapping[str, Any], repo_id: str) -> str:
    """What the answer of whoami-v2 says against writing to ``repo_id``; empty when nothing does.

    A fine-grained token needs ``repo.write`` on the repository or on its namespace. A kind of token that the answer
    does not describe is left to the Hub to judge.
    """
    namespace = repo_id.partition("/")[0].lower()
    token = who.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        return "it is a read token"
    if token.get("role") == "fineGrained":
        granted = {
            (scope["entity"]["type"], scope["entity"]["name"].lower())
            for scope in token.get("fineGrained", {}).get("scoped", ())
            if "repo.write" in scope["permissions"]
        }
        if ("model", repo_id.lower()) in granted:
            return ""
        if not granted & {("user", namespace), ("org", namespace)}:
            return f"it is a fine-grained one without repo.write on {repo_id} or {namespace}"
    if namespace == who["name"].lower():
        return ""
    roles = {org["name"].lower(): org.get("roleInOrg") for org in who.get("orgs", ())}
    if namespace not in roles:
        return f"it belongs to {who['name']}, who is no member of {namespace}"
    if roles[namespace] in ("read", "no_access"):
        return f"{who['name']} may only read in {namespace}"
    return ""


def connect() -> HfApi:
    """The client; it looks the token up at every request, since that of a long run may be renewed."""
    from huggingface_hub import HfApi

    return HfApi(token=True, library_name="quantool", library_version=__version__)


def find(api: HfApi, repo_id: str) -> ModelInfo | None:
    """The repository at the head of ``main``; None when there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking(f"look at {repo_id}"):
        try:
            return api.model_info(repo_id, revision=BRANCH)
        except RepositoryNotFoundError:
            return None


def check_privacy(repo_id: str, found: ModelInfo | None, private: bool | None) -> None:
    """PublicationError when what is to be private would go to a public repository."""
    if found is not None and private and not found.private:
        raise PublicationError(
            f"{repo_id} exists and is public, while it was to be private",
            hint="set private to false (--public), or make the repository private in its settings",
        )
