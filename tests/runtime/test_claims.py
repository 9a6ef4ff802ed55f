"""Claims hold over nodes and die with their process, however it dies; two watchers never take one both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from quantool.errors import DependencyError
from quantool.runtime import claims
from quantool.runtime.claims import Holder, claimed, holder_of, living
from quantool.runtime.workspace import Stage, Workspace

HOLD = """\
import sys, time
from pathlib import Path
from quantool.runtime import claims
claims.BEAT, claims.LAPSE = 0.1, float(sys.argv[2])
with claims.claimed(Path(sys.argv[1]), wait=True):
    print("held", flush=True)
    time.sleep(60)
"""

Hold = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.1)
    monkeypatch.setattr(claims, "LAPSE", 1.0)
    monkeypatch.setattr(claims, "POLL", 0.02)


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Let another process hold a claim."""
    started: list[subprocess.Popen[str]] = []

    def begin(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(path), "1.0"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        return child

    yield begin
    for child in started:
        child.kill()
        child.communicate()


def elsewhere(path: Path) -> Holder:
    """Write the claim of a process on another node."""
    holder = replace(Holder.myself(), host="node4", space="another boot", job="81")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(holder)))
    return holder


def test_a_claim_is_there_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "stage make.claim"
    with claimed(path, wait=False):
        assert living(path.parent)["stage make"].process == os.getpid()
    assert [*path.parent.iterdir()] == []


def test_one_that_is_held_is_refused_or_waited_for(tmp_path: Path, hold: Hold) -> None:
    path = tmp_path / "a.claim"
    child = hold(path)
    with (
        pytest.raises(DependencyError, match=rf"a is being done by process {child.pid} on "),
        claimed(path, wait=False),
    ):
        pass
    threading.Timer(0.5, child.send_signal, [signal.SIGKILL]).start()
    begun = time.monotonic()
    with claimed(path, wait=True):
        assert child.poll() is not None
    assert 0.4 < time.monotonic() - begun < 0.95  # on the holder's machine its death is seen before the lapse


def test_a_holder_on_another_node_is_gone_when_its_heart_stands_still(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    elsewhere(path)
    with (
        pytest.raises(DependencyError, match=r"process .* on node4, Slurm job 81"),
        claimed(path, wait=False),
    ):
        pass
    begun = time.monotonic()
    with claimed(path, wait=True):
        assert time.monotonic() - begun > 1.0


def test_a_heart_that_beats_is_not_overtaken(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    elsewhere(path)
    ended = threading.Event()

    def beat() -> None:
        for number in range(20):
            os.utime(path, (0, number))  # a clock that is decades off
            time.sleep(0.1)
        ended.set()
        path.unlink()

    thread = threading.Thread(target=beat)
    thread.start()
    with claimed(path, wait=True):
        assert ended.is_set()
    thread.join()


def test_a_number_of_a_process_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    path.write_text(json.dumps(asdict(replace(Holder.myself(), began="1", token="other"))))  # noqa: S106
    assert living(tmp_path) == {}
    with claimed(path, wait=False):
        pass


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"host": 1}'])
def test_a_damaged_claim_lapses(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.claim"
    path.write_text(content)
    assert living(tmp_path) == {}
    with claimed(path, wait=False):
        assert holder_of(path) is not None


def test_a_process_that_was_stopped_too_long_ends_when_it_wakes(tmp_path: Path, hold: Hold) -> None:
    path = tmp_path / "a.claim"
    child = hold(path)
    mine = json.loads(path.read_text())
    path.write_text(json.dumps(mine | {"space": "another boot"}))  # this machine cannot look at the process
    child.send_signal(signal.SIGSTOP)
    with claimed(path, wait=True):
        child.send_signal(signal.SIGCONT)
        _, told = child.communicate(timeout=5)
        assert child.returncode == claims.LOST
        assert f"a was taken over by process {os.getpid()} on " in told
        assert (holder := holder_of(path)) is not None
        assert holder.process == os.getpid()


def test_of_many_watchers_of_a_dead_holder_one_at_a_time_has_the_claim(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    elsewhere(path)
    inside, most, done = [0], [0], []
    turn = threading.Lock()

    def watch() -> None:
        with claimed(path, wait=True):
            with turn:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            with turn:
                inside[0] -= 1
                done.append(1)

    threads = [threading.Thread(target=watch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (most[0], len(done)) == (1, 8)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("error", [PermissionError(1, "no links"), OSError(95, "not supported")])
def test_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "link", refuse)
    test_of_many_watchers_of_a_dead_holder_one_at_a_time_has_the_claim(tmp_path)


# --- in an output folder


def test_stages_are_done_beside_each_other_but_not_beside_a_run(tmp_path: Path) -> None:
    one, other, run = Workspace(tmp_path), Workspace(tmp_path), Workspace(tmp_path)
    with one.share("make a"), other.share("make b"):
        assert {*one.holders()} == {"stage make a", "stage make b"}
        with (
            pytest.raises(DependencyError, match=r"in use by stage make a: process"),
            run.lock(),
        ):
            pass
    with run.lock():
        assert run.holds_all
        with pytest.raises(DependencyError, match="in use by a quantool run: process"), one.share("make a"):
            pass
        with pytest.raises(DependencyError, match="in use by a quantool run: process"), one.submission():
            pass
    assert one.holders() == {}


def test_two_submissions_at_once(tmp_path: Path) -> None:
    with Workspace(tmp_path).submission():
        second = Workspace(tmp_path).submission()
        with pytest.raises(DependencyError, match="submit is being done by process"), second:
            pass


def test_a_result_that_two_stages_need_is_produced_once(tmp_path: Path) -> None:
    made: list[int] = []
    met = threading.Barrier(2)

    def produce() -> tuple[list[Path], dict[str, int]]:
        made.append(1)
        time.sleep(0.3)
        return [], {"number": len(made)}

    def stage(name: str, results: list[dict[str, int]]) -> None:
        workspace = Workspace(tmp_path)
        with workspace.share(name):
            met.wait(10)
            results.append(workspace.stage("base", "key", produce))
            together = [Stage("scores", "key")]
            results += workspace.together(
                together, lambda _: [{"number": len(made) + produce()[1]["number"]}]
            )

    found: list[dict[str, int]] = []
    threads = [threading.Thread(target=stage, args=(name, found)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 2  # the base once, the scores once
    assert len({json.dumps(result) for result in found}) == 2


def test_a_run_of_this_machine_that_died_in_another_container_is_no_hindrance(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    boot = Holder.myself().space.split()[0]
    path = tmp_path / ".quantool" / "claims" / "run.claim"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(replace(Holder.myself(), space=f"{boot} pid:[1]", token="x"))))  # noqa: S106
    with workspace.lock():
        assert workspace.holds_all


def test_a_claim_that_was_waited_for_long_lives_from_the_first_moment(tmp_path: Path) -> None:
    path = tmp_path / "result base.claim"
    seen: list[list[str]] = []

    def wait() -> None:
        with claimed(path, wait=True):
            seen.append([*living(tmp_path)])

    with claimed(path, wait=False):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(claims.LAPSE + 0.2)
    waiting.join(10)
    assert seen == [["result base"]]


@pytest.mark.parametrize("error", [FileExistsError(), OSError(5, "Input/output error")])
def test_a_link_whose_answer_was_lost_is_a_claim_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        raise error

    monkeypatch.setattr(os, "link", lost)
    with claimed(tmp_path / "run.claim", wait=False):
        assert {*living(tmp_path)} == {"run"}
    assert not (tmp_path / "run.claim").exists()
