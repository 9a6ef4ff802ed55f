"""What disk, memory and arithmetic of a machine allow each worker of a run, beside what it took; see ``hopper.py``."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROBE = 2 << 30
PIECE = 16 << 20
GPU_BYTES, GPU_OPERATIONS = 4.3e12, 7.9e14
"""Of an H200, bytes a second read and written together and operations a second in bf16: measured there with torch."""


@dataclass(frozen=True)
class Speeds:
    """Bytes a second."""

    write: float
    """Of one process to the disk, synced."""
    read: float
    """Of one process from files that memory holds."""


def measure(model: Path, output: Path) -> Speeds:
    """Write a file beside the results, read a shard of the model twice, and say how fast that was."""
    place, piece = output / "probe", bytes(PIECE)
    with place.open("wb", buffering=0) as file:
        started = time.monotonic()
        for _ in range(PROBE // PIECE):
            file.write(piece)
        os.fsync(file.fileno())
        write = PROBE / (time.monotonic() - started)
    place.unlink()
    shard = min(model.glob("*.safetensors"))
    for _ in range(2):
        started, held = time.monotonic(), bytearray(PIECE)
        with shard.open("rb", buffering=0) as file:
            while file.readinto(held):
                pass
        read = shard.stat().st_size / (time.monotonic() - started)
    print(
        f"disk: {write / 1e9:.2f} GB/s written and synced; {read / 1e9:.2f} GB/s read from memory", flush=True
    )
    return Speeds(write, read)


def show(calls: Path, model: Path, output: Path, speeds: Speeds) -> None:
    """Print the workers that took a second or more, when they began, what they took, and what their bytes alone take."""
    weights = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
    made = _made(output)

    def least(work: str, log: str) -> float | None:
        """Seconds: files are read from memory and written to the disk at once, a GPU reads weights once a layer."""
        module = work.partition(":")[0].removeprefix("quantool.")
        written = made.get(log.replace("quantize-", "gguf-"), math.nan) / speeds.write
        table: dict[str, Callable[[], float]] = {
            "methods._llama_cpp.convert": lambda: max(weights / speeds.write, weights / speeds.read),
            "methods._llama_cpp.quantize": lambda: written,
            "methods._compressed.stream": lambda: max(weights / speeds.read, written),
            "methods._compressed.calibrate": lambda: weights / speeds.read + written,
            "methods._compressed.torchrun": lambda: weights / speeds.read + written,
            "methods._llama_cpp.importance.imatrix_collect": lambda: weights / speeds.read,
            "validation._engines.reference": lambda: weights / speeds.read,
            "validation._chat.answers": lambda: weights / speeds.read + 48 * weights / GPU_BYTES,
        }
        return table[module]() if module in table and not work.endswith(":tokenize") else None

    for line in calls.read_text().splitlines():
        entry = json.loads(line)
        took = entry["end"] - entry["begin"]
        if took >= 1:
            bound = least(entry["work"], entry["log"])
            name = entry["work"].removeprefix("quantool.")
            limit = "" if bound is None else f"{bound:7.1f}"
            print(
                f"{entry['begin']:7.1f} {took:7.1f} {limit:>7}  {name}  {entry['log']}{_pace(entry['marks'])}"
            )


def _pace(marks: list[tuple[float, float]]) -> str:
    """When a worker first moved, the time of its middle half extrapolated to the whole, and what came behind the last move."""
    inner = [mark for mark in marks if 0.25 <= mark[1] <= 0.75]
    if len(inner) < 2 or inner[0][1] == inner[-1][1]:
        return ""
    whole = (inner[-1][0] - inner[0][0]) / (inner[-1][1] - inner[0][1])
    return f"; first move {marks[0][0]:.1f} s, last {marks[-1][0]:.1f} s, at the pace between {whole:.1f} s"


def _made(output: Path) -> dict[str, int]:
    """Bytes of each output's files by its id as logs are named after it: ``awq-W4A16``."""
    ending = ".artifact.json"
    return {
        path.name.removesuffix(ending): sum(file["bytes"] for file in json.loads(path.read_bytes())["files"])
        for path in output.glob(f"records/*{ending}")
    }
