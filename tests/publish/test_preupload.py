"""Runs that keep one level at a time on disk: made, judged, uploaded, deleted; one commit in the end."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantool.config.load import load
from quantool.errors import ConfigError, PublicationError
from quantool.plugins import find
from quantool.publish.commit import Message, large_file, post_commit
from quantool.publish.permissions import connect
from quantool.publish.push import MISSING_OBJECT
from quantool.publish.upload import missing_uploads, upload_large
from quantool.records import FileRecord, Publication, sha256_of
from quantool.runtime.workspace import Workspace
from tests.loopback import GGUFS, OTHERS, REPO, child, content, write_job
from tests.loopback_hub import Fault, Repository, sha256
from tests.pushing import WritableHub

Run = Callable[..., Any]
MADE = ["made Q8_0", "judged fake/Q8_0", "made Q4_K_M", "judged fake/Q4_K_M"]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own PUT


def job(root: Path, *, divergence: float = 0.00005, **keys: Any) -> Path:
    """Two levels; Q8_0 diverges by ``divergence``."""
    own = {"only": "Q8_0", "divergence": divergence}
    wanted = {"repo_id": REPO, "push_to_hub": True, "disk_bounded": True, "quantization_config": own}
    return write_job(root, wanted | keys)


def done(root: Path) -> list[str]:
    """What was really done since the last time."""
    note = root / "out" / "done.txt"
    lines = note.read_text().splitlines() if note.is_file() else []
    note.unlink(missing_ok=True)
    return lines


def left(root: Path) -> list[str]:
    """Levels on disk."""
    return sorted(path.name for path in (root / "out" / "model-FAKE").glob("*.gguf"))


def sums(root: Path) -> dict[str, str]:
    lines = (root / "out" / "model-FAKE" / "SHA256SUMS").read_text().splitlines()
    return {line[66:]: line[:64] for line in lines}


def is_complete(root: Path, hub: WritableHub, repo_id: str = REPO) -> bool:
    """Whether the Hub has all that SHA256SUMS names, with these hashes."""
    files = hub.repositories[repo_id].files
    return {name: sha256(files[name]) for name in files.keys() & sums(root).keys()} == sums(root)


@pytest.fixture
def bounded(tmp_path: Path, plugin: Path, quantool: Run, hub: WritableHub) -> Run:
    """Run a job; no secret may be told."""

    def run(*words: str, **keys: Any) -> Any:
        ended = quantool(job(tmp_path, **keys), *words)
        assert hub.token not in ended.out + ended.err
        return ended

    return run


def test_one_level_at_a_time_and_one_commit(tmp_path: Path, bounded: Run, hub: WritableHub) -> None:
    seen: list[list[str]] = []
    hub.faults = [Fault("PUT /objects/", "none", times=9, before=lambda: seen.append(left(tmp_path)))]
    ended = bounded("--json")
    assert ended.code == 0, ended.err
    assert done(tmp_path) == MADE
    assert seen == [[GGUFS[1]], [GGUFS[0]]]
    assert left(tmp_path) == []
    assert set(sums(tmp_path)) >= {*GGUFS, "README.md", "quantool.json"}
    assert is_complete(tmp_path, hub)
    assert len(hub.sent("POST", "/commit/main")) == 1
    made = Publication.model_validate(json.loads(ended.out)["publications"][0])
    assert set(made.sent) == {*sums(tmp_path), "SHA256SUMS"}


def test_a_second_run_does_and_sends_nothing(tmp_path: Path, bounded: Run, hub: WritableHub) -> None:
    assert bounded().code == 0
    done(tmp_path)
    hub.asked.clear()
    ended = bounded()
    assert (ended.code, "nothing was new" in ended.out) == (0, True), ended.err
    assert done(tmp_path) == []
    assert hub.sent("PUT") == hub.sent("POST", "/commit/") == []


def test_it_writes_the_same_bytes_as_any_run(tmp_path: Path, bounded: Run, hub: WritableHub) -> None:
    assert bounded(divergence=0.00005).code == 0
    first = dict(hub.repositories[REPO].files)
    done(tmp_path)
    ended = bounded(disk_bounded=False)
    assert ended.code == 0, ended.err
    assert done(tmp_path)[:2] == ["made Q8_0", "made Q4_K_M"]  # what was deleted is there again
    assert left(tmp_path) == sorted(GGUFS)
    files = hub.repositories[REPO].files
    assert {name: files[name] for name in GGUFS} == {name: first[name] for name in GGUFS}
    records = [json.loads(found["quantool.json"])["plan"]["config"] for found in (first, files)]
    assert records[0] == records[1]
    assert len(hub.sent("PUT")) == 2


FIRST, SECOND = (f"PUT /objects/{sha256(text)}" for text in (b"5e-05\n", b"0.0001\n"))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("on", "carried_out", "again"),
    [
        (FIRST, False, MADE[2:]),
        (FIRST, True, MADE[2:]),
        (SECOND, True, []),
        ("POST .*/commit/main", False, []),
        ("POST .*/commit/main", True, []),
    ],
)
def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, plugin: Path, hub: WritableHub, on: str, carried_out: bool, again: list[str]
) -> None:
    """Killed in the middle of a request, before or after the Hub did what it asks for."""
    arrived, release = threading.Event(), threading.Event()

    def stall() -> None:
        arrived.set()
        release.wait(30)

    hub.faults = [Fault(on, "lose", after=stall) if carried_out else Fault(on, "drop", before=stall)]
    file = job(tmp_path)
    with child(hub, tmp_path, file, HF_HUB_DISABLE_XET="1") as run:
        assert arrived.wait(60)
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=10)
    release.set()
    assert done(tmp_path) == MADE[: 4 - len(again)]
    assert len(hub.sent("POST", "/commit/main")) == ("commit" in on and carried_out)
    with child(hub, tmp_path, file, HF_HUB_DISABLE_XET="1") as run:
        _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert done(tmp_path) == again
    assert [hub.put(digest) for name, digest in sums(tmp_path).items() if name in GGUFS] == [1, 1]
    assert is_complete(tmp_path, hub)
    assert len(hub.sent("POST", "/commit/main")) == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("step", ["release", "_mark"])
def test_a_run_that_ends_between_upload_and_deletion(
    tmp_path: Path, bounded: Run, hub: WritableHub, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Workspace, step, lambda *_args, **_keys: _interrupt())
        assert bounded().code == 130
    assert left(tmp_path) == [GGUFS[1]]
    assert bounded().code == 0
    assert done(tmp_path) == MADE
    assert len(hub.sent("PUT")) == 2
    assert left(tmp_path) == []


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_level_that_fails_keeps_everything_invisible(
    tmp_path: Path, bounded: Run, hub: WritableHub
) -> None:
    hub.repositories[REPO] = Repository(dict(OTHERS))
    for expected in (MADE, []):  # a rerun knows the verdict although the file is gone
        ended = bounded(divergence=9.0)
        assert ended.code == 5, ended.err
        assert done(tmp_path) == expected
        assert "fake/Q8_0 did not pass; what was uploaded of the others is named by no commit" in ended.err
        assert hub.repositories[REPO].files == OTHERS
        assert left(tmp_path) == []
        assert len(hub.sent("PUT")) == 1
    wide = {"validation": None}
    text = json.loads((tmp_path / "job.yaml").read_text())["validation"]
    wide["validation"] = text | {"gates": {"Q8_0": {"max_mean_kld": 10.0}}}
    ended = bounded(divergence=9.0, **wide)
    assert ended.code == 0, ended.err
    assert done(tmp_path) == MADE[:2]
    assert len(hub.sent("PUT")) == 2
    assert is_complete(tmp_path, hub)


def test_a_level_that_fails_is_uploaded_when_that_is_allowed(
    tmp_path: Path, bounded: Run, hub: WritableHub
) -> None:
    assert bounded(divergence=9.0).code == 5
    done(tmp_path)
    ended = bounded("--allow-regression", divergence=9.0)
    assert ended.code == 5, ended.err
    assert done(tmp_path) == MADE[:2]
    assert is_complete(tmp_path, hub)
    assert b"Not everything passed" in hub.repositories[REPO].files["README.md"]


def test_what_the_hub_cleared_away_is_made_and_sent_again(
    tmp_path: Path, bounded: Run, hub: WritableHub
) -> None:
    hub.faults = [Fault("POST .*/commit/main", status=500)]
    assert bounded().code == 6
    done(tmp_path)
    lost = next(iter(hub.objects))
    del hub.objects[lost]
    ended = bounded()
    assert ended.code == 0, ended.err
    assert "no longer has what was uploaded: model-Q8_0.gguf; made again" in ended.err
    assert done(tmp_path) == MADE[:2]
    assert is_complete(tmp_path, hub)


def test_a_commit_that_misses_an_upload_starts_over(tmp_path: Path, bounded: Run, hub: WritableHub) -> None:
    hub.faults = [Fault("POST .*/commit/main", status=400, text=f"rejected because an {MISSING_OBJECT}")]
    ended = bounded()
    assert (ended.code, "what is missing is made and sent again" in ended.err) == (6, True), ended.err
    assert set(hub.repositories[REPO].files) == {".gitattributes"}
    done(tmp_path)
    assert bounded().code == 0
    assert done(tmp_path) == MADE
    assert is_complete(tmp_path, hub)


def test_a_damaged_upload_is_made_and_sent_again(tmp_path: Path, bounded: Run, hub: WritableHub) -> None:
    hub.faults = [Fault("PUT /objects/", "flip")]
    ended = bounded()
    assert (ended.code, "shows the files of" in ended.err) == (6, True), ended.err
    assert set(hub.repositories[REPO].files) == {".gitattributes"}
    done(tmp_path)
    assert bounded().code == 0
    assert done(tmp_path) == MADE[:2]
    assert is_complete(tmp_path, hub)


def test_the_hub_that_refuses_an_upload_stops_the_run(tmp_path: Path, bounded: Run, hub: WritableHub) -> None:
    hub.faults = [Fault("PUT /objects/", status=403)]
    ended = bounded()
    assert (ended.code, "upload model-Q8_0.gguf to" in ended.err) == (6, True)
    assert done(tmp_path) == MADE[:2]
    assert bounded().code == 0
    assert done(tmp_path) == MADE[2:]


def test_other_checks_need_the_file_again(tmp_path: Path, bounded: Run, hub: WritableHub) -> None:
    assert bounded().code == 0
    done(tmp_path)
    assert bounded("--set", "validation.max_tokens=1024").code == 0
    assert done(tmp_path) == MADE
    assert len(hub.sent("PUT")) == 2


def test_a_text_that_may_have_changed_unseen_does_not_bring_files_back(
    tmp_path: Path, bounded: Run, hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantool.texts.corpus.identity", lambda _corpus: None)
    assert bounded().code == 0
    done(tmp_path)
    assert bounded().code == 0
    assert done(tmp_path) == []


def test_another_repository_gets_its_own_uploads(tmp_path: Path, bounded: Run, hub: WritableHub) -> None:
    assert bounded().code == 0
    done(tmp_path)
    assert bounded(repo_id="someone/model-FAKE").code == 0
    assert done(tmp_path) == MADE
    assert is_complete(tmp_path, hub, "someone/model-FAKE")


def test_the_folder_can_be_published_further(
    tmp_path: Path, bounded: Run, quantool: Run, hub: WritableHub
) -> None:
    hub.faults = [Fault("POST .*/commit/main", status=500)]
    assert bounded().code == 6
    folder = tmp_path / "out" / "model-FAKE"
    assert quantool("publish", folder, "--tag", "v1").code == 0
    repository = hub.repositories[REPO]
    assert (repository.tags, len(hub.sent("PUT"))) == ({"v1": repository.commit}, 2)
    assert content(folder).items() <= repository.files.items()
    ended = quantool("publish", folder, "--repo-id", "someone/model-FAKE")
    assert (ended.code, re.search("missing: model-Q4_K_M.gguf, model-Q8_0.gguf", ended.err) is not None) == (
        6,
        True,
    )


def test_a_pull_request_is_possible(tmp_path: Path, bounded: Run, hub: WritableHub) -> None:
    for _ in range(2):
        ended = bounded(publish={"mode": "pull_request"})
        assert ended.code == 0, ended.err
    repository = hub.repositories[REPO]
    assert (set(repository.files), len(repository.requests)) == ({".gitattributes"}, 1)
    assert set(GGUFS) <= repository.at("refs/pr/1").keys()


def test_the_plan_counts_the_largest_level_alone(
    tmp_path: Path, plugin: Path, quantool: Run, hub: WritableHub
) -> None:
    for bounded, peak in ((True, 1000), (False, 2000)):
        file = job(tmp_path, disk_bounded=bounded, quantization_config={"bytes": 1000})
        assert json.loads(quantool("plan", file, "--json").out)["machine"]["peak_disk"] == peak


def test_it_needs_somewhere_to_upload_to(tmp_path: Path, plugin: Path) -> None:
    with pytest.raises(ConfigError, match=r"disk_bounded: needs push_to_hub: true"):
        load(job(tmp_path, push_to_hub=False), (), find)


# ---- an upload without its file


def test_a_file_that_changes_under_the_upload_is_refused(hub: WritableHub, tmp_path: Path) -> None:
    hub.repositories[REPO] = Repository(dict(OTHERS))
    (tmp_path / "x.gguf").write_bytes(b"GGUF other")
    file = FileRecord(name="x.gguf", bytes=10, sha256="0" * 64)
    with pytest.raises(PublicationError, match="was changed after it was judged"):
        upload_large(connect(), REPO, tmp_path, file, ("main", False))


def test_a_file_that_changes_after_it_was_hashed_is_refused(hub: WritableHub, tmp_path: Path) -> None:
    """Between the client's two readings of it, and with the old time set again."""
    hub.repositories[REPO] = Repository(dict(OTHERS))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF judged")
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    file = FileRecord(name="x.gguf", bytes=11, sha256=sha256_of(path))

    def change() -> None:
        path.write_bytes(b"GGUF edited")
        os.utime(path, ns=times)

    hub.faults = [Fault("POST .*/objects/batch", "none", before=change)]
    with pytest.raises(PublicationError, match="was changed after it was judged"):
        upload_large(connect(), REPO, tmp_path, file, ("main", False))


