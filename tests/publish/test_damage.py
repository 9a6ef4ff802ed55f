"""What went wrong between 0.3.0 and a Hub that hangs, answers with something else, or shows old lists."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantool import pipeline
from quantool.errors import PublicationError
from quantool.hub import client
from quantool.hub.client import Patience, limit_waiting, publishing
from quantool.publish import packed_folder, refs
from quantool.publish.package import pack
from quantool.publish.permissions import connect
from quantool.records import sha256_of
from tests.loopback import ALWAYS, GGUFS, OTHERS, REPO, content, edit, write_job
from tests.loopback_hub import Fault, Repository, entry, sha256
from tests.publish.campaign import ODD, Trial, run, spread
from tests.pushing import WritableHub

Run = Callable[..., Any]
PARENT = "1" * 40
OLD_README = b"---\nlicense: mit\n---\nThe release before.\n"
LOGIN = "<html>proxy login</html>"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own PUT


@pytest.fixture
def there(hub: WritableHub) -> Repository:
    """A repository with a release before: a README, and one of our GGUFs with other content."""
    files = {**OTHERS, "README.md": OLD_README, GGUFS[0]: b"GGUF of before"}
    hub.repositories[REPO] = Repository(files)
    hub.objects |= {sha256(text): text for name, text in files.items() if name.endswith(".gguf")}
    return hub.repositories[REPO]


def listing(files: dict[str, bytes]) -> str:
    return json.dumps([entry(name, text) for name, text in files.items()])


# ---- a Hub that hangs (T4)


@pytest.mark.parametrize(
    "on", ["GET .*/revision/main", "PUT /objects/", "POST /verify", f"GET .*/tree/(?!{PARENT})"]
)
def test_a_hub_that_takes_a_request_and_never_answers(
    publish: Run, folder: Path, hub: WritableHub, there: Repository, on: str
) -> None:
    before = dict(there.files)
    hub.faults = [Fault(on, "silence", times=ALWAYS)]
    started = time.monotonic()
    ended = publish("--read-timeout", "1.5")
    assert time.monotonic() - started < 60
    assert (ended.code, "no answer within 1.5 s" in ended.err) == (6, True), ended.err
    assert "publish.read_timeout" in ended.err or "that only verifies" in ended.err
    assert hub.faults[0].fired == 1  # none of the client's five retries
    hub.faults = []
    assert there.files in (before, before | content(folder))
    assert publish().code == 0  # the folder's lock is free
    assert there.files == before | content(folder)


@pytest.mark.parametrize("carried", [True, False])
def test_a_commit_that_is_never_answered(
    publish: Run, folder: Path, hub: WritableHub, there: Repository, carried: bool
) -> None:
    edit(folder, lambda record: record["plan"]["config"].update(publish={"read_timeout": 1.5}))
    hub.faults = [Fault("POST .*/commit/main", "silence", carried=carried)]
    ended = publish()
    assert ended.code == (0 if carried else 6), ended.err
    assert carried or f"{hub.url}/{REPO}/commits/main shows it" in ended.err
    hub.faults = []
    assert publish().code == 0
    assert len([name for name in there.history if name != PARENT]) == 1


def test_an_answer_that_drips_is_given_up(hub: WritableHub, there: Repository) -> None:
    hub.faults = [Fault("GET .*/revision/main", "drip", carried=True)]
    with (
        publishing(1.0, 1.0),
        pytest.raises(PublicationError, match=r"look at org/model-FAKE: no whole answer within 1 s"),
    ):
        refs.find(connect(), REPO)


def test_an_answer_without_end_is_given_up(
    hub: WritableHub, there: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER", 100)
    with publishing(10, 60), pytest.raises(PublicationError, match="more than 100 bytes"):
        refs.find(connect(), REPO)


def test_pages_without_end_are_given_up(hub: WritableHub, there: Repository) -> None:
    hub.faults = [
        Fault("GET .*/discussions", "odd", text='{"count": 9, "start": 0, "discussions": []}', times=999)
    ]
    with publishing(10, 60), pytest.raises(PublicationError, match="pages without end"):
        refs.open_requests(connect(), REPO, "a title")


@pytest.mark.parametrize("name", ["Retry-After", "RateLimit"])
def test_a_wait_of_an_hour_is_not_sat_out(hub: WritableHub, there: Repository, name: str) -> None:
    from huggingface_hub import get_session

    for value, stays in {
        "Retry-After": {"30": True, "3600": False},
        "RateLimit": {"t=1": True, "t=300": False},
    }[name].items():
        wait = f'"api";r=0;{value}' if name == "RateLimit" else value
        hub.faults = [Fault("GET .*/revision/main", status=429, headers={name: wait})]
        with publishing(10, 60):
            answer = get_session().get(f"{hub.url}/api/models/{REPO}/revision/main")
        assert (answer.status_code, name.lower() in answer.headers) == (429, stays)


def test_sessions_have_time_limits_from_the_first_download_on(hub: WritableHub) -> None:
    from huggingface_hub import close_session, get_session

    def patience() -> Any:
        session: Any = get_session()
        return session.patience

    with publishing(3, 4):
        assert patience() == Patience(3, 4, publishing=True)
        close_session()  # as the client does when a connection cannot be made
        assert patience() == Patience(3, 4, publishing=True)
    limit_waiting()
    assert patience() == Patience()
    given = Patience(10, 60).extended({"connect": None, "read": 5.0})
    assert given == {"connect": 10, "read": 5.0, "write": 60, "pool": 10}


# ---- taking back (T5, T7)


def test_what_cannot_be_proven_is_not_put_back(
    publish: Run, folder: Path, hub: WritableHub, there: Repository
) -> None:
    hub.faults = [
        Fault(f"PUT /objects/{sha256_of(folder / GGUFS[0])}", "flip"),
        Fault("GET .*/resolve/", "odd", text=LOGIN, times=ALWAYS),
    ]
    ended = publish()
    assert ended.code == 6
    assert "It could not be taken back: README.md of 111" in ended.err
    assert f"main shows the damaged commit {there.commit}" in ended.err
    assert there.files["README.md"] == (folder / "README.md").read_bytes()
    assert LOGIN.encode() not in there.files.values()
    hub.faults = []
    assert publish().code == 0
    assert there.files.items() >= content(folder).items()


def test_a_proxy_in_the_place_of_resolve_is_no_reason_to_take_back(
    publish: Run, folder: Path, hub: WritableHub, there: Repository
) -> None:
    hub.faults = [Fault("GET .*/resolve/", "odd", text=LOGIN, times=ALWAYS)]
    assert publish().code == 0
    assert there.files.items() >= content(folder).items()


def test_what_is_put_back_is_verified(
    publish: Run, folder: Path, hub: WritableHub, there: Repository
) -> None:
    before = dict(there.files)
    hub.faults = [
        Fault(f"PUT /objects/{sha256_of(folder / GGUFS[0])}", "flip"),
        Fault("POST .*/commit/main", "odd", text="{}", skip=1),  # says yes, and does nothing
    ]
    ended = publish()
    assert (ended.code, "It could not be taken back" in ended.err) == (6, True), ended.err
    hub.faults = [Fault(f"PUT /objects/{sha256_of(folder / GGUFS[0])}", "flip")]
    there.advance(before)
    ended = publish()
    assert (ended.code, "main shows the files of" in ended.err) == (6, True), ended.err
    assert there.files == before


def test_a_put_back_whose_answer_is_lost_counts(
    publish: Run, folder: Path, hub: WritableHub, there: Repository
) -> None:
    before = dict(there.files)
    hub.faults = [
        Fault(f"PUT /objects/{sha256_of(folder / GGUFS[0])}", "flip"),
        Fault("POST .*/commit/main", "lose", skip=1),
    ]
    ended = publish()
    assert (ended.code, f"main shows the files of {PARENT} again" in ended.err) == (6, True), ended.err
    assert there.files == before


def test_a_list_that_was_wrong_before_the_commit_deletes_nothing(
    publish: Run, folder: Path, hub: WritableHub, there: Repository
) -> None:
    """The README seemed not to be there: to take the commit back would be to delete it."""
    without = listing({name: text for name, text in there.files.items() if name != "README.md"})
    hub.faults = [
        Fault(f"GET .*/tree/{PARENT}", "odd", text=without),
        Fault(f"PUT /objects/{sha256_of(folder / GGUFS[0])}", "flip"),
    ]
    ended = publish()
    assert (ended.code, f"the Hub says different things of {PARENT}: README.md" in ended.err) == (6, True)
    assert "README.md" in there.files


@pytest.mark.parametrize("times", [1, 3])
def test_a_list_that_is_empty_for_a_while_is_asked_again(
    publish: Run, folder: Path, hub: WritableHub, there: Repository, times: int
) -> None:
    hub.faults = [Fault(f"GET .*/tree/(?!{PARENT})", "odd", text="[]", times=times)]
    assert publish().code == 0
    assert there.files.items() >= content(folder).items()


@pytest.mark.parametrize("shown", ["nothing", "the parent", "a part", "another repository"])
def test_a_good_commit_is_not_taken_back_on_doubt(
    publish: Run, folder: Path, hub: WritableHub, there: Repository, shown: str
) -> None:
    before = dict(there.files)
    seen = {
        "nothing": {},
        "the parent": before,
        "a part": before | {GGUFS[0]: (folder / GGUFS[0]).read_bytes()},
        "another repository": {"README.md": b"theirs", ".gitattributes": b""},
    }[shown]
    hub.faults = [Fault(f"GET .*/tree/(?!{PARENT})", "odd", text=listing(seen), times=ALWAYS)]
    ended = publish()
    assert ended.code == 6
    assert f"is at {there.commit} now, but the Hub does not list all that was sent" in ended.err
    assert "nothing was taken back" in ended.err
    assert f"/tree/{there.commit}" in ended.err
    assert there.files == before | content(folder)
    assert len(hub.sent("POST", "/commit/")) == 1
    hub.faults = []
    hub.asked.clear()
    assert "nothing was new" in publish().out
    assert hub.sent("PUT") == hub.sent("POST") == []


# ---- what was hashed is what is sent (T6)


@pytest.mark.parametrize("name", ["README.md", "plots/corpora.png"])
def test_a_small_file_that_is_edited_while_uploading(
    publish: Run, folder: Path, hub: WritableHub, there: Repository, name: str
) -> None:
    judged = content(folder)

    def change() -> None:
        (folder / name).write_bytes(b"edited meanwhile")

    hub.faults = [Fault("PUT /objects/", "none", before=change)]
    assert publish().code == 0
    assert there.files.items() >= judged.items()
    sums = {line[66:]: line[:64] for line in there.files["SHA256SUMS"].decode().splitlines()}
    assert {path: sha256(there.files[path]) for path in sums} == sums


def test_a_run_reads_large_files_once_to_send_them(
    tmp_path: Path, plugin: Path, quantool: Run, hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were hashed when they were made; the client hashes what it sends."""
    read: list[str] = []
    monkeypatch.setattr(packed_folder, "HEAVY", 1)

    def noted(path: Path) -> str:
        read.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(packed_folder, "sha256_of", noted)
    assert quantool(write_job(tmp_path, {"repo_id": REPO, "push_to_hub": True})).code == 0
    assert read == ["SHA256SUMS"]
    read.clear()
    assert quantool("publish", tmp_path / "out" / "model-FAKE").code == 0
    assert set(GGUFS) < set(read)


