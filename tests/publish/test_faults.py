"""Every endpoint failing in turn: nothing partial on main, the exit code and message right, the retry completing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.loopback import ALWAYS, OTHERS, REPO, content
from tests.loopback_hub import Fault, Repository
from tests.pushing import WritableHub

SLUG = "org/mine-64f9a55bb3115b4f513ec026"
PARENT = "1" * 40
WHOLE = ("--tag", "v1", "--collection", SLUG)
BRANCH = ("--revision", "next")
REQUEST = ("--mode", "pull_request")

ENDPOINTS = [
    # what fails, how it is published, words of the message, whether main is complete by then
    ("GET /api/whoami-v2", WHOLE, "ask the Hub what the token may do", False),
    ("GET .*/revision/main", WHOLE, "look at org/model-FAKE", False),
    ("GET .*/refs", WHOLE, "list the branches and tags of", False),
    (f"GET /api/collections/{SLUG}", WHOLE, "look at the collection", False),
    ("POST /api/repos/create", WHOLE, "create org/model-FAKE", False),
    (f"GET .*/tree/{PARENT}", WHOLE, "list org/model-FAKE at 111", False),
    ("POST .*/preupload/", WHOLE, "upload model-Q4_K_M.gguf to", False),
    ("POST .*/objects/batch", WHOLE, "upload model-Q4_K_M.gguf to", False),
    (r"PUT /objects/\w+$", WHOLE, "upload model-Q4_K_M.gguf to", False),
    ("POST /verify", WHOLE, "upload model-Q4_K_M.gguf to", False),
    (r"PUT /objects/\w+/2", WHOLE, "upload model-Q4_K_M.gguf to", False),
    (r"POST /complete/", WHOLE, "upload model-Q4_K_M.gguf to", False),
    ("POST /api/validate-yaml", WHOLE, "let the Hub check README.md", False),
    ("POST .*/commit/main", WHOLE, "commit to org/model-FAKE", False),
    (f"GET .*/tree/(?!{PARENT})", WHOLE, "could not be verified: list", True),
    ("POST .*/tag/", WHOLE, "but the tag v1 is not set, nor is it in the collection", True),
    ("POST /api/collections/.*/items", WHOLE, "and tagged v1, but not in the collection", True),
    ("POST .*/branch/next", BRANCH, "create the branch next of", False),
    ("POST .*/commit/next", BRANCH, "commit to org/model-FAKE", False),
    ("GET .*/discussions", REQUEST, "list the pull requests of", False),
    ("POST .*/commit/main", REQUEST, "commit to org/model-FAKE", False),
    (f"GET .*/tree/(?!{PARENT})", REQUEST, "pull request 1 of org/model-FAKE is at", False),
]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own PUT


@pytest.fixture
def there(hub: WritableHub) -> Repository:
    """A repository with files of its own."""
    hub.collections[SLUG] = []
    hub.repositories[REPO] = Repository(dict(OTHERS))
    return hub.repositories[REPO]


def hint(err: str) -> str:
    return err[err.rindex("hint: ") :]


@pytest.mark.parametrize(("status", "advice"), [(500, "run again later"), (429, "wait some minutes")])
@pytest.mark.parametrize(("on", "words", "said", "visible"), ENDPOINTS)
def test_trouble_anywhere_leaves_nothing_half_done(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, there: Repository, on: str,
    words: tuple[str, ...], said: str, visible: bool, status: int, advice: str,
) -> None:  # fmt: skip
    complete = OTHERS | content(folder)
    if "create" in on:
        del hub.repositories[REPO]
    if "complete" in on or on.endswith("/2"):
        hub.part_size = 3
    hub.faults = [Fault(on, status=status, text="not now", times=ALWAYS)]
    ended = publish(*words)
    assert ended.code == 6, ended.err
    last = ended.err[ended.err.rindex("error: ") :]
    assert said in last
    assert f"answers {status}" in last
    assert re.search(f"{advice}|run again: that only verifies", hint(ended.err))
    assert ended.out == ""
    if REPO in hub.repositories:
        assert there.files == (complete if visible else OTHERS)
        assert all(there.at(name) in (OTHERS, complete) for name in there.heads)
        assert visible or not there.tags
    assert not (folder.parent / "records" / "model-FAKE.publication.json").exists()

    hub.faults = []
    stored = dict(hub.objects)
    again = publish(*words)
    assert again.code == 0, again.err
    now = hub.repositories[REPO]
    shown = "next" if words == BRANCH else "refs/pr/1" if words == REQUEST else "main"
    assert now.at(shown).items() >= content(folder).items()
    assert len(now.requests) == (words == REQUEST)
    if words == WHOLE:
        assert (now.tags, hub.collections[SLUG]) == ({"v1": now.commit}, [REPO])
    sent = [asked.path.split("/")[2] for asked in hub.sent("PUT")][-len(hub.objects) :]
    assert not stored.keys() & set(sent[len(stored) :])


@pytest.mark.parametrize("status", [402, 413, 507])
@pytest.mark.parametrize("on", ["POST .*/objects/batch", "PUT /objects/", "POST .*/commit/main"])
def test_a_full_account_is_told(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, there: Repository, on: str, status: int
) -> None:
    hub.faults = [Fault(on, status=status, text="no room", times=ALWAYS)]
    ended = publish()
    assert (ended.code, f"answers {status} (no room)" in ended.err) == (6, True), ended.err
    advice = {402: "billing page", 413: "max_shard_size", 507: "storage of the account is full"}
    assert advice[status] in hint(ended.err)
    assert there.files == OTHERS
    hub.faults = []
    assert publish().code == 0
    assert there.files == OTHERS | content(folder)


def test_a_file_over_the_quota_is_told(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, there: Repository
) -> None:
    hub.quota = 6  # bytes; the two files have 6 and 7
    ended = publish()
    assert (ended.code, "Storage limit of the account reached" in ended.err) == (6, True), ended.err
    assert there.files == OTHERS
    hub.quota = None
    assert publish().code == 0


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    "on",
    ["POST .*/preupload/", "POST .*/objects/batch", "PUT /objects/", "POST .*/commit/main", "POST .*/tag/"],
)
def test_a_token_that_is_refused_midway(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, there: Repository, on: str, status: int
) -> None:
    hub.faults = [Fault(on, status=status, text="not you", times=ALWAYS)]
    ended = publish("--tag", "v1")
    assert (ended.code, f"answers {status}" in ended.err) == (6, True), ended.err
    assert re.search({401: "HF_TOKEN|repo_id", 403: "write access"}[status], hint(ended.err))
    assert there.files == (OTHERS | content(folder) if "tag" in on else OTHERS)
    hub.faults = []
    assert publish("--tag", "v1").code == 0
    assert there.files == OTHERS | content(folder)


@pytest.mark.parametrize("kind", ["drop", "lose"])
@pytest.mark.parametrize("on", [r"PUT /objects/\w+/1", "POST /complete/", "POST .*/objects/batch"])
def test_a_connection_that_breaks_midway_is_sat_out_or_told(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, there: Repository, on: str, kind: Any
) -> None:
    hub.part_size = 3
    hub.faults = [Fault(on, kind, times=ALWAYS)]
    ended = publish()
    assert (ended.code, "the connection failed" in ended.err) == (6, True), ended.err
    assert there.files == OTHERS
    hub.faults = [Fault(on, kind)]
    ended = publish()
    if ended.code:  # the client tries the end of an upload in parts once only
        assert "complete" in on
        ended = publish()
    assert ended.code == 0, ended.err
    assert there.files == OTHERS | content(folder)