def test_a_commit_names_an_upload_by_its_hash(hub: WritableHub, tmp_path: Path) -> None:
    hub.repositories[REPO] = Repository(dict(OTHERS))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(600))
    file = FileRecord(name="x.gguf", bytes=604, sha256=sha256_of(path))
    assert upload_large(connect(), REPO, tmp_path, file, ("main", False))
    path.unlink()
    assert missing_uploads(connect(), REPO, [file]) == []
    sent = len(hub.sent("PUT"))
    line = large_file(file.name, file.sha256, file.bytes)
    made = post_commit(connect(), REPO, [line], Message("x"), hub.repositories[REPO].commit, ("main", False))
    assert made.commit == hub.repositories[REPO].commit
    assert hub.repositories[REPO].files["x.gguf"] == b"GGUF" + bytes(600)
    assert len(hub.sent("PUT")) == sent
    hub.objects.clear()
    assert missing_uploads(connect(), REPO, [file]) == ["x.gguf"]
    assert missing_uploads(connect(), REPO, []) == []


def test_a_large_file_that_the_hub_wants_in_git_is_sent_in_the_commit(
    tmp_path: Path, publish: Run, folder: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.pushing.LFS_ENDS", (".png",))
    monkeypatch.setattr("tests.loopback_hub.LFS_ENDS", (".png",))
    assert publish().code == 0
    assert content(folder).items() <= hub.repositories[REPO].files.items()
    pictures = {path for path in content(folder) if path.endswith(".png")}
    assert len(hub.sent("PUT")) == len(pictures) == 2  # small files, large ones to the Hub
    hub.asked.clear()
    assert "nothing was new" in publish().out