def test_a_large_file_that_is_edited_after_a_run_made_it(
    tmp_path: Path, plugin: Path, quantool: Run, hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_folder, "HEAVY", 1)

    def edited(*arguments: Any, **earlier: Any) -> Any:
        folders = pack(*arguments, **earlier)
        (folders[0].folder / GGUFS[0]).write_bytes(b"edited")
        return folders

    monkeypatch.setattr(pipeline, "pack", edited)
    ended = quantool(write_job(tmp_path, {"repo_id": REPO, "push_to_hub": True}))
    assert (ended.code, f"{GGUFS[0]} was changed after it was judged" in ended.err) == (6, True), ended.err
    assert "--rehash" in ended.err
    assert set(hub.repositories[REPO].files) == {".gitattributes"}


# ---- other JSON (T15)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("on", ["GET /api/whoami-v2", "POST .*/commit/main", "POST .*/preupload/"])
def test_an_odd_answer_is_an_error_of_publication(
    publish: Run, folder: Path, hub: WritableHub, there: Repository, on: str, name: str
) -> None:
    before = dict(there.files)
    hub.faults = [Fault(on, "odd", text=ODD[name], times=ALWAYS)]
    ended = publish()
    assert (ended.code, "error: " in ended.err) == (6, True), ended.err
    assert there.files == before


def test_a_commit_that_was_made_and_answered_oddly_counts(
    publish: Run, folder: Path, hub: WritableHub, there: Repository
) -> None:
    hub.faults = [Fault("POST .*/commit/main", "odd", text='{"commitOid": 3}', carried=True)]
    assert publish().code == 0
    assert there.files.items() >= content(folder).items()


# ---- all of it


@pytest.mark.parametrize(
    "trial", [trial for trial in spread(300) if "silence" not in trial.mode][:30], ids=str
)
def test_publications_to_a_faulty_hub(trial: Trial, packed: Path, tmp_path: Path) -> None:
    assert run(trial, packed, tmp_path).faults == []
