"""Calibration on several GPUs: who gets which samples, what torchrun's processes say and how they end, the same weights."""

from __future__ import annotations

import shutil
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import making
import pytest

from quantool import pipeline
from quantool.config.schema import Config
from quantool.errors import ConfigError, DependencyError, QuantizationError
from quantool.methods._compressed import make, ranks, torchrun
from quantool.runtime import gpus
from quantool.runtime.progress import Progress

GIB = 1 << 30
TORCHRUN = """\
#!{python}
import json, sys, time
events, request = sys.argv[-2:]
asked = json.load(open(request))
with open(events, "w") as pipe:
    for line in asked["says"]:
        pipe.write(json.dumps(line) + "\\n")
if asked.get("stays"):
    time.sleep(600)
sys.exit(asked.get("exit", 0))
"""


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of torchrun a script that writes what the request ``says``."""
    script = tmp_path / "torchrun"
    script.write_text(TORCHRUN.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def test_progress_and_result_of_the_first_process_are_the_workers_own(processes: Path) -> None:
    seen: list[tuple[float, float]] = []
    says = [{"progress": [1, 5]}, {"progress": [5, 5]}, {"result": {"samples": 3}}]
    assert torchrun.quantize({"processes": 2, "says": says}, lambda *done: seen.append(done)) == {
        "samples": 3
    }
    assert seen == [(1, 5), (5, 5)]


def test_an_error_of_one_process_ends_all(processes: Path) -> None:
    error = {
        "kinds": ["DependencyError", "QuantoolError"],
        "message": "CUDA ran out of memory",
        "hint": "lower it",
    }
    started = time.monotonic()
    with pytest.raises(DependencyError, match="ran out of memory") as caught:
        torchrun.quantize({"processes": 2, "says": [{"error": error}], "stays": True}, lambda *_: None)
    assert caught.value.hint == "lower it"
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("code", [0, 1])
def test_processes_that_end_without_a_result_are_an_error(code: int, processes: Path) -> None:
    with pytest.raises(QuantizationError, match=f"exit code {code} without a result"):
        torchrun.quantize({"processes": 2, "says": [], "exit": code}, lambda *_: None)


def test_torchrun_that_does_not_start_is_an_error(processes: Path) -> None:
    processes.write_text(f"#!{sys.base_prefix}/bin/python3\nraise SystemExit(3)\n")
    with pytest.raises(QuantizationError, match="exit code 3 without a result"):
        torchrun.quantize({"processes": 2, "says": []}, lambda *_: None)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_sample_has_one_process_and_tokens_are_shared_out(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [[number] * (7 * number % 97 + 1) for number in range(40)]
    monkeypatch.setattr(ranks, "ranks", lambda: count)
    shares = []
    for number in range(count):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        shares.append(ranks.share(samples))
    assert sorted(sample[0] for share in shares for sample in share) == list(range(40))
    tokens = [sum(map(len, share)) for share in shares]
    assert max(tokens) / min(tokens) < 1.05
    with pytest.raises(ConfigError, match=f"{count - 1} samples, too few for {count} GPUs"):
        ranks.share(samples[: count - 1])


def test_alone_samples_stay_in_order() -> None:
    samples = [[1], [2, 2, 2], [3, 3]]
    assert ranks.share(samples) == samples
    assert ranks.gathered("mine") == ["mine"]


@pytest.mark.parametrize(
    ("device", "here", "sample_size", "shared", "count"),
    [
        ("cuda", 4, 128, 64 * GIB, 4),
        ("cuda:1,2", 4, 128, 64 * GIB, 2),
        ("cuda:1", 4, 128, 64 * GIB, 1),
        ("cpu", 4, 128, 64 * GIB, 1),
        ("auto", 1, 128, 64 * GIB, 1),
        ("cuda", 4, 3, 64 * GIB, 3),
        ("cuda", 4, 128, 40 * GIB, 1),  # 40 of weights, and something beside them
    ],
)
def test_a_process_for_each_gpu_where_memory_holds_the_weights(
    device: str,
    here: int,
    sample_size: int,
    shared: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpus, "capabilities", lambda: [(9, 0)] * here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=shared))
    config = Config(model_id="m", method="awq", device=device, sample_size=sample_size)
    source: Any = SimpleNamespace(files=[SimpleNamespace(name="model.safetensors", bytes=40 * GIB)])
    assert make._processes(config, source, Progress(quiet=True), fused=False) == count
    warned = "calibration uses one of 4 GPUs" in capsys.readouterr().err
    assert warned == (shared == 40 * GIB)
    assert make._processes(config, source, Progress(quiet=True), fused=True) == 1
    warned = "GPUs: the experts of this checkpoint are fused" in capsys.readouterr().err
    assert warned == (min(len(gpus.devices(device).each()), sample_size) > 1)


@pytest.mark.e2e
def test_two_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    for count in (1, 2):
        config = Config(
            model_id=str(making.TINY),
            method="awq",
            quant_level="W4A16",
            quantization_config={"n_grid": 2, "duo_scaling": False},
            dataset_path=making.TINY.parent / "text" / "calibration.txt",
            sample_size=4,
            calibration_config={"max_seq_length": 32},
            output_path=tmp_path / str(count),
            device="cpu",
        )
        if count > 1:
            place = str(Path(__file__).parent / "cpu_ranks")
            monkeypatch.syspath_prepend(place)  # for torchrun's processes: here it was imported long ago
            monkeypatch.setattr(make, "_processes", lambda *_, fused, count=count: count)
        (artifact,) = pipeline.make(config, Progress(quiet=True))
        assert artifact.details["processes"] == count
        assert artifact.details["tokens"] == 4 * 32
        hashes.append([(file.name, file.sha256) for file in artifact.files])
    assert hashes[0] == hashes[1]
