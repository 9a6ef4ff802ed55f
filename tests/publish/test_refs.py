"""Pull requests, branches, tags and collections, with the real client on a Hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantool.config.schema import Publish
from quantool.errors import PublicationError
from quantool.publish.permissions import lacks_for_request, preflight
from quantool.publish.refs import check_names
from quantool.records import Publication, sha256_of
from tests.loopback import ALWAYS, GGUFS, OTHERS, REPO, content, edit, write_job
from tests.loopback_hub import Fault, Repository
from tests.pushing import WritableHub, account

Run = Callable[..., Any]
TITLE = "Q8_0, Q4_K_M by quantool"
SLUG = "org/mine-64f9a55bb3115b4f513ec026"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own PUT


@pytest.fixture
def repository(hub: WritableHub) -> Repository:
    """One with files of its own, and a collection to add it to."""
    hub.repositories[REPO] = Repository(dict(OTHERS))
    hub.collections[SLUG] = []
    return hub.repositories[REPO]


def made(ended: Any) -> Publication:
    assert ended.code == 0, ended.err
    return Publication.model_validate_json(ended.out)


# ---- pull requests


def test_a_pull_request_shows_everything_and_main_stays(
    publish: Run, folder: Path, hub: WritableHub, repository: Repository
) -> None:
    told = made(publish("--mode", "pull_request", "--json"))
    assert repository.files == OTHERS
    (request,) = repository.requests
    assert request["title"].startswith(TITLE)
    assert request["text"].startswith("Made from ")
    assert repository.at("refs/pr/1") == OTHERS | content(folder)
    assert (told.revision, told.commit, told.parent) == (
        "refs/pr/1", repository.heads["refs/pr/1"], repository.commit,
    )  # fmt: skip
    assert told.url == f"{hub.url}/{REPO}/discussions/1"
    assert len(hub.sent("POST", "/commit/")) == 1


def test_a_second_try_opens_no_second_pull_request(
    publish: Run, hub: WritableHub, repository: Repository
) -> None:
    first = made(publish("--mode", "pull_request", "--json"))
    hub.asked.clear()
    again = made(publish("--mode", "pull_request", "--json"))
    assert (again.url, again.commit) == (first.url, first.commit)
    assert len(repository.requests) == 1
    assert hub.sent("PUT") == hub.sent("POST", "/commit/") == []


def test_what_is_merged_needs_no_pull_request_and_can_be_tagged(
    publish: Run, hub: WritableHub, repository: Repository
) -> None:
    assert publish("--mode", "pull_request").code == 0
    repository.requests[0]["status"] = "merged"
    repository.advance(repository.at("refs/pr/1"))
    ended = publish("--mode", "pull_request", "--json")
    assert made(ended).sent == ()
    assert len(repository.requests) == 1
    hub.asked.clear()
    assert made(publish("--mode", "commit", "--tag", "v1", "--json")).tag == "v1"
    assert repository.tags == {"v1": repository.commit}
    assert hub.sent("POST", "/commit/") == []


def test_other_files_under_the_same_title_are_another_pull_request(
    publish: Run, folder: Path, repository: Repository
) -> None:
    assert publish("--mode", "pull_request", "--message", "Levels").code == 0
    edit(folder, lambda record: record.update(note=1))
    ended = publish("--mode", "pull_request", "--message", "Levels")
    assert (ended.code, len(repository.requests)) == (0, 2)
    assert "the open pull request 1 has the same title and other files" in ended.err
    assert repository.at("refs/pr/2") == OTHERS | content(folder)


def test_a_pull_request_whose_answer_is_lost_is_found(
    publish: Run, hub: WritableHub, repository: Repository
) -> None:
    for number in range(5):  # listings have pages
        repository.requests.append({**_stranger(number + 1)})
    hub.faults = [Fault("POST .*/commit/main", "lose")]
    told = made(publish("--mode", "pull_request", "--json"))
    assert (told.revision, len(repository.requests)) == ("refs/pr/6", 6)


def _stranger(number: int) -> dict[str, Any]:
    return {
        "num": number, "title": "theirs", "text": "", "status": "open", "author": {"name": "x"},
        "createdAt": "2026-01-01T00:00:00.000Z", "isPullRequest": True, "repo": {"name": REPO, "type": "model"},
    }  # fmt: skip


@pytest.mark.parametrize("closable", [True, False])
def test_a_damaged_pull_request_is_closed(
    publish: Run, folder: Path, hub: WritableHub, repository: Repository, closable: bool
) -> None:
    hub.faults = [Fault(f"PUT /objects/{sha256_of(folder / GGUFS[0])}", "flip")]
    if not closable:
        hub.faults.append(Fault("POST .*/status", status=503))
    ended = publish("--mode", "pull_request")
    assert ended.code == 6
    assert f"{GGUFS[0]}: another hash" in ended.err
    said = "Pull request 1 is closed, main is what it was" if closable else "do not merge it"
    assert said in ended.err
    assert repository.requests[0]["status"] == ("closed" if closable else "open")
    assert repository.files == OTHERS
    assert publish("--mode", "pull_request").code == 0
    assert len(repository.requests) == 2


def test_a_guest_may_open_one_and_nothing_else(
    publish: Run, hub: WritableHub, repository: Repository
) -> None:
    del hub.repositories[REPO]
    hub.repositories["strangers/x"] = repository
    where = ("--repo-id", "strangers/x")
    assert "no member of strangers" in publish(*where).err
    assert publish(*where, "--mode", "pull_request").code == 0
    refused = publish("--repo-id", "strangers/new", "--mode", "pull_request")  # it would have to be created
    assert (refused.code, "no member of strangers" in refused.err) == (6, True)


def test_which_tokens_may_open_a_pull_request() -> None:
    assert lacks_for_request(account()) == ""
    assert lacks_for_request(account("read")) == "it is a read token"
    fine = account("fineGrained", org=["org"])
    assert lacks_for_request(fine) == ""
    granted = fine["auth"]["accessToken"]["fineGrained"]
    granted["scoped"][0]["permissions"].remove("repo.write")
    assert "discussion.write" in lacks_for_request(fine)
    granted["global"] = ["discussion.write"]
    assert lacks_for_request(fine) == ""


@pytest.mark.parametrize("option", ["--tag", "--collection"])
def test_tag_and_collection_wait_for_the_merge(
    publish: Run, hub: WritableHub, repository: Repository, option: str
) -> None:
    ended = publish("--mode", "pull_request", option, "v1")
    assert (ended.code, "waits until the pull request is merged" in ended.err) == (2, True)
    assert hub.asked == []


# ---- branches


def test_a_missing_branch_is_made_from_main(
    publish: Run, folder: Path, hub: WritableHub, repository: Repository
) -> None:
    told = made(publish("--revision", "next", "--json"))
    assert (told.revision, told.commit, told.parent) == ("next", repository.heads["next"], repository.commit)
    assert repository.files == OTHERS
    assert repository.at("next") == OTHERS | content(folder)
    order = [asked.path for asked in hub.asked]
    assert order.index(f"/api/models/{REPO}/branch/next") > max(
        number for number, path in enumerate(order) if path.startswith("/objects/")
    )
    hub.asked.clear()
    assert made(publish("--revision", "next", "--json")).sent == ()
    assert hub.sent("PUT") == hub.sent("POST") == []


def test_a_branch_that_is_there_goes_on_and_a_concurrent_push_to_it_is_refused(
    publish: Run, folder: Path, hub: WritableHub, repository: Repository
) -> None:
    repository.heads["next"] = repository.commit
    repository.advance({**OTHERS, "of-next.txt": b"1"}, "next")
    theirs = {**OTHERS, "of-next.txt": b"2"}

    def push_as_well() -> None:
        repository.advance(theirs, "next")

    hub.faults = [Fault("PUT /objects/", "none", before=push_as_well)]
    ended = publish("--revision", "next")
    assert (ended.code, "answers 412" in ended.err) == (6, True)
    assert repository.at("next") == theirs
    assert publish("--revision", "next").code == 0
    assert repository.at("next") == theirs | content(folder)
    assert repository.files == OTHERS


def test_a_damaged_upload_to_a_branch_is_taken_back_there(
    publish: Run, folder: Path, hub: WritableHub, repository: Repository
) -> None:
    hub.faults = [Fault("PUT /objects/", "flip")]
    ended = publish("--revision", "next")
    assert (ended.code, "next shows the files of" in ended.err) == (6, True), ended.err
    assert repository.at("next") == repository.files == OTHERS
    assert publish("--revision", "next").code == 0
    assert repository.at("next") == OTHERS | content(folder)


def test_a_pull_request_can_be_extended(publish: Run, folder: Path, repository: Repository) -> None:
    assert publish("--mode", "pull_request").code == 0
    edit(folder, lambda record: record.update(note=1))
    assert made(publish("--revision", "refs/pr/1", "--json")).revision == "refs/pr/1"
    assert repository.at("refs/pr/1") == OTHERS | content(folder)
    assert (repository.files, len(repository.requests)) == (OTHERS, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--revision", "next", "--mode", "pull_request"), "has no next"),
        (("--revision", "refs/pr/7"), "has no refs/pr/7"),
        (("--revision", "v0"), "v0 is a tag of org/model-FAKE"),
        (("--revision", "1" * 40), "no name for a branch"),
        (("--revision", "a..b"), "no name for a branch"),
        (("--tag", "-v1"), "no name for a tag"),
    ],
)
def test_branches_that_cannot_be_are_refused_before_any_work(
    publish: Run, hub: WritableHub, repository: Repository, words: tuple[str, ...], said: str
) -> None:
    repository.tags["v0"] = repository.commit
    ended = publish(*words)
    assert (ended.code, said in ended.err) == (6, True), ended.err
    assert hub.sent("PUT") == hub.sent("POST") == []


def test_a_new_repository_has_no_branch_to_open_a_pull_request_against(
    publish: Run, hub: WritableHub
) -> None:
    ended = publish("--revision", "next", "--mode", "pull_request")
    assert (ended.code, "has no next" in ended.err) == (6, True)
    assert REPO not in hub.repositories


@pytest.mark.parametrize("name", ["v1", "release/2026-01", "é"])
def test_names_as_git_has_them(name: str) -> None:
    check_names(Publish(revision=name, tag=name))


# ---- tags and collections


def test_tag_and_collection_come_last(publish: Run, hub: WritableHub, repository: Repository) -> None:
    told = made(publish("--tag", "v1", "--collection", SLUG, "--json"))
    assert (told.tag, told.collection) == ("v1", SLUG)
    assert repository.tags == {"v1": repository.commit}
    assert hub.collections[SLUG] == [REPO]
    order = [asked.path for asked in hub.asked]
    verified = order.index(f"/api/models/{REPO}/tree/{repository.commit}")
    tagged = order.index(f"/api/models/{REPO}/tag/{repository.commit}")
    assert verified < tagged < order.index(f"/api/collections/{SLUG}/items")
    hub.asked.clear()
    assert publish("--tag", "v1", "--collection", SLUG).code == 0  # both are there
    assert hub.sent("POST", "/tag/") == []
    assert hub.collections[SLUG] == [REPO]


def test_a_tag_is_never_moved(publish: Run, folder: Path, hub: WritableHub, repository: Repository) -> None:
    repository.tags["v1"] = first = repository.commit
    repository.advance({**OTHERS, "more.txt": b"1"})
    ended = publish("--tag", "v1")
    assert (ended.code, f"has a tag v1 already, on commit {first}" in ended.err) == (6, True)
    repository.tags["v1"] = repository.commit  # the head, where only an unchanged branch could keep it
    ended = publish("--tag", "v1")
    assert (ended.code, "a tag is never moved" in ended.err) == (6, True)
    assert hub.sent("PUT") == hub.sent("POST") == []


@pytest.mark.parametrize("status", [500, 429, 403])
def test_a_tag_that_cannot_be_set_is_said(
    publish: Run, hub: WritableHub, repository: Repository, status: int
) -> None:
    hub.faults = [Fault("POST .*/tag/", status=status)]
    ended = publish("--tag", "v1", "--collection", SLUG)
    assert ended.code == 6
    assert f"is at {repository.commit} and verified, but the tag v1 is not set, nor is it in the" in ended.err
    assert (repository.tags, hub.collections[SLUG]) == ({}, [])
    uploads = len(hub.sent("PUT"))
    assert publish("--tag", "v1", "--collection", SLUG).code == 0
    assert (repository.tags, hub.collections[SLUG]) == ({"v1": repository.commit}, [REPO])
    assert len(hub.sent("PUT")) == uploads
    assert len(hub.sent("POST", "/commit/main")) == 1


def test_a_tag_whose_answer_is_lost_counts(publish: Run, hub: WritableHub, repository: Repository) -> None:
    hub.faults = [Fault("POST .*/tag/", "lose")]
    assert publish("--tag", "v1").code == 0
    assert repository.tags == {"v1": repository.commit}


@pytest.mark.parametrize("status", [500, 429, 403])
def test_a_collection_that_cannot_be_changed_is_said(
    publish: Run, hub: WritableHub, repository: Repository, status: int
) -> None:
    hub.faults = [Fault("POST .*/items", status=status)]
    ended = publish("--tag", "v1", "--collection", SLUG)
    assert ended.code == 6
    assert "and verified and tagged v1, but not in the collection" in ended.err
    assert (repository.tags, hub.collections[SLUG]) == ({"v1": repository.commit}, [])
    assert publish("--tag", "v1", "--collection", SLUG).code == 0
    assert hub.collections[SLUG] == [REPO]


@pytest.mark.parametrize(
    ("slug", "said"),
    [
        ("org/none-1", "look at the collection org/none-1: the Hub answers 404"),
        ("mine", "'mine' is no collection"),
        ("strangers/theirs-1", "belongs to strangers, not to someone"),
    ],
)
def test_a_collection_is_looked_at_first(
    publish: Run, hub: WritableHub, repository: Repository, slug: str, said: str
) -> None:
    hub.collections["strangers/theirs-1"] = []
    ended = publish("--collection", slug)
    assert (ended.code, said in ended.err) == (6, True), ended.err
    assert hub.sent("POST") == hub.sent("PUT") == []


# ---- where the settings come from


def test_the_command_line_overrides_what_the_configuration_said(
    publish: Run, folder: Path, hub: WritableHub, repository: Repository
) -> None:
    said = {"revision": "next", "tag": "v1", "commit_message": "From the file\n\nAnd more."}
    edit(folder, lambda record: record["plan"]["config"].update(publish=said))
    assert made(publish("--json")).revision == "next"
    assert set(repository.tags) == {"v1"}
    body = hub.sent("POST", "/commit/next")[0].body
    header = json.loads(body.splitlines()[0])["value"]
    assert header["summary"] == "From the file"
    assert header["description"].startswith("And more.")
    told = made(publish("--revision", "main", "--tag", "v2", "--message", "Said here", "--json"))
    assert (told.revision, told.tag, repository.tags["v2"]) == ("main", "v2", repository.commit)
    assert b'"Said here"' in hub.sent("POST", "/commit/main")[0].body


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mode", "push"), "mode 'push'"),
        (("--tag", ""), "tag ''"),
        (("--read-timeout", "0"), "read_timeout 0.0"),
    ],
)
def test_settings_that_cannot_be(publish: Run, hub: WritableHub, words: tuple[str, ...], said: str) -> None:
    ended = publish(*words)
    assert (ended.code, said in ended.err) == (2, True), ended.err
    assert hub.asked == []


def test_settings_of_a_folder_that_cannot_be_read(publish: Run, folder: Path, hub: WritableHub) -> None:
    edit(folder, lambda record: record["plan"]["config"].update(publish={"mode": "push"}))
    ended = publish()
    assert (ended.code, "the key publish cannot be read" in ended.err) == (6, True)


def test_a_run_publishes_as_its_configuration_says(
    tmp_path: Path, plugin: Path, quantool: Run, hub: WritableHub
) -> None:
    wanted = {"mode": "pull_request", "commit_message": "New levels"}
    job = write_job(tmp_path, {"repo_id": REPO, "push_to_hub": True, "publish": wanted})
    for _ in range(2):
        ended = quantool(job)
        assert ended.code == 0, ended.err
        repository = hub.repositories[REPO]
        assert [request["title"] for request in repository.requests] == ["New levels"]
        assert set(repository.files) == {".gitattributes"}
        assert f"{hub.url}/{REPO}/discussions/1" in ended.out


def test_a_run_asks_for_tag_and_collection_before_any_work(
    tmp_path: Path, plugin: Path, quantool: Run, hub: WritableHub, repository: Repository
) -> None:
    repository.tags["v1"] = repository.commit
    repository.advance({**OTHERS, "more.txt": b"1"})
    for wanted, said in (({"tag": "v1"}, "a tag is never moved"), ({"collection": "org/none-1"}, "404")):
        ended = quantool(write_job(tmp_path, {"repo_id": REPO, "push_to_hub": True, "publish": wanted}))
        assert (ended.code, said in ended.err) == (6, True), ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("on", ["GET .*/refs", "GET /api/collections/"])
@pytest.mark.parametrize("status", [500, 429])
def test_trouble_of_the_hub_in_the_preflight(
    hub: WritableHub, repository: Repository, on: str, status: int
) -> None:
    hub.faults = [Fault(on, status=status, times=ALWAYS)]
    with pytest.raises(PublicationError, match=f"answers {status}"):
        preflight({REPO: None}, Publish(tag="v1", collection=SLUG))
