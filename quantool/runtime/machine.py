"""What this machine is and how fast: its memory, a short probe, and the seconds that earlier runs took on it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from quantool.errors import DependencyError
from quantool.records import fingerprint
from quantool.runtime.toolchain import cache_folder
from quantool.runtime.workspace import write_text

EDITION = 1
"""Of the estimates that measured seconds are compared with: another one makes what was measured before worthless."""
PROBE_WIDTH, PROBE_PRODUCTS = 64, 512
PROBE_BYTES = 1 << 24
PROBES = 3
KEPT = 8
"""Runs that are remembered of each kind of work, the latest ones."""
GPU_OPERATIONS = 5e13
"""Of a GPU, which a plan does not probe (loading CUDA takes seconds): what recent ones reach in 16 bits."""


@dataclass(frozen=True)
class Speed:
    """Of all cores together."""

    operations: float
    """Multiplications and additions a second of float32 matrix products."""
    hashing: float
    """Bytes a second of SHA-256, of one core."""
    gpus: int | None = None
    """GPUs that there are; None: those of this machine."""


@dataclass(frozen=True)
class Taken:
    """What a piece of work was estimated to take before anything was measured, and what it took, in seconds."""

    estimate: float
    seconds: float


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def gpus() -> int:
    """NVIDIA GPUs of this machine; told by their device files."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def total_ram() -> int:
    """Bytes of memory that this machine has, or its control group may use where that is less."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    with suppress(OSError):
        if (most := limit.read_text(encoding="ascii").strip()).isdigit():
            room = min(room, int(most))
    return room


def free_ram() -> int:
    """Bytes that can be had of this machine's memory, or of the control group's where that is less."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        room = int(lines["MemAvailable"].split()[0]) << 10
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (most := limit.read_text(encoding="ascii").strip()).isdigit():
        used = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        room = min(room, int(most) - int(used["anon"]))
    return max(room, 0)


def speed() -> Speed:
    """How fast this machine is: measured in a quarter of a second when it is asked first, then kept in the user cache."""
    path = _folder() / "speed.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Speed(saved["operations"], saved["hashing"])
    found = _probe()
    with suppress(OSError, DependencyError):  # a cache that cannot be written: probed again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(found)))
    return found


def _probe() -> Speed:
    """In seconds of the processor, which other processes that share it do not lengthen."""
    import numpy as np

    matrices = np.ones((PROBE_PRODUCTS, PROBE_WIDTH, PROBE_WIDTH), np.float32)  # small: each on one core
    block = bytes(PROBE_BYTES)
    products = min(_seconds(lambda: matrices @ matrices) for _ in range(PROBES))
    hashed = min(_seconds(lambda: hashlib.sha256(block).digest()) for _ in range(PROBES))
    return Speed(cores() * PROBE_PRODUCTS * 2 * PROBE_WIDTH**3 / products, PROBE_BYTES / hashed)


def _seconds(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return max(time.thread_time() - started, 1e-6)


def _folder() -> Path:
    """Where the user cache keeps what was measured on this machine: a home may be shared by several."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line for line in lines if line.startswith("model name")), "")
        return _folder_of(model)
    return _folder_of(platform.processor())


def _folder_of(model: str) -> Path:
    return cache_folder() / "machines" / fingerprint(EDITION, platform.machine(), model, cores(), gpus())[:16]


def expected(kind: str, estimate: float, measured: Mapping[str, Sequence[Taken]]) -> float:
    """Seconds of work that is estimated at ``estimate``, corrected by what work of that kind took of about that size.

    Of a size ten times another's half of the correction holds (in powers), a hundred times a third: small work tells
    what starting costs, large work what computing does.
    """
    known = [taken for taken in measured.get(kind, ()) if taken.estimate > 0 and taken.seconds > 0]
    if not known or estimate <= 0:
        return estimate
    latest = min(reversed(known), key=lambda taken: abs(math.log(taken.estimate / estimate)))
    distance = abs(math.log10(latest.estimate / estimate))
    ratio: float = (latest.seconds / latest.estimate) ** (1 / (1 + distance))
    return estimate * ratio


def measured() -> dict[str, list[Taken]]:
    """What work of each kind took on this machine, the latest last."""
    try:
        saved = json.loads((_folder() / "taken.json").read_text(encoding="utf-8"))
        return {kind: [Taken(float(e), float(s)) for e, s in pairs] for kind, pairs in saved.items()}
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # none yet, or damaged: it is an estimate only
        return {}


def remember(work: Iterable[tuple[str, Taken]]) -> None:
    """Keep what pieces of work, each of its kind, took; runs with other output folders may do so at the same time."""
    folder = _folder()
    with suppress(OSError, DependencyError):  # a cache that cannot be written
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = measured()
            for kind, taken in work:
                known[kind] = [*known.get(kind, []), taken][-KEPT:]
            pairs = {
                kind: [[taken.estimate, taken.seconds] for taken in entries]
                for kind, entries in known.items()
            }
            write_text(folder / "taken.json", json.dumps(pairs))
