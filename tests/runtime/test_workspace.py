import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantool.errors import ConfigError, DependencyError
from quantool.runtime.workspace import Stage, Workspace, write_text, written

CAPABILITIES_OVER_PERMISSIONS = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH in linux/capability.h
PR_CAPBSET_DROP = 24  # linux/prctl.h


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def python(code: str, *arguments: object, before: Callable[[], None] | None = None) -> str:
    """What a child prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=before)
    return done.stdout.strip()


def as_a_plain_user() -> None:
    """Give up what lets root ignore permissions."""
    for capability in CAPABILITIES_OVER_PERMISSIONS:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


# --- files that appear whole or not at all


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.gguf"
    with written(target) as part:
        assert part.parent == target.parent  # so that renaming cannot copy
        part.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(tmp_path) == ["deep", "deep/file.gguf"]


def test_a_folder_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with written(tmp_path / "model") as part:
        (part / "sub").mkdir(parents=True)
        (part / "sub" / "new").touch()
        assert (tmp_path / "model" / "old").exists()
    assert names(tmp_path) == ["model", "model/sub", "model/sub/new"]


@pytest.mark.parametrize("error", [ConfigError("no"), KeyboardInterrupt(), ValueError("bug")])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "file", "old")

    def fail() -> None:
        with written(tmp_path / "file") as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_a_killed_run_left_is_not_continued(tmp_path: Path) -> None:
    with written(tmp_path / "file") as part:
        left = part
        part.write_text("new")
    left.write_text("a long leftover")
    with written(tmp_path / "file") as part:
        assert not part.exists()
        part.write_text("newer")
    left.mkdir()
    write_text(tmp_path / "file", "newest")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "newest"


def test_everything_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    target = tmp_path / "model"

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        synced.append(("after " if target.exists() else "before ") + path.name)

    monkeypatch.setattr(os, "fsync", fsync)
    with written(target) as part:
        part.mkdir()
        (part / "a").touch()
        (part / "b").touch()
    assert sorted(synced[:2]) == ["before a", "before b"]
    assert synced[2:] == [f"after {tmp_path.name}"]


def test_a_disk_that_is_full_while_writing(tmp_path: Path) -> None:
    """Linux's device that is always full stands for the disk."""

    def write() -> None:
        with written(tmp_path / "file") as part:
            part.symlink_to("/dev/full")
            part.write_text("x")

    with pytest.raises(DependencyError, match=f"cannot write {tmp_path}/file: No space left on device"):
        write()
    assert names(tmp_path) == []


def test_a_full_disk_that_numpy_tells_in_its_own_words(tmp_path: Path) -> None:
    """T13: ``ndarray.tofile`` names no errno."""

    def write() -> None:
        with written(tmp_path / "file") as part:
            part.symlink_to("/dev/full")
            np.zeros(1 << 18, np.float32).tofile(part)

    with pytest.raises(DependencyError, match=r"No space left on device \(\d+ requested and \d+ written\)"):
        write()


def test_a_disk_that_is_full_when_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "old")

    def fsync(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DependencyError, match="No space left"):
        write_text(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


WRITE = """
import sys, pathlib
from quantool.errors import DependencyError
from quantool.runtime.workspace import write_text
try:
    write_text(pathlib.Path(sys.argv[1]), "x" * 100_000)
except DependencyError as error:
    print(error)
"""


def test_a_file_larger_than_allowed(tmp_path: Path) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))" + WRITE
    assert python(code, tmp_path / "file") == f"cannot write {tmp_path / 'file'}: File too large"
    assert names(tmp_path) == []


def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o555)
    said = python(WRITE, tmp_path / "shut" / "file", before=as_a_plain_user)
    assert said == f"cannot write {tmp_path / 'shut' / 'file'}: Permission denied"


def test_a_folder_that_may_not_even_be_looked_into(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o000)
    said = python(WRITE, tmp_path / "shut" / "file", before=as_a_plain_user)
    assert said == f"cannot write {tmp_path / 'shut' / 'file'}: Permission denied"


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DependencyError, match=r"cannot write .*/out/sub/file: "):
        write_text(tmp_path / "out" / "sub" / "file", "x")
    with pytest.raises(DependencyError, match=r"cannot write .*/out/file: "):
        write_text(tmp_path / "out" / "file", "x")


