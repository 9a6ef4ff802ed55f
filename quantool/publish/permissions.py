"""Whether the Hub would take what a run makes: asked before any work, so that hours later only the Hub can refuse."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantool import __version__
from quantool.config.schema import Publish
from quantool.errors import PublicationError
from quantool.hub.client import LOG_IN, publishing
from quantool.hub.errors import hub_call, unreadable
from quantool.publish.refs import ASK_WHO, check_collection, check_names, check_refs, find

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

EXCHANGE = "HF_OIDC_RESOURCE"
"""Names the repository that a CI job gets a token for without having a secret (Hub: trusted publishers)."""


def preflight(wanted: Mapping[str, bool | None], settings: Publish | None = None) -> None:
    """Refuse what could not be published in the end, before any work: repository ids, and whether each is private.

    Asks who the token belongs to and what it may do, and whether branch, tag and collection can be as ``settings`` have
    them. Raises PublicationError.
    """
    from huggingface_hub import is_offline_mode

    settings = settings or Publish()
    if is_offline_mode():
        raise PublicationError(
            "nothing can be published while HF_HUB_OFFLINE is set",
            hint="unset it, or set push_to_hub to false and run `quantool publish` later",
        )
    _check_names(tuple(wanted))
    check_names(settings)
    with publishing(settings.connect_timeout, settings.read_timeout):
        _ask(wanted, settings)


def _ask(wanted: Mapping[str, bool | None], settings: Publish) -> None:
    from huggingface_hub import get_token

    api, who = connect(), None
    if os.environ.get(EXCHANGE):  # such a token belongs to a repository, not to a person
        _exchange(tuple(wanted))
    else:
        with hub_call("log in to the Hub"):
            token = get_token()
        if not token:
            raise PublicationError(
                "there is no token to publish with", hint=f"{LOG_IN}; it needs write access"
            )
        with hub_call(ASK_WHO):
            who = api.whoami()
        if not isinstance(who, dict):
            raise unreadable(ASK_WHO)
    for repo_id, private in wanted.items():
        found = find(api, repo_id)
        if who is not None:
            with hub_call(ASK_WHO):
                as_guest = settings.mode == "pull_request" and found is not None
                why = lacks_for_request(who) if as_guest else lacks(who, repo_id)
            if why:
                raise PublicationError(
                    f"the token cannot write to {repo_id}: {why}",
                    hint="make one with write access to it at Settings, Access Tokens, and set HF_TOKEN",
                )
        check_privacy(repo_id, found, private)
        check_refs(api, repo_id, found, settings)
    if settings.collection is not None:
        check_collection(api, settings.collection, who)


def _exchange(repo_ids: Sequence[str]) -> None:
    """Get the token of a CI job from the Hub; it can write to the one repository that the job names."""
    from huggingface_hub import get_token

    resource = os.environ[EXCHANGE]
    if others := [repo_id for repo_id in repo_ids if repo_id.lower() != resource.lower()]:
        raise PublicationError(
            f"{EXCHANGE} is {resource}, which gives no access to {', '.join(others)}",
            hint="set it to the repository that is published, one a job; or unset it and set HF_TOKEN",
        )
    try:
        with hub_call(f"exchange the job's identity for a token ({EXCHANGE})"):
            get_token()
    except PublicationError as error:
        raise PublicationError(
            error.message,
            hint=f"{resource} must trust this workflow (its settings, trusted publishers), and the job needs "
            "`permissions: id-token: write` on GitHub or an HF_OIDC_ID_TOKEN elsewhere",
        ) from error


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


def lacks_for_request(who: Mapping[str, Any]) -> str:
    """What speaks against opening a pull request, which needs no write access to the repository."""
    token = who.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        return "it is a read token"
    if token.get("role") == "fineGrained":
        granted = token.get("fineGrained", {})
        lists = [granted.get("global", ()), *(scope["permissions"] for scope in granted.get("scoped", ()))]
        if not any({"repo.write", "discussion.write"} & set(permissions) for permissions in lists):
            return "it is a fine-grained one without discussion.write"
    return ""


def connect() -> HfApi:
    """The client; it looks the token up at every request, since that of a long run may be renewed."""
    from huggingface_hub import HfApi

    return HfApi(token=True, library_name="quantool", library_version=__version__)


def check_privacy(repo_id: str, found: ModelInfo | None, private: bool | None) -> None:
    """PublicationError when what is to be private would go to a public repository."""
    if found is not None and private and not found.private:
        raise PublicationError(
            f"{repo_id} exists and is public, while it was to be private",
            hint="set private to false (--public), or make the repository private in its settings",
        )
