"""What only forked workers have: libraries that were imported before, by a server that can die without harm."""

import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantool.errors import DependencyError
from quantool.runtime import children, fork_server, process, worker
from tests.conftest import dies

pytestmark = pytest.mark.usefixtures("plugin")

TRANSFORMERS = fork_server.IMPORTS["transformers"]
LIBRARY = """\
import os, sys, time
with open(os.environ["IMPORTS"], "a") as file:
    print(__name__, os.getppid(), "sklearn" in sys.modules, file=file)
if "fork_server" in sys.argv[0]:
    exec(os.environ.get("WHILE_IMPORTED", ""))
"""

Call = Callable[[worker.Preload], dict[str, Any]]


@pytest.fixture
def imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which torch and transformers, small ones here, tell that they are imported."""
    site, file = tmp_path / "site", tmp_path / "imports"
    for module in ("torch", *TRANSFORMERS):
        folder = site.joinpath(*module.split("."))
        folder.mkdir(parents=True)
        for part in [folder, *folder.parents][: module.count(".") + 1]:
            (part / "__init__.py").touch()
        (folder / "__init__.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("IMPORTS", str(file))
    return file


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the fake worker that tells what it finds, forked with the given libraries."""
    work = importlib.import_module("quantool_fake").loaded

    def called(libraries: worker.Preload) -> dict[str, Any]:
        monkeypatch.setitem(worker._PRELOADS, worker.name_of(work), libraries)
        return process.call(work, {}, log=tmp_path / "w.log")

    return called


def imported(imports: Path) -> list[str]:
    return [line.split()[0] for line in imports.read_text().splitlines()]


def test_libraries_are_imported_once(imports: Path, call: Call) -> None:
    assert [call("transformers")["modules"] for _ in range(3)] == [["torch", "transformers"]] * 3
    assert imported(imports) == ["torch", *TRANSFORMERS]


def test_a_worker_gets_no_library_that_it_did_not_declare(imports: Path, call: Call) -> None:
    """llama.cpp built by some compilers dies in a process that has torch."""
    assert call("transformers")["modules"] == ["torch", "transformers"]
    assert call("torch")["modules"] == ["torch"]
    assert call("quantool")["modules"] == []
    assert call("nothing") | {"threads": 1} == {
        "modules": [],
        "forked": False,
        "threads": 1,
        "directory": str(Path.cwd()),
    }
    assert imported(imports).count("torch") == 1


def test_scikit_learn_stays_out(imports: Path, call: Call) -> None:
    """Transformers imports it where it is installed, and with it pandas: 1.5 s. A worker may still want it."""
    assert "sklearn" not in call("transformers")["modules"]
    hidden = {line.split()[0]: line.split()[2] for line in imports.read_text().splitlines()}
    assert hidden == {"torch": "False", **dict.fromkeys(TRANSFORMERS, "True")}


def test_another_environment_is_another_server(
    imports: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries read theirs when they are imported."""
    call("torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    call("torch")
    monkeypatch.setenv("COLUMNS", "99")  # of the terminal: no library's
    call("torch")
    assert imported(imports) == ["torch", "torch"]


def test_a_worker_is_in_the_folder_of_its_caller(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("quantool")
    monkeypatch.chdir(tmp_path)
    assert call("quantool")["directory"] == str(tmp_path)


@pytest.mark.parametrize(
    "ending", ["os.abort()", "raise OSError('libgomp.so: not found')", "import missing_one"]
)
def test_where_a_library_cannot_be_imported_workers_are_not_forked(
    imports: Path, call: Call, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setenv("WHILE_IMPORTED", ending)
    assert not call("torch")["forked"]
    assert call("quantool")["forked"]


def test_a_server_that_has_started_cuda_forks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(cuCtxGetCurrent=lambda _context: fork_server.CUDA_NOT_INITIALIZED)
    monkeypatch.setattr("ctypes.CDLL", lambda _name: state)
    monkeypatch.setitem(fork_server.IMPORTS, "torch", ("json",))
    fork_server._import("torch")
    state.cuCtxGetCurrent = lambda _context: 0
    with pytest.raises(fork_server.ForkError, match="importing torch has started CUDA"):
        fork_server._import("torch")


def test_a_server_that_was_killed_is_replaced(call: Call) -> None:
    assert call("quantool")["forked"]
    servers = children._Servers.current
    assert servers is not None
    servers.process.kill()
    assert dies(servers.process.pid)
    call("quantool")
    assert call("quantool")["forked"]


def test_an_interruption_does_not_wait_for_an_import(
    imports: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHILE_IMPORTED", "time.sleep(60)")

    def interrupt(*_: object) -> None:
        while not imports.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            call("torch")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 10
    assert dies(int(imports.read_text().split()[1]))


def test_nothing_outlives_a_process_that_ends_in_order(imports: Path, call: Call, tmp_path: Path) -> None:
    code = (
        "import pathlib, quantool_fake\n"
        "from quantool.runtime import children, process, worker\n"
        "worker.preloaded('transformers')(quantool_fake.loaded)\n"
        f"process.call(quantool_fake.loaded, {{}}, log=pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "print(children._Servers.current.process.pid)"
    )
    first = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=process.environment()
    ).stdout
    # Each line of the file names the parent of the server that imports: the one before it.
    parents = {int(line.split()[1]) for line in imports.read_text().splitlines()}
    assert int(first) in parents
    assert len(parents) == 2
    assert not [pid for pid in parents if Path(f"/proc/{pid}").exists()]


def test_real_libraries_leave_no_pool_behind(call: Call) -> None:
    """A forked child of a process whose OpenMP threads run would hang in its first product."""
    found = call("torch")
    assert found["modules"] == ["torch"]
    assert found["threads"] == 1


def test_a_missing_library_is_named_by_the_worker(
    tmp_path: Path, imports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = importlib.import_module("quantool_fake").missing_library
    monkeypatch.setitem(worker._PRELOADS, worker.name_of(work), "torch")
    monkeypatch.setenv("WHILE_IMPORTED", "import no_such_library")
    with pytest.raises(DependencyError, match="no_such_library, which is not installed"):
        process.call(work, {}, log=tmp_path / "log")
    assert imported(imports) == ["torch"]
