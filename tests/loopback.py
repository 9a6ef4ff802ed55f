"""Fixtures and helpers of the tests that publish: a packed folder, a Hub on loopback, the command on both."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

import quantool.publish.verify
from quantool.records import sha256_of
from tests.checkpoint import write_checkpoint
from tests.loopback_hub import serving
from tests.pushing import SIGNATURE, WritableHub

REPO = "org/model-FAKE"
GGUFS = ("model-Q4_K_M.gguf", "model-Q8_0.gguf")
OTHERS = {".gitattributes": b"*.gguf filter=lfs\n", "notes.txt": b"mine", "old.gguf": b"GGUF of last year"}
ALWAYS = 99


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, plugin_folder: Path) -> Path:
    """The output folder of a run of the fake method."""
    return pack_fake(tmp_path_factory.mktemp("packed"), plugin_folder)


def pack_fake(root: Path, plugin_folder: Path) -> Path:
    """Run the fake method below ``root``; the output folder."""
    own = {"only": "Q8_0", "divergence": 0.00005}  # else both files are the same
    job = write_job(root, {"repo_id": REPO, "quantization_config": own})
    environment = {**os.environ, "PYTHONPATH": str(plugin_folder)}
    subprocess.run(
        [sys.executable, "-m", "quantool", job, "-q"], env=environment, check=True, capture_output=True
    )
    return root / "out"


def write_job(root: Path, keys: dict[str, Any]) -> Path:
    """A configuration for the fake method: two levels unless ``keys`` say otherwise."""
    (root / "text.txt").write_text("Some text to measure on.\n")
    wanted = {
        "model_id": str(write_checkpoint(root / "model")),
        "output_path": str(root / "out"),
        "validation": {"checks": ["fakecheck"], "corpora": [{"name": "t", "path": str(root / "text.txt")}]},
        **({} if "quantizations" in keys else {"method": "fake", "quant_level": ["Q8_0", "Q4_K_M"]}),
        **keys,
    }
    (root / "job.yaml").write_text(json.dumps(wanted))
    return root / "job.yaml"


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A folder to publish, as the run left it."""
    shutil.copytree(packed, tmp_path / "out")
    return tmp_path / "out" / "model-FAKE"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """An empty Hub; huggingface_hub asks it, by classic LFS, and does not wait between tries."""
    with hub_on_loopback(monkeypatch) as hub:
        yield hub


@contextmanager
def hub_on_loopback(
    monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], None] = lambda _: None
) -> Iterator[WritableHub]:
    """The Hub of the fixture; ``sleep`` stands for all waiting between tries."""
    with serving(WritableHub()) as hub:
        assert isinstance(hub, WritableHub)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=sleep))
        monkeypatch.setattr(
            quantool.publish.verify, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
        )
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setattr(socket, "getaddrinfo", _loopback_only)
        yield hub


_getaddrinfo = socket.getaddrinfo


def _loopback_only(host: Any, *rest: Any, **keys: Any) -> Any:
    assert host == "127.0.0.1", f"asked for {host}"
    return _getaddrinfo(host, *rest, **keys)


@pytest.fixture
def publish(quantool: Callable[..., Any], folder: Path, hub: WritableHub) -> Callable[..., Any]:
    """Run ``quantool publish``; nothing that it says may hold a secret."""

    def run(*words: str) -> Any:
        ended = quantool("publish", folder, *words)
        for secret in (hub.token, SIGNATURE):
            assert secret not in ended.out + ended.err
        return ended

    return run


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def child(hub: WritableHub, tmp_path: Path, *words: object, **variables: str) -> subprocess.Popen[str]:
    """The command line as a user starts it, in a process of its own; it can reach nothing but the Hub."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "quantool", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change quantool.json, and SHA256SUMS with it."""
    path = folder / "quantool.json"
    before, record = sha256_of(path), json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, sha256_of(path)))
