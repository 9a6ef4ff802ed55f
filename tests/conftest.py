"""Fixtures of the tests that need no model: the fake plug-in, a checkpoint, a configuration, the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import making
import pytest

from tests.checkpoint import write_checkpoint
from tests.loopback import folder, hub, packed, publish  # noqa: F401 - fixtures of the tests that publish

# A shell starts background jobs, which CI may be, with Ctrl-C ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

FIRST = ("tests/e2e", "tests/methods", "tests/validation")
"""Folders whose tests take minutes: begun last, they would keep one of pytest-xdist's processes busy alone."""


PROCESSES = 4
"""Of pytest-xdist, at most (Makefile)."""


def pytest_configure() -> None:
    """The room of the session is made before pytest-xdist starts the processes that share it.

    So are their threads divided: a product of the tests' small matrices that waits for a second core, which another
    process has, takes five to ten times as long as on one.
    """
    making.room()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // PROCESSES)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of pytest-xdist's processes
        items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


ENTRY_POINTS = """\
[quantool.methods]
fake = quantool_fake:quantize
wrong = quantool_fake:levels

[quantool.checks]
fakecheck = quantool_fake:judge
wrong = quantool_fake:levels
"""


@pytest.fixture(scope="session")
def plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path with the fake plug-in as an installed distribution."""
    return write_plugin(tmp_path_factory.mktemp("plugin"))


def write_plugin(site: Path) -> Path:
    """Make ``site`` such a folder."""
    shutil.copyfile(Path(__file__).with_name("plugin.py"), site / "quantool_fake.py")
    metadata = site / "quantool_fake-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: quantool-fake\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


@pytest.fixture
def plugin(plugin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plug-in is installed in this process, in its workers and in commands that it starts."""
    monkeypatch.syspath_prepend(str(plugin_folder))
    monkeypatch.setenv("PYTHONPATH", str(plugin_folder))
    return plugin_folder


@pytest.fixture
def config_file(tmp_path: Path, plugin: Path) -> Callable[..., Path]:
    """Write a configuration for the fake method on a tiny checkpoint; keywords are its options."""
    model = write_checkpoint(tmp_path / "model")
    text = tmp_path / "held-out.txt"
    text.write_text("Some text to measure on.\n")

    def write(levels: tuple[str, ...] = ("Q8_0", "Q4_K_M"), **options: Any) -> Path:
        path = tmp_path / "job.yaml"
        wanted = {
            "model_id": str(model),
            "method": "fake",
            "quant_level": list(levels),
            "quantization_config": options,
            "output_path": str(tmp_path / "out"),
            "validation": {
                "checks": ["fakecheck"],
                "corpora": [{"name": "text", "path": str(text)}],
            },
        }
        path.write_text(json.dumps(wanted))  # JSON is YAML
        return path

    return write


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def quantool(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """Run the command line in this process."""
    from quantool.cli import main

    def command(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["quantool", *map(str, words)])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist tells its processes the terminal's
    handler = signal.getsignal(signal.SIGTERM)
    yield command
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command line as a process, killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: object) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "quantool", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def wait_for(path: Path, seconds: float = 120.0) -> str:
    """The content of a file that another process writes."""
    until = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.01)
    return path.read_text()


def dies(pid: int, seconds: float = 5.0) -> bool:
    """Whether the process is gone (or only waits to be reaped) within ``seconds``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False
