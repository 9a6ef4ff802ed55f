"""One commit on the Hub, line by line: the very bytes that were hashed, and the large files by their hashes.

The client's ``create_commit`` needs every file at hand, and reads small ones when it sends them. This is the request
that it makes (huggingface_hub 1.33 and 2.4, ``_commit_api.py``; the Hub's OpenAPI description has it as
``POST /api/models/{namespace}/{repo}/commit/{rev}``).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from quantool.errors import PublicationError
from quantool.hub.client import headers
from quantool.hub.errors import hub_call, scrub, unreadable
from quantool.publish.refs import COMMIT
from quantool.runtime.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Line = dict[str, Any]
"""One change of a commit as the Hub reads it."""


@dataclass(frozen=True)
class Message:
    """What a commit says of itself; ``title`` is also that of a pull request."""

    title: str
    description: str = ""


@dataclass(frozen=True)
class CommitLocation:
    """A commit, and the branch or pull request that shows it."""

    commit: str
    revision: str
    request: int | None = None


def small_file(name: str, content: bytes) -> Line:
    """A file that goes into git."""
    value = {"content": base64.b64encode(content).decode(), "path": name, "encoding": "base64"}
    return {"key": "file", "value": value}


def large_file(name: str, sha256: str, size: int) -> Line:
    """A file that the Hub's storage of large files has already."""
    return {"key": "lfsFile", "value": {"path": name, "algo": "sha256", "oid": sha256, "size": size}}


def deletion(name: str) -> Line:
    """A file that the commit removes."""
    return {"key": "deletedFile", "value": {"path": name}}


def post_commit(
    api: HfApi,
    repo_id: str,
    lines: Sequence[Line],
    message: Message,
    parent: str,
    target: tuple[str, bool],
) -> CommitLocation:
    """Make a commit on ``parent``; the Hub refuses it when the branch is no longer there.

    ``target`` is the branch, and whether a pull request is to be opened against it. Raises PublicationError, after
    which the commit may have been made: an answer can be lost.
    """
    branch, as_request = target
    what = f"commit to {repo_id}"
    header = {"summary": message.title, "description": message.description, "parentCommit": parent}
    body = b"".join(
        json.dumps(line).encode() + b"\n" for line in ({"key": "header", "value": header}, *lines)
    )
    with hub_call(what):
        answer = _post(
            api,
            f"/api/models/{repo_id}/commit/{quote(branch, safe='')}" + ("?create_pr=1" if as_request else ""),
            body,
            "application/x-ndjson",
        )
        commit = answer["commitOid"]
        address = str(answer["pullRequestUrl"]) if as_request else ""
    number = re.search(r"/discussions/(\d+)$", address)
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit) or as_request is (number is None):
        raise unreadable(what)
    if number is None:
        return CommitLocation(commit, branch)
    return CommitLocation(commit, f"refs/pr/{number[1]}", int(number[1]))


def check_card(api: HfApi, card: bytes, progress: Progress) -> None:
    """Let the Hub look at the card's front matter; PublicationError when it would not take it."""
    from huggingface_hub.errors import BadRequestError

    body = json.dumps({"content": card.decode(errors="replace"), "repoType": "model"}).encode()
    complaints: list[str] = []
    with hub_call("let the Hub check README.md"):
        try:
            answer = _post(api, "/api/validate-yaml", body, "application/json")
        except BadRequestError as error:
            answer = error.response.json()
            complaints = [str(entry["message"]) for entry in answer["errors"]] or ["no reason given"]
        remarks = [str(entry["message"]) for entry in answer.get("warnings", [])]
    if complaints:
        raise PublicationError(
            f"the Hub does not take README.md: {scrub('; '.join(complaints))}",
            hint="its front matter comes from the checkpoint's README.md, or from card.template",
        )
    for remark in remarks:
        progress.warn(f"the Hub on README.md: {scrub(remark)}")


def _post(api: HfApi, path: str, body: bytes, kind: str) -> dict[str, Any]:
    """The object that the Hub answers with; what the client and its HTTP library raise otherwise."""
    from huggingface_hub import get_session, hf_raise_for_status

    response = get_session().post(
        f"{api.endpoint}{path}", headers={**headers(), "Content-Type": kind}, content=body
    )
    hf_raise_for_status(response)
    answer = response.json()
    if not isinstance(answer, dict):
        raise TypeError("no object")
    return answer
