"""Whole runs of the command line, started side by side as soon as the first test asks for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import making
import pytest

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"*": {"max_ln_ppl_ratio": 1, "max_mean_kld": 1, "min_same_top_p": 0.3}}
DOCS = {"name": "docs", "path": str(making.TEXT / "heldout.en.txt")}
EXAMPLE = ROOT / "tests/data/quantool-0.2.0-gguf.yaml"
LEGACY = {
    "model_id": "tests/models/tiny-chat",
    "quantization_config.pre_tokenizer": "qwen2",
    "push_to_hub": "false",
    "validation.max_tokens": "2048",
}
PATIENCE = 300  # seconds; other tests may have the cores


@dataclass(frozen=True)
class Run:
    """A configuration in a file, and the command on it."""

    file: Path
    cache: Path

    @property
    def settings(self) -> dict[str, Any]:
        return making.read_json(self.file)

    @property
    def output(self) -> Path:
        return Path(self.settings["output_path"])

    @property
    def folder(self) -> Path:
        """The folder to publish."""
        return self.output / f"{Path(self.settings['model_id']).name}-GGUF"

    def start(self, *words: str, command: str = "run") -> subprocess.Popen[str]:
        return quantool(command, str(self.file), *words, cache=self.cache)

    def finish(self, *words: str, command: str = "run") -> Ended:
        child = self.start(*words, command=command)
        out, err = child.communicate(timeout=PATIENCE)
        return Ended(child.returncode, out, err)


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def stages(self) -> list[str]:
        """What was worked on: the lines that announce a long stage."""
        return [line.removesuffix(" …") for line in self.err.splitlines() if line.endswith(" …")]


def quantool(*words: str, cache: Path) -> subprocess.Popen[str]:
    """Start the command line at the root of the checkout, offline."""
    return subprocess.Popen(
        [sys.executable, "-m", "quantool", *words],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write(folder: Path, name: str, **settings: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"output_path": str(folder / name), **settings}))  # JSON is YAML
    return path


def structure(name: str, folder: Path) -> dict[str, Any]:
    """The configuration of a structure model."""
    options: dict[str, Any] = {"spm_llama": {"add_space_prefix": False}, "gemma3": {}}.get(name, making.QWEN2)
    return {
        "model_id": str(making.model(name)),
        "method": "gguf",
        "quant_level": ["Q8_0", "Q4_K_M"],
        "quantization_config": options,
        "validation": {
            "max_tokens": 512,
            "context": 128,
            "corpora": [DOCS],
            "gates": WIDE,
            "behaviour": {"max_new_tokens": 8},  # what a random model says has no end
        },
    }


def chat() -> dict[str, Any]:
    """The configuration that is interrupted, resumed and changed."""
    return {
        "model_id": str(making.TINY),
        "method": "gguf",
        "quant_level": ["Q8_0", "Q4_K_M"],
        "quantization_config": making.QWEN2 | {"imatrix": True},
        "dataset_path": str(making.TEXT / "calibration.jsonl"),
        "calibration_config": {"max_tokens": 8 * 512},
        "validation": {
            "max_tokens": 1024,
            "context": 128,
            "corpora": [DOCS],
            "gates": WIDE,
            "checks": ["perplexity"],
        },
    }


@pytest.fixture(scope="session")
def cache() -> Path:
    with making.own_cache():
        return Path(os.environ["XDG_CACHE_HOME"])


@pytest.fixture(scope="session")
def runs(
    tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Iterator[Callable[[str], tuple[Run, Ended]]]:
    """``runs(name)``: a finished run, ``chat``, ``legacy`` or a structure."""
    folder = tmp_path_factory.mktemp("runs")
    lanes = ThreadPoolExecutor(2)
    started: dict[str, tuple[Run, Future[Ended]]] = {}
    for name in ("chat", "spm_llama", "qwen3", "gemma3", "moe"):
        settings = chat() if name == "chat" else structure(name, folder)
        run = Run(write(folder, name, **settings), cache)
        started[name] = (run, lanes.submit(run.finish))
        if name == "chat":
            run = Run(EXAMPLE, cache)
            overrides = LEGACY | {"output_path": str(folder / "legacy")}
            words = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
            started["legacy"] = (run, lanes.submit(run.finish, *words))

    def get(name: str) -> tuple[Run, Ended]:
        run, ended = started[name]
        return run, ended.result()

    yield get
    lanes.shutdown(cancel_futures=True)


def wait_until(condition: Callable[[], object], child: subprocess.Popen[str], what: str) -> None:
    """Poll until ``condition`` holds; the child must not end before."""
    until = time.monotonic() + PATIENCE
    while not condition():
        if child.poll() is not None:
            out, err = child.communicate()
            raise AssertionError(f"ended with {child.returncode} before: {what}\n{out}\n{err}")
        assert time.monotonic() < until, what
        time.sleep(0.001)


def workers(pid: int) -> list[int]:
    """Children of a process."""
    return [
        int(word)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for word in (task / "children").read_text().split()
    ]
