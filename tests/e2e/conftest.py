"""Whole runs of the command line, each made once for all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import making
import pytest
import yaml

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
PATIENCE = 900  # seconds; other tests may have the cores


@dataclass(frozen=True)
class Run:
    """A configuration in a file, and the command on it."""

    file: Path
    cache: Path

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        return settings

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
        before = self._logs()
        with self.start(*words, command=command) as child:
            try:
                out, err = child.communicate(timeout=PATIENCE)
            finally:
                child.kill()
        stages = sorted(stem for stem, size in self._logs().items() if before.get(stem) != size)
        return Ended(child.returncode, out, err, stages)

    def _logs(self) -> dict[str, int]:
        """Bytes that converter, quantizer and scoring have printed, by the stem of the log."""
        return {
            path.stem: path.stat().st_size
            for path in (self.output / "logs").glob("*.log")
            if path.stem == "converter"
            or path.stem.startswith("quantize-")
            or path.stem.endswith("perplexity")
        }


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    stages: list[str]
    """The long stages that were worked on, by their logs."""


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


def structure(name: str) -> dict[str, Any]:
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


@making.shared
def finished(name: str) -> tuple[Run, Ended]:
    """The run of ``chat``, ``legacy`` or a structure."""
    folder = making.room() / "runs"
    folder.mkdir(exist_ok=True)
    with making.own_cache():
        cache = Path(os.environ["XDG_CACHE_HOME"])
        if name == "legacy":
            run = Run(EXAMPLE, cache)
            overrides = LEGACY | {"output_path": str(folder / name)}
            words = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
            return run, run.finish(*words)
        settings = chat() if name == "chat" else structure(name)
        run = Run(write(folder, name, **settings), cache)
        return run, run.finish()


@pytest.fixture(scope="session")
def runs() -> Callable[[str], tuple[Run, Ended]]:
    """``runs(name)``: a finished run, ``chat``, ``legacy`` or a structure."""
    return finished


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
