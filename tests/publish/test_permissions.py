"""CI without secrets: the client exchanges the job's identity for a token of the Hub (HF_OIDC_RESOURCE)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.utils._auth
import pytest

from quantool.hub.errors import scrub
from tests.loopback import OTHERS, REPO, content
from tests.loopback_hub import Fault, Repository
from tests.pushing import WritableHub

IDENTITY = "canary-identity-of-the-job"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own PUT


@pytest.fixture(autouse=True)
def job(hub: WritableHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CI job that the repository trusts, without a token."""
    hub.repositories[REPO] = Repository(dict(OTHERS))
    hub.trusted[IDENTITY] = REPO
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", REPO)
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", IDENTITY)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setattr(huggingface_hub.utils._auth, "_OIDC_TOKEN_CACHE", None)
    yield
    huggingface_hub.utils._auth._OIDC_TOKEN_CACHE = None


def test_a_job_publishes_without_a_secret(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    ended = publish("--tag", "v1")
    assert ended.code == 0, ended.err
    assert hub.repositories[REPO].files == OTHERS | content(folder)
    (asked,) = hub.sent("POST", "/oauth/token")
    assert json.loads(asked.body)["resource"] == REPO
    assert hub.sent("GET", "/api/whoami-v2") == []  # such a token belongs to nobody
    written = [path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()]
    for secret in (IDENTITY, hub.token):
        assert secret not in ended.out + ended.err
        assert not any(secret.encode() in found for found in written)


@pytest.mark.parametrize("status", [500, 429])
def test_the_exchange_may_fail(publish: Callable[..., Any], hub: WritableHub, status: int) -> None:
    hub.faults = [Fault("POST /oauth/token", status=status, text=f"cannot look at {IDENTITY}")]
    ended = publish()
    assert (ended.code, f"answers {status} (cannot look at …)" in ended.err) == (6, True), ended.err
    assert IDENTITY not in ended.err
    assert hub.repositories[REPO].files == OTHERS
    assert publish().code == 0


def test_a_repository_that_does_not_trust_the_job(publish: Callable[..., Any], hub: WritableHub) -> None:
    hub.trusted.clear()
    ended = publish()
    assert (ended.code, "answers 403" in ended.err) == (6, True), ended.err
    assert f"{REPO} must trust this workflow" in ended.err


def test_no_identity_at_all(
    publish: Callable[..., Any], hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_OIDC_ID_TOKEN")
    ended = publish()
    assert (ended.code, "no OIDC id token is available" in ended.err) == (6, True), ended.err
    assert "id-token: write" in ended.err
    assert hub.asked == []


def test_a_token_for_another_repository_is_no_use(publish: Callable[..., Any], hub: WritableHub) -> None:
    ended = publish("--repo-id", "org/other")
    assert (ended.code, f"HF_OIDC_RESOURCE is {REPO}, which gives no access to org/other" in ended.err) == (
        6,
        True,
    )
    assert hub.asked == []


def test_the_identity_is_taken_out_of_messages() -> None:
    assert scrub(f"for {IDENTITY} only") == "for … only"
