"""Publishing to a Hub on loopback, with the real client: what is visible, what is sent, what refusals say."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

from quantool.errors import ConfigError, GateError, PublicationError
from quantool.hub.errors import scrub
from quantool.publish.packed_folder import (
    destination,
    outgoing_files,
    read_packed_folder,
)
from quantool.publish.permissions import lacks, preflight
from quantool.records import Publication, sha256_of
from quantool.runtime.progress import Progress
from tests.loopback import ALWAYS, GGUFS, OTHERS, REPO, child, content, edit, write_job
from tests.loopback_hub import Fault, Repository, sha256
from tests.pushing import WritableHub, account

QUIET = Progress(quiet=True)

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own PUT


def test_one_commit_makes_everything_visible(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    ended = publish("--json")
    assert ended.code == 0, ended.err
    repository = hub.repositories[REPO]
    files = dict(repository.files)
    assert files.pop(".gitattributes")
    assert files == content(folder)
    assert repository.private
    assert len(hub.sent("POST", "/commit/main")) == 1
    order = [asked.path for asked in hub.asked]
    last_upload = max(order.index(f"/objects/{sha256_of(folder / name)}") for name in GGUFS)
    assert last_upload < order.index(f"/api/models/{REPO}/commit/main")
    made = Publication.model_validate_json(ended.out)
    assert (made.repo_id, made.commit, made.private) == (REPO, repository.commit, True)
    assert made.url == f"{hub.url}/{REPO}/tree/{repository.commit}"
    assert {file.name for file in made.files} == set(made.sent) == set(files)
    assert all(file.sha256 == sha256_of(folder / file.name) for file in made.files)
    record = folder.parent / "records" / "model-FAKE.publication.json"
    assert Publication.model_validate_json(record.read_text()) == made


def test_a_rerun_sends_nothing(publish: Callable[..., Any], hub: WritableHub) -> None:
    assert publish().code == 0
    commit = hub.repositories[REPO].commit
    hub.asked.clear()
    ended = publish()
    assert (ended.code, hub.repositories[REPO].commit) == (0, commit)
    assert "nothing was new" in ended.out
    assert hub.sent("PUT") == hub.sent("POST") == []


def test_only_what_differs_is_sent_and_the_rest_of_main_stays(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    there = {**OTHERS, GGUFS[0]: (folder / GGUFS[0]).read_bytes(), "README.md": b"---\nold: 1\n---\n"}
    hub.repositories[REPO] = Repository(there)
    ended = publish("--json")
    assert ended.code == 0, ended.err
    assert hub.repositories[REPO].files == OTHERS | content(folder)
    assert not hub.repositories[REPO].private
    assert hub.put(sha256_of(folder / GGUFS[0])) == 0
    assert hub.put(sha256_of(folder / GGUFS[1])) == 1
    assert GGUFS[0] not in Publication.model_validate_json(ended.out).sent


REFUSALS = [
    ("GET /api/whoami-v2", "refuse", 401, 1, "answers 401", "HF_TOKEN"),
    ("GET /api/whoami-v2", "refuse", 429, 1, "answers 429", "wait some minutes"),
    ("GET .*/revision/main", "refuse", 503, 1, "answers 503", "run again later"),
    ("GET .*/tree/", "refuse", 503, ALWAYS, "list org/model-FAKE at", "run again later"),
    (
        "POST /api/repos/create",
        "refuse",
        403,
        1,
        "create org/model-FAKE: the Hub answers 403",
        "write access",
    ),
    ("POST .*/preupload/", "refuse", 403, 1, "upload model-Q4_K_M.gguf", "write access"),
    ("POST .*/objects/batch", "refuse", 429, ALWAYS, "answers 429", "wait some minutes"),
    ("POST .*/objects/batch", "refuse", 402, 1, "answers 402", "billing"),
    ("PUT /objects/", "refuse", 500, ALWAYS, "answers 500", "run again later"),
    ("PUT /objects/", "refuse", 403, 1, "answers 403", "write access"),
    ("PUT /objects/", "drop", 0, ALWAYS, "the connection failed", "check the network"),
    ("POST /verify", "refuse", 422, 1, "answers 422", "run again"),
    ("POST /api/validate-yaml", "refuse", 503, 1, "let the Hub check README.md", "run again later"),
    (
        "POST .*/commit/main",
        "refuse",
        500,
        1,
        "commit to org/model-FAKE: the Hub answers 500",
        "run again later",
    ),
    ("POST .*/commit/main", "refuse", 403, 1, "answers 403 (not for you)", "write access"),
    ("POST .*/commit/main", "refuse", 409, 1, "answers 409", "under way"),
    ("POST .*/commit/main", "drop", 0, 1, "the connection failed", "check the network"),
]


@pytest.mark.parametrize(("on", "kind", "status", "times", "said", "hint"), REFUSALS)
def test_a_refused_push_changes_nothing_and_the_retry_completes(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, on: str, kind: Any, status: int, times: int,
    said: str, hint: str,
) -> None:  # fmt: skip
    if "create" not in on:
        hub.repositories[REPO] = Repository(dict(OTHERS))
    hub.faults = [Fault(on, kind, status, "not for you", times)]
    ended = publish()
    assert ended.code == 6, ended.err
    last = ended.err[ended.err.rindex("error: ") :]
    assert said in last
    assert re.search(f"hint: .*{hint}", last)
    assert ended.out == ""
    assert [repository.files for repository in hub.repositories.values()] == [OTHERS] * ("create" not in on)
    assert not (folder.parent / "records" / "model-FAKE.publication.json").exists()
    hub.faults = []
    assert publish().code == 0
    assert content(folder).items() <= hub.repositories[REPO].files.items()


@pytest.mark.parametrize(
    ("on", "kind", "status"),
    [
        ("POST .*/preupload/", "refuse", 500),
        ("POST .*/objects/batch", "refuse", 429),
        ("PUT /objects/", "refuse", 500),
        ("PUT /objects/", "drop", 0),
    ],
)
def test_short_trouble_is_sat_out(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, on: str, kind: Any, status: int
) -> None:
    hub.repositories[REPO] = Repository(dict(OTHERS))
    hub.faults = [Fault(on, kind, status)]
    ended = publish("--quiet")
    assert ended.code == 0, ended.err
    assert hub.repositories[REPO].files == OTHERS | content(folder)
    assert "warning: Retrying in" in ended.err


def test_a_concurrent_push_is_not_overwritten(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    theirs = {**OTHERS, "README.md": b"---\ntheirs: 1\n---\n"}
    hub.repositories[REPO] = Repository(dict(OTHERS))
    hub.faults = [Fault("PUT /objects/", "none", before=lambda: advance(hub, theirs))]
    ended = publish()
    assert ended.code == 6
    assert "answers 412" in ended.err
    assert "somebody pushed meanwhile" in ended.err
    assert hub.repositories[REPO].files == theirs
    uploads = len(hub.sent("PUT"))
    assert publish().code == 0
    assert len(hub.sent("PUT")) == uploads == 2
    assert hub.repositories[REPO].files == theirs | content(folder)


def advance(hub: WritableHub, files: dict[str, bytes]) -> None:
    hub.repositories[REPO].advance(files)


def test_a_commit_whose_answer_is_lost_counts(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    hub.faults = [Fault("POST .*/commit/main", "lose")]
    ended = publish("--json")
    assert ended.code == 0, ended.err
    assert Publication.model_validate_json(ended.out).commit == hub.repositories[REPO].commit
    assert len(hub.sent("POST", "/commit/main")) == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_damaged_upload_is_taken_back(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, replaced: bool
) -> None:
    before = (
        {**OTHERS, GGUFS[0]: b"the release before", "README.md": b"---\nlicense: mit\n---\n"}
        if replaced
        else OTHERS
    )
    hub.repositories[REPO] = Repository(dict(before))
    hub.objects[sha256(b"the release before")] = b"the release before"
    hub.faults = [Fault(f"PUT /objects/{sha256_of(folder / GGUFS[0])}", "flip")]
    ended = publish()
    assert ended.code == 6
    assert f"does not hold what was sent: {GGUFS[0]}: another hash" in ended.err
    assert hub.repositories[REPO].files == before
    assert publish().code == 0
    assert hub.repositories[REPO].files == before | content(folder)


def test_a_commit_that_cannot_be_verified_yet_is_named(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    hub.repositories[REPO] = Repository(dict(OTHERS))
    hub.faults = [Fault(f"GET .*/tree/(?!{'1' * 40})", "refuse", 500, times=ALWAYS)]
    ended = publish()
    commit = hub.repositories[REPO].commit
    assert ended.code == 6
    assert f"is at {commit} now, but could not be verified" in ended.err
    hub.faults = []
    assert publish().code == 0
    assert hub.repositories[REPO].commit == commit


def test_large_files_go_in_parts(publish: Callable[..., Any], folder: Path, hub: WritableHub) -> None:
    hub.part_size = 3
    assert publish().code == 0
    assert len(hub.sent("PUT", r"/objects/\w+/\d+")) == 3 + 2  # 7 and 6 bytes
    assert content(folder).items() <= hub.repositories[REPO].files.items()


def test_nothing_is_left_out_by_a_gitignore_on_the_hub(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    hub.repositories[REPO] = Repository({".gitignore": f"{GGUFS[0]} README.md".encode()})
    ended = publish()
    assert ended.code == 0, ended.err
    assert content(folder).items() <= hub.repositories[REPO].files.items()


def test_remarks_on_the_card_are_shown(publish: Callable[..., Any], hub: WritableHub) -> None:
    assert "license is missing" in publish().err


# ---- the folder


def test_a_folder_as_packed_may_be_published(folder: Path) -> None:
    packed = read_packed_folder(folder)
    assert (packed.repo_ids, packed.private) == ((REPO,), None)
    assert packed.title.startswith("Q8_0, Q4_K_M by quantool ")
    files = outgoing_files(packed, QUIET, hash_large=True)
    assert {file.name: file.content for file in files} == content(folder)
    assert destination(packed, None) == REPO
    assert destination(packed, "a/b") == "a/b"


@pytest.mark.parametrize("verdict", ["REGRESSION", "ANOMALOUS", "SKIPPED"])
def test_what_did_not_pass_is_refused(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, verdict: str
) -> None:
    def fail(record: dict[str, Any]) -> None:
        record["reports"][0]["findings"][0]["verdict"] = verdict  # the summary beside it still says PASS

    edit(folder, fail)
    ended = publish()
    assert ended.code == 5
    assert f"fake/Q8_0: {verdict}" in ended.err
    assert hub.asked == []


def test_what_was_not_judged_is_refused(folder: Path) -> None:
    edit(folder, lambda record: record["reports"].pop())
    with pytest.raises(GateError, match="fake/Q4_K_M: not judged"):
        read_packed_folder(folder)
    edit(folder, lambda record: record.update(reports=[], plan=record["plan"] | {"outputs": []}))
    with pytest.raises(GateError, match="nothing in it was judged"):
        read_packed_folder(folder)


def test_a_file_that_was_changed_is_refused(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    path = folder / GGUFS[0]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    ended = publish()
    assert ended.code == 6
    assert f"not what was judged, the content differs from SHA256SUMS: {GGUFS[0]}" in ended.err
    assert REPO not in hub.repositories
    with (folder / "SHA256SUMS").open("r+") as sums:  # not even when the sums are made to fit
        text = re.sub(rf"\w+(?=  {GGUFS[0]})", sha256_of(path), sums.read())
        sums.seek(0)
        sums.write(text)
    with pytest.raises(PublicationError, match=f"disagree: {GGUFS[0]}"):
        read_packed_folder(folder)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0" * 64 + "  ../secret\n", "not a line"),
        ("0" * 64 + "  /etc/passwd\n", "not a line"),
        ("0" * 64 + "  README.md\n", "not a line"),
        ("no sum\n", "not a line"),
        ("0" * 64 + "  preset.ini\n", "preset.ini would change how"),
        ("0" * 64 + "  extra.gguf\n", "disagree: extra.gguf"),
    ],
)
def test_sums_that_quantool_did_not_write_are_refused(folder: Path, line: str, said: str) -> None:
    with (folder / "SHA256SUMS").open("a") as sums:
        sums.write(line)
    with pytest.raises(PublicationError, match=said):
        read_packed_folder(folder)


@pytest.mark.parametrize("name", ["README.md", "quantool.json", "SHA256SUMS", "plots/corpora.png", GGUFS[0]])
def test_an_incomplete_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(PublicationError, match=re.escape(name)):
        outgoing_files(read_packed_folder(folder), QUIET, hash_large=False)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"plan": {}}', '{"plan": {"outputs": [], "config": {}}, "reports": [1]}']
)
def test_a_damaged_record_is_refused(folder: Path, text: str) -> None:
    (folder / "quantool.json").write_text(text)
    with pytest.raises(PublicationError, match=r"quantool\.json"):
        read_packed_folder(folder)


def test_plots_are_published_with_what_they_show(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    assert publish().code == 0
    for name in ("plots/corpora.png", "plots/size-kld.png"):
        assert hub.repositories[REPO].files[name] == (folder / name).read_bytes()


def test_a_picture_that_packing_did_not_draw_is_refused(folder: Path) -> None:
    path = folder / "plots" / "corpora.png"
    before = sha256_of(path)
    path.write_bytes(b"another picture")
    with pytest.raises(PublicationError, match=r"differs from SHA256SUMS: plots/corpora\.png"):
        outgoing_files(read_packed_folder(folder), QUIET, hash_large=True)
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, sha256_of(path)))
    with pytest.raises(PublicationError, match=r"disagree: plots/corpora\.png"):
        read_packed_folder(folder)


@pytest.mark.parametrize(
    ("plots", "said"),
    [
        ([{"name": "extra.gguf", "bytes": 1, "sha256": "0" * 64}], "no plots of quantool: extra.gguf"),
        ([{"name": "plots/corpora.png"}], "plots cannot be read"),
        (3, "plots cannot be read"),
    ],
)
def test_plots_are_no_way_in_for_other_files(folder: Path, plots: Any, said: str) -> None:
    edit(folder, lambda record: record.update(plots=plots))
    with pytest.raises(PublicationError, match=said):
        read_packed_folder(folder)


def test_files_that_no_record_names_stay_here(
    publish: Callable[..., Any], folder: Path, hub: WritableHub
) -> None:
    (folder / "mine.txt").write_text("private")
    ended = publish()
    assert (ended.code, "mine.txt" in ended.err) == (0, True)
    assert "mine.txt" not in hub.repositories[REPO].files


def test_the_destination_must_be_known(folder: Path) -> None:
    edit(folder, lambda record: [output.update(repo_id=None) for output in record["plan"]["outputs"]])
    with pytest.raises(ConfigError, match="names no repository"):
        destination(read_packed_folder(folder), None)
    edit(folder, lambda record: [o.update(repo_id=f"a/{n}") for n, o in enumerate(record["plan"]["outputs"])])
    with pytest.raises(ConfigError, match="several repositories: a/0, a/1"):
        destination(read_packed_folder(folder), None)


# ---- before any work


@pytest.mark.parametrize(
    ("who", "repo_id", "why"),
    [
        (account(), "someone/x", ""),
        (account(), "Org/x", ""),
        (account(), "club/x", "only read in club"),
        (account(), "strangers/x", "no member of strangers"),
        (account("read"), "someone/x", "a read token"),
        (account("fineGrained"), "org/x", "without repo.write on org/x or org"),
        (account("fineGrained", user=["someone"]), "org/x", "without repo.write"),
        (account("fineGrained", dataset=["org/x"]), "org/x", "without repo.write"),
        (account("fineGrained", user=["someone"]), "someone/x", ""),
        (account("fineGrained", org=["org"]), "org/x", ""),
        (account("fineGrained", model=["org/x"]), "org/x", ""),
        (account("fineGrained", org=["club"]), "club/x", "only read in club"),
        ({"name": "org", "type": "org", "auth": {"type": "oauth"}}, "org/x", ""),
    ],
)
def test_what_the_hub_says_of_a_token_decides(who: dict[str, Any], repo_id: str, why: str) -> None:
    found = lacks(who, repo_id)
    assert why in found
    assert bool(why) == bool(found)


def test_a_fine_grained_token_that_only_reads_is_refused() -> None:
    who = account("fineGrained", org=["org"])
    who["auth"]["accessToken"]["fineGrained"]["scoped"][0]["permissions"].remove("repo.write")
    assert "without repo.write" in lacks(who, "org/x")


@pytest.mark.parametrize(
    ("repo_ids", "said"),
    [
        (["model"], "names no user or organization"),
        (["org/a b"], "no name for a repository"),
        (["a/b/c"], "no name for a repository"),
        (["org/x", "someone/x"], "different names after the slash"),
    ],
)
def test_names_are_checked_first(hub: WritableHub, repo_ids: list[str], said: str) -> None:
    with pytest.raises(PublicationError, match=said):
        preflight(dict.fromkeys(repo_ids))
    assert hub.asked == []


def test_nothing_is_published_offline_or_without_token(
    hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(PublicationError, match="HF_HUB_OFFLINE"):
            preflight({REPO: None})
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PublicationError, match="there is no token") as refused:
        preflight({REPO: None})
    assert "hf auth login" in refused.value.hint
    assert hub.asked == []


def test_what_is_to_be_private_does_not_go_to_a_public_repository(
    publish: Callable[..., Any], hub: WritableHub
) -> None:
    hub.repositories[REPO] = Repository(dict(OTHERS))
    ended = publish("--private")
    assert ended.code == 6
    assert "exists and is public" in ended.err
    assert hub.repositories[REPO].files == OTHERS
    assert publish("--public").code == 0
    assert publish("--repo-id", "someone/new", "--public").code == 0
    assert not hub.repositories["someone/new"].private


def test_secrets_are_taken_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "odd-token")
    said = scrub(
        "Bearer hf_abcdefghijkl odd-token\n while PUT 'https://s3/x?X-Amz-Signature=abc' " + "x" * 400
    )
    assert said.startswith("Bearer … … while PUT 'https://s3/x' xxx")
    assert len(said) == 300


# ---- runs


def test_a_run_refuses_before_any_work(
    tmp_path: Path, plugin: Path, quantool: Callable[..., Any], hub: WritableHub
) -> None:
    hub.who = account("read")
    ended = quantool(write_job(tmp_path, {"repo_id": REPO, "push_to_hub": True}))
    assert (ended.code, "a read token" in ended.err) == (6, True)
    assert not (tmp_path / "out").exists()


def test_each_repository_is_published_when_all_of_its_artifacts_passed(
    tmp_path: Path, plugin: Path, quantool: Callable[..., Any], hub: WritableHub
) -> None:
    def entry(level: str, name: str, divergence: float) -> dict[str, Any]:
        options = {"divergence": divergence, "stem": name}
        return {
            "method": "fake", "quant_level": level, "repo_id": f"org/{name}", "quantization_config": options,
        }  # fmt: skip

    def job(divergence: float) -> Path:
        entries = [entry("Q8_0", "bad", divergence), entry("Q4_K_M", "good", 0.0001)]
        return write_job(tmp_path, {"push_to_hub": True, "private": False, "quantizations": entries})

    ended = quantool(job(9.0))
    assert ended.code == 5, ended.err
    assert "bad is not published" in ended.err
    assert f"published: {hub.url}/org/good/tree/" in ended.out
    assert list(hub.repositories) == ["org/good"]
    assert not hub.repositories["org/good"].private
    commit = hub.repositories["org/good"].commit
    hub.faults = [Fault("POST /api/repos/create", status=500)]
    ended = quantool(job(0.0001))
    assert ended.code == 6, ended.err
    assert "create org/bad: the Hub answers 500" in ended.err
    ended = quantool(job(0.0001), "--json")
    assert ended.code == 0, ended.err
    assert [made["repo_id"] for made in json.loads(ended.out)["publications"]] == ["org/bad", "org/good"]
    assert set(hub.repositories) == {"org/good", "org/bad"}
    good = Publication.model_validate_json((tmp_path / "out/records/good.publication.json").read_text())
    assert good.sent == ("README.md", "SHA256SUMS") or hub.repositories["org/good"].commit != commit


@pytest.mark.e2e
def test_a_run_pushes_and_a_second_one_has_nothing_new(
    tmp_path: Path, plugin: Path, hub: WritableHub
) -> None:
    job = write_job(tmp_path, {"repo_id": REPO, "push_to_hub": True})
    for told in ("8 of 8 files sent", "nothing was new"):
        with child(hub, tmp_path, job, HF_HUB_DISABLE_XET="1") as run:
            out, err = run.communicate(timeout=60)
        assert run.returncode == 0, err
        assert told in out
        assert hub.token not in out + err
    assert len(hub.sent("POST", "/commit/main")) == 1
    assert content(tmp_path / "out" / "model-FAKE").items() <= hub.repositories[REPO].files.items()


@pytest.mark.e2e
@pytest.mark.parametrize(("status", "words"), [(403, ()), (500, ("--mode", "pull_request")), (429, ())])
def test_large_files_go_through_xet(
    tmp_path: Path, folder: Path, hub: WritableHub, status: int, words: tuple[str, ...]
) -> None:
    import hf_xet  # type: ignore[import-untyped]

    hub.repositories[REPO] = Repository(dict(OTHERS))
    hub.cas = tmp_path / "cas"
    hub.cas.mkdir()
    for name in GGUFS:
        hub.xet[sha256_of(folder / name)] = hf_xet.hash_files([str(folder / name)])[0].hash
    hub.faults = [Fault("GET .*/xet-write-token/", status=status, times=ALWAYS)]
    quick = {
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    }  # else minutes
    for code in (6, 0):
        with child(hub, tmp_path, "publish", folder, *words, **quick) as run:
            out, err = run.communicate(timeout=120)
        assert run.returncode == code, err
        assert code == 0 or "upload model-Q4_K_M.gguf to" in err
        assert hub.token not in out + err
        assert "cas-token" not in out + err
        assert code == 0 or hub.repositories[REPO].files == OTHERS
        hub.faults = []
    assert hub.sent("PUT") == []
    shown = "refs/pr/1" if words else "main"
    assert hub.repositories[REPO].at(shown) == OTHERS | content(folder)


@pytest.mark.e2e
def test_a_killed_push_goes_on_where_it_was(tmp_path: Path, folder: Path, hub: WritableHub) -> None:
    arrived, release = threading.Event(), threading.Event()

    def stall() -> None:
        arrived.set()
        release.wait(30)

    first, second = (sha256_of(folder / name) for name in GGUFS)
    hub.faults = [Fault(f"PUT /objects/{second}", "drop", before=stall)]
    with child(hub, tmp_path, "publish", folder, HF_HUB_DISABLE_XET="1") as run:
        assert arrived.wait(30)
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=10)
    release.set()
    assert run.returncode == -signal.SIGKILL
    assert set(hub.repositories[REPO].files) == {".gitattributes"}
    with child(hub, tmp_path, "publish", folder, HF_HUB_DISABLE_XET="1") as run:
        _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert (hub.put(first), hub.put(second)) == (1, 1)
    assert content(folder).items() <= hub.repositories[REPO].files.items()
