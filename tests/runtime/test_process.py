"""Real child processes; the worker functions are in plugin.py."""

import importlib
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from quantool.errors import (
    DependencyError,
    PublicationError,
    QuantizationError,
    QuantoolError,
    SourceError,
)
from quantool.runtime import children, process
from tests.conftest import dies, wait_for

pytestmark = pytest.mark.usefixtures("plugin", "way")


@pytest.fixture(params=["forked", "new interpreter"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Workers behave the same whichever way they start."""
    if request.param == "new interpreter":
        monkeypatch.setattr(children, "can_fork", lambda: False)
    return str(request.param)


class Moves:
    """A bar that remembers, and may be interrupted."""

    def __init__(self, *, interrupt: bool = False) -> None:
        self.seen: list[tuple[float, float]] = []
        self.interrupt = interrupt

    def move(self, done: float, total: float) -> None:
        self.seen.append((done, total))
        if self.interrupt:
            raise KeyboardInterrupt


def call(function: str, tmp_path: Path, request: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return process.call(
        getattr(importlib.import_module("quantool_fake"), function),
        request or {},
        log=tmp_path / "logs" / "w.log",
        **more,
    )


def test_result_and_progress_come_back(tmp_path: Path) -> None:
    bar, request = (
        Moves(),
        {"text": "ñ\n" * 100_000, "number": 1.5, "nothing": None},
    )  # longer than a pipe's buffer
    answer = call("result", tmp_path, request, bar=bar)
    assert answer["request"] == request
    assert answer["process"] != os.getpid()
    assert bar.seen == [(1, 4), (4, 4)]


def test_what_the_worker_prints_is_appended_to_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    call("stderr", tmp_path)
    call("stderr", tmp_path)
    lines = (tmp_path / "logs" / "w.log").read_text().splitlines()
    assert lines == ["printed", "complained", "below python"] * 2
    assert capfd.readouterr() == ("", "")


def test_what_a_worker_registers_for_its_end_is_done(tmp_path: Path) -> None:
    """A worker leaves without taking its libraries apart."""
    call("registered", tmp_path, {"path": str(tmp_path / "file")})
    assert (tmp_path / "file").read_text() == "done"
    assert (tmp_path / "logs" / "w.log").read_text().endswith("last words")


def test_threads_of_a_worker_sleep_when_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spinning ones take the cores from everything else; what the user set wins."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    seen = call("stderr", tmp_path)
    assert (seen["OMP_WAIT_POLICY"], seen["TOKENIZERS_PARALLELISM"]) == ("PASSIVE", "true")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert call("stderr", tmp_path)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_an_error_of_ours_keeps_kind_message_and_hint(tmp_path: Path) -> None:
    with pytest.raises(PublicationError, match="the Hub is closed") as caught:
        call("refuse", tmp_path)
    assert caught.value.hint == "come back tomorrow"


def test_an_error_of_a_derived_kind_comes_back_as_the_kind_it_is(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"^level too low$") as caught:
        call("refuse_in_own_words", tmp_path, failure=SourceError)
    assert caught.value.hint == "take a higher one"


def test_an_error_without_a_kind_is_the_callers_failure(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^something is wrong$"):
        call("refuse_generally", tmp_path, failure=SourceError)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"code": 3}, "exit code 3"),
        ({"code": 0}, "exit code 0"),
        ({"signal": "ABRT"}, "SIGABRT (an assertion of llama.cpp)"),
        ({"signal": signal.SIGKILL}, "SIGKILL (out of memory?)"),
        ({"signal": signal.SIGSEGV}, "SIGSEGV"),
        ({"code": 1, "answer": '{"result": {"tensors": [1, 2'}, "exit code 1"),
    ],
    ids=["code 3", "code 0", "abort", "kill", "crash", "half an answer"],
)
def test_a_worker_that_dies_is_told_with_the_end_of_its_log(
    tmp_path: Path, how: dict[str, Any], said: str
) -> None:
    with pytest.raises(QuantizationError) as caught:
        call("end", tmp_path, how)
    assert said in caught.value.message
    assert "quantool_fake:end" in caught.value.message
    where, *lines = caught.value.hint.splitlines()
    assert str(tmp_path / "logs" / "w.log") in where
    assert [line.strip() for line in lines] == [f"line {number}" for number in range(28, 40)]


@pytest.mark.parametrize(
    ("function", "said"),
    [("bug", "ValueError: seven is not eight"), ("no_json", "TypeError")],
)
def test_a_bug_in_a_worker_shows_its_traceback(tmp_path: Path, function: str, said: str) -> None:
    with pytest.raises(SourceError, match="exit code 1 without a result") as caught:
        call(function, tmp_path, failure=SourceError)
    assert said in caught.value.hint


def test_a_full_disk_is_no_bug(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="No space left on device"):
        call("full_disk", tmp_path)


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="quantool_fake:missing_library needs no_such_library"):
        call("missing_library", tmp_path)


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    work = types.FunctionType(Moves.move.__code__, {}, "work")
    work.__module__ = "quantool.nowhere"
    with pytest.raises(DependencyError, match=r"quantool\.nowhere"):
        process.call(work, {}, log=tmp_path / "log")


def test_an_interruption_kills_the_worker_and_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(KeyboardInterrupt):
        call("child", tmp_path, {"pids": str(pids)}, bar=Moves(interrupt=True))
    worker, other = map(int, pids.read_text().split())
    assert dies(worker)
    assert dies(other)


def test_a_dead_worker_leaves_no_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(QuantoolError, match="SIGABRT"):
        call("child", tmp_path, {"pids": str(pids), "die": True})
    assert dies(int(pids.read_text().split()[1]))


PARENT = (
    "import sys, pathlib\n"
    "import quantool_fake\n"
    "from quantool.runtime import children, process\n"
    "if sys.argv[2] == 'new interpreter': children.can_fork = lambda: False\n"
    "process.call(quantool_fake.child, {'pids': sys.argv[1]}, log=pathlib.Path(sys.argv[1] + '.log'))\n"
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_worker_dies_with_its_parent(tmp_path: Path, number: signal.Signals, way: str) -> None:
    pids = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(pids), way], stderr=subprocess.DEVNULL)
    worker, other = map(int, wait_for(pids).split())
    started_by = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    assert (started_by == parent.pid) == (way == "new interpreter")
    try:
        parent.send_signal(number)
        started = time.monotonic()
        parent.wait(timeout=5)
        assert dies(worker)
        assert started_by == parent.pid or dies(started_by)  # the fork server
        assert time.monotonic() - started < 1
        if number == signal.SIGINT:
            assert dies(other)
    finally:
        parent.kill()
        parent.wait()
        if not dies(other, 0.05):
            os.kill(other, signal.SIGKILL)


def test_a_worker_whose_parent_is_gone_already_does_nothing(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    done = subprocess.run(
        [sys.executable, "-m", "quantool.runtime.worker", "quantool_fake:result", str(write_end), "1"],
        input=b"{}",
        pass_fds=(write_end,),
        check=False,
    )
    os.close(write_end)
    with os.fdopen(read_end) as events:
        assert (done.returncode, events.read()) == (1, "")


def test_workers_start_quickly(tmp_path: Path) -> None:
    """The worker's own imports are few: torch or pydantic would show here."""
    code = "import sys, quantool.runtime.worker; print(' '.join(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "pydantic", "typer", "rich", "numpy", "transformers"} & set(loaded)


def test_tail_of_a_log_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"one\n\xff\xfe\nthree\n")
    assert process.tail(tmp_path / "log", lines=2) == "  ��\n  three"


def test_a_bus_error_is_a_full_disk_and_no_wrong_configuration(tmp_path: Path) -> None:
    """T13: what writing to a mapped file on a full disk ends with."""
    with pytest.raises(
        DependencyError, match=r"ended by SIGBUS: the disk is full.* bytes are free in "
    ) as caught:
        call("end", tmp_path, {"signal": int(signal.SIGBUS)}, failure=SourceError)
    assert "output_path" in caught.value.hint