def test_a_folder_where_the_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "file" / "precious").mkdir(parents=True)
    with pytest.raises(DependencyError, match="directory"):
        write_text(tmp_path / "file", "x")
    assert names(tmp_path) == ["file", "file/precious"]


# --- the lock

HOLD = """
import sys, pathlib
from quantool.runtime.workspace import Workspace
with Workspace(pathlib.Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def test_a_second_run_is_refused_with_the_process_that_is_there(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    (tmp_path / "out" / ".file.part").touch()
    with pytest.raises(
        DependencyError, match=rf"in use by another quantool run \(process {holder.pid}\)"
    ) as caught:
        Workspace(tmp_path / "out").lock().__enter__()
    assert "output_path" in caught.value.hint
    assert (tmp_path / "out" / ".file.part").exists(), "swept what the other one is writing"
    holder.communicate("")
    with Workspace(tmp_path / "out").lock():
        pass


def test_a_killed_run_leaves_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Workspace(tmp_path / "out").lock():
        assert (tmp_path / "out" / ".quantool" / "lock").read_text() == str(os.getpid())


def test_the_lock_is_let_go_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no"), Workspace(tmp_path).lock():
        raise ConfigError("no")
    with Workspace(tmp_path).lock():
        pass


def test_nothing_is_created_before_the_lock(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out")
    assert workspace.recall("stage", "key") is None
    assert names(tmp_path) == []


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    keep = [tmp_path / "repo" / "model.gguf", tmp_path / "their.part", tmp_path / "linked" / ".x.part"]
    folder = tmp_path / "repo" / ".model.part"
    sweep = [folder / "deep" / "shard", folder / ".inner.part", tmp_path / ".a.part"]
    (tmp_path.parent / "elsewhere").mkdir(exist_ok=True)
    (tmp_path / "linked").symlink_to(tmp_path.parent / "elsewhere")
    for path in keep + sweep:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with Workspace(tmp_path).lock():
        assert [path for path in sweep if path.exists()] == []
        assert not folder.exists()
        assert [path for path in keep if not path.exists()] == []


def test_a_run_inside_this_output_folder_keeps_what_it_writes(tmp_path: Path) -> None:
    """T12."""
    inner = Workspace(tmp_path / "out" / "models" / "inner")
    with inner.lock(), written(inner.root / "repo" / "model.gguf") as part:
        part.write_text("half")
        own = tmp_path / "out" / "models" / ".own.part"
        own.touch()
        with Workspace(tmp_path / "out").lock():
            assert part.exists()
            assert not own.exists()
        part.write_text("whole")
    assert (inner.root / "repo" / "model.gguf").read_text() == "whole"


@pytest.mark.parametrize("place", ["file", "file/sub", "/proc/quantool"])
def test_a_place_where_no_folder_can_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DependencyError, match="cannot write to"):
        Workspace(tmp_path / place).lock().__enter__()


# --- finished stages


@pytest.fixture
def kept(tmp_path: Path) -> Workspace:
    """A workspace with one finished stage of two files."""
    workspace = Workspace(tmp_path)
    files = [tmp_path / "a", tmp_path / "sub" / "b"]
    for file in files:
        write_text(file, "content")
    workspace.keep("gguf/Q8_0", "key", files, {"answer": [1, None, "é"]})
    return workspace


def test_a_finished_stage_is_recalled(kept: Workspace) -> None:
    assert Workspace(kept.root).recall("gguf/Q8_0", "key") == {"answer": [1, None, "é"]}


@pytest.mark.parametrize(("name", "key"), [("gguf/Q8_0", "other"), ("gguf-Q8_0", "key"), ("gguf/Q8", "key")])
def test_another_key_or_name_is_another_stage(kept: Workspace, name: str, key: str) -> None:
    assert kept.recall(name, key) is None


@pytest.mark.parametrize("change", ["size", "time", "removed", "folder"])
def test_a_stage_whose_files_were_touched_is_not_finished(kept: Workspace, change: str) -> None:
    file = kept.root / "sub" / "b"
    before = file.stat()
    if change == "size":
        file.write_text("content!")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "time":
        file.write_text("CONTENT")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif change == "removed":
        file.unlink()
    else:
        file.unlink()
        file.parent.rmdir()
        file.parent.touch()
    assert kept.recall("gguf/Q8_0", "key") is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\0" * 40, b"\xff\xfe", b"[]", b"{}", b"null", b'{"key": "key"}']
)
def test_a_damaged_record_is_no_record(kept: Workspace, content: bytes) -> None:
    (record,) = kept.stages.iterdir()
    record.write_bytes(content)
    assert kept.recall("gguf/Q8_0", "key") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.pop("result"),
        lambda saved: saved.update(result={}),
        lambda saved: saved["result"].pop("answer"),
        lambda saved: saved["result"].update(answer="[1"),
        lambda saved: saved.update(files={}),
        lambda saved: saved.update(files={"a": 3}),
        lambda saved: saved.update(released=5),
        lambda saved: saved.update(key=["key"]),
        lambda saved: saved.pop("digest"),
    ],
)
def test_a_record_that_lacks_a_part_is_no_record(kept: Workspace, damage: Callable[[Any], Any]) -> None:
    """T14: valid JSON all the same, so that nothing would see it before a method looks for what is not there."""
    (record,) = kept.stages.iterdir()
    saved = json.loads(record.read_text())
    damage(saved)
    record.write_text(json.dumps(saved))
    assert kept.recall("gguf/Q8_0", "key") is None
    kept.release([kept.root / "a"])  # which goes through all records
    assert kept.recall("gguf/Q8_0", "key") is None


def test_a_deep_record_is_no_record(kept: Workspace) -> None:
    (record,) = kept.stages.iterdir()
    record.write_text("[" * 100_000)
    assert kept.recall("gguf/Q8_0", "key") is None


def test_a_run_that_gives_one_name_to_two_stages_is_stopped(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with workspace.lock():
        workspace.keep("base", "one", [], {})
        with pytest.raises(RuntimeError, match="stage base is used with two keys"):
            workspace.recall("base", "another")
    with workspace.lock():
        assert workspace.recall("base", "another") is None  # a new run, with other settings
        workspace.keep("base", "another", [], {})
        with pytest.raises(RuntimeError, match="two keys"):
            workspace.keep("base", "one", [], {})


def test_a_stage_can_be_forgotten(kept: Workspace) -> None:
    kept.forget("gguf/Q8_0")
    kept.forget("another")
    assert kept.recall("gguf/Q8_0", "key") is None


@pytest.mark.parametrize("place", ["file", "file/sub"])
def test_where_no_folder_can_be_nothing_is_recalled(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    assert Workspace(tmp_path / place).recall("scan", "key") is None


def test_a_record_that_cannot_be_read_is_told(kept: Workspace) -> None:
    (record,) = kept.stages.iterdir()
    record.unlink()
    record.mkdir()
    with pytest.raises(DependencyError, match=r"cannot read .*stages: Is a directory"):
        kept.recall("gguf/Q8_0", "key")


def test_the_folder_may_be_moved(kept: Workspace, tmp_path: Path) -> None:
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert Workspace(moved).recall("gguf/Q8_0", "key") is not None
    moved.rename(tmp_path)


def test_files_outside_the_folder_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantool validate` judges files that lie anywhere."""
    monkeypatch.chdir(tmp_path)
    write_text(Path("model.gguf"), "content")
    workspace = Workspace(Path("out"))
    workspace.keep("report", "key", [Path("model.gguf")], {})
    assert workspace.recall("report", "key") == {}
    monkeypatch.chdir("/")
    assert Workspace(tmp_path / "out").recall("report", "key") == {}
    write_text(tmp_path / "model.gguf", "another content")
    assert Workspace(tmp_path / "out").recall("report", "key") is None


def test_a_stage_runs_once(tmp_path: Path) -> None:
    workspace, runs = Workspace(tmp_path), []

    def produce() -> tuple[list[Path], dict[str, Any]]:
        runs.append(1)
        write_text(tmp_path / "f", "x")
        return [tmp_path / "f"], {"run": len(runs)}

    assert workspace.stage("s", "k", produce) == {"run": 1}
    assert workspace.stage("s", "k", produce) == {"run": 1}
    assert workspace.stage("s", "k2", produce) == {"run": 2}
    (tmp_path / "f").unlink()
    assert workspace.stage("s", "k2", produce) == {"run": 3}


def test_threads_that_want_the_same_stages_let_one_of_them_do_it(tmp_path: Path) -> None:
    workspace, runs = Workspace(tmp_path), []

    def slow(number: int) -> dict[str, Any]:
        time.sleep(0.05)
        runs.append(number)
        return {"run": len(runs)}

    def single() -> dict[str, Any]:
        return workspace.stage("a", "k", lambda: ([], slow(0)))

    def both() -> list[dict[str, Any]]:
        stages = [Stage("b", "k"), Stage("a", "k")]
        return workspace.together(stages, lambda missing: [slow(number) for number in missing])

    with ThreadPoolExecutor(4) as pool:
        alone = [pool.submit(single) for _ in range(2)]
        pairs = [pool.submit(both) for _ in range(2)]
        answers = [future.result() for future in alone] + [future.result()[1] for future in pairs]
    assert len(runs) == 2
    assert all(answer == answers[0] for answer in answers)


def test_what_is_asked_anew_and_answers_as_before_stays_as_it_was_kept(kept: Workspace) -> None:
    stages = [Stage("asked", "key")]
    kept.together(stages, lambda _: [{"answer": 1}])
    (record,) = kept.stages.glob("asked-*")
    before = record.stat().st_ino, record.stat().st_mtime_ns
    assert kept.together(stages, lambda _: [{"answer": 1}], anew=True) == [{"answer": 1}]
    assert (record.stat().st_ino, record.stat().st_mtime_ns) == before
    assert kept.together(stages, lambda _: [{"answer": 2}], anew=True) == [{"answer": 2}]
    assert kept.recall("asked", "key") == {"answer": 2}


def test_a_failed_stage_is_not_finished(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)

    def fail() -> tuple[list[Path], dict[str, Any]]:
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        workspace.stage("s", "k", fail)
    assert workspace.recall("s", "k") is None


# --- files that were deleted on purpose


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Two stages of the same two files."""
    (tmp_path / "repo").mkdir()
    paths = [tmp_path / "repo" / name for name in ("a.gguf", "config.json")]
    for path in paths:
        path.write_text(path.name)
    workspace = Workspace(tmp_path)
    for stage in ("made", "judged"):
        workspace.keep(stage, "key", paths, {"of": stage})
    return tmp_path


def test_released_files_count_as_there_for_a_bounded_workspace_alone(finished: Path) -> None:
    Workspace(finished).release([finished / "repo" / "a.gguf"])
    assert names(finished / "repo") == ["config.json"]
    for stage in ("made", "judged"):
        assert Workspace(finished, bounded=True).recall(stage, "key") == {"of": stage}
        assert Workspace(finished, bounded=True).recall(stage, "other") is None
        assert Workspace(finished).recall(stage, "key") is None
    (finished / "repo" / "a.gguf").write_text("somebody else's")
    assert Workspace(finished, bounded=True).recall("made", "key") is None


def test_other_files_must_be_there_as_ever(finished: Path) -> None:
    Workspace(finished).release([finished / "repo" / "a.gguf"])
    (finished / "repo" / "config.json").unlink()
    assert Workspace(finished, bounded=True).recall("made", "key") is None


def test_reclaimed_files_have_to_be_made_again(finished: Path) -> None:
    workspace = Workspace(finished, bounded=True)
    paths = [finished / "repo" / "a.gguf"]
    workspace.release(paths)
    workspace.reclaim(paths)
    assert workspace.recall("made", "key") is None
    paths[0].write_text("made anew")
    workspace.keep("made", "key", paths, {"of": "made"})
    assert Workspace(finished).recall("made", "key") == {"of": "made"}


def test_a_release_that_was_cut_short_leaves_the_file_valid(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: object, **_keys: object) -> None:
        raise KeyboardInterrupt

    workspace = Workspace(finished, bounded=True)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", interrupt)
        with pytest.raises(KeyboardInterrupt):
            workspace.release([finished / "repo" / "a.gguf"])
    assert workspace.recall("made", "key") == {"of": "made"}
    assert Workspace(finished).recall("made", "key") == {"of": "made"}


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', "null"])
def test_damaged_records_of_stages_do_not_stop_a_release(finished: Path, text: str) -> None:
    (finished / ".quantool" / "stages" / "broken.json").write_text(text)
    Workspace(finished).release([finished / "repo" / "a.gguf"])
    assert Workspace(finished, bounded=True).recall("made", "key") == {"of": "made"}
