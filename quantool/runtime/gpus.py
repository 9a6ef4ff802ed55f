"""The GPUs that ``device`` of a configuration means, and the environment in which a process sees no others."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from quantool.errors import DependencyError

PATTERN = r"auto|cpu|cuda(:\d+(,\d+)*)?"
"""What ``device`` may be: ``auto``, ``cpu``, ``cuda`` (every GPU that is to be seen), ``cuda:0,1`` (these of them)."""
NAMES = "'auto', 'cpu', 'cuda' or, for the first two GPUs, 'cuda:0,1'"
VISIBLE = "CUDA_VISIBLE_DEVICES"
NO_GPU = {VISIBLE: ""}
"""The environment of a process that is to see none."""
ASSUMED = (9, 0)
"""Compute capability of nodes that cannot be asked: Hopper's."""
MAJOR, MINOR = 75, 76  # cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
FAULT = re.compile(
    r"CUDA error|CUDA out of memory|CUDA driver error|cublas\w* (?:error|failed)", re.IGNORECASE
)
"""What torch and llama.cpp say when it is the GPU that failed, not what ran on it."""
NO_ROOM = re.compile(r"cudaMalloc failed|failed to allocate CUDA\d* buffer|unable to allocate CUDA\d* buffer")
"""What llama.cpp says when its memory is full."""


@dataclass(frozen=True)
class Devices:
    """Where a run computes."""

    kind: str
    """``auto``, ``cpu`` or ``cuda``: what a worker is told, which sees no other GPUs than those of the run."""
    numbers: tuple[int, ...] = ()
    """The GPUs that are named; empty: every one that is to be seen."""

    def variables(self) -> dict[str, str]:
        """The environment of a process that may use all of them. DependencyError for a GPU that is not there."""
        if self.kind == "cpu":
            return dict(NO_GPU)
        if not self.numbers:
            return {}
        seen = visible()
        if absent := [number for number in self.numbers if number >= len(seen)]:
            raise DependencyError(
                f"device: there is no GPU {absent[0]} here (found: {len(seen)})",
                hint="GPUs are counted from 0, among those that CUDA_VISIBLE_DEVICES leaves",
            )
        return {VISIBLE: ",".join(seen[number] for number in self.numbers)}

    def each(self) -> list[dict[str, str]]:
        """For work in shares: the environment of one process for each GPU, or of one process where there are none."""
        if self.kind == "cpu":
            return [dict(NO_GPU)]
        seen = self.variables().get(VISIBLE, "").split(",") if self.numbers else visible()
        return [{VISIBLE: name} for name in seen] if len(seen) > 1 else [self.variables()]


def devices(wanted: str | None) -> Devices:
    """What ``device`` of a configuration means."""
    kind, _, named = (wanted or "auto").partition(":")
    return Devices(kind, tuple(dict.fromkeys(int(number) for number in named.split(",") if number)))


def visible() -> list[str]:
    """The GPUs that a process of ours sees, as CUDA_VISIBLE_DEVICES names them."""
    count = len(capabilities())
    given = os.environ.get(VISIBLE)
    names = [name.strip() for name in given.split(",")] if given else [str(number) for number in range(count)]
    return names[:count]


_elsewhere: ContextVar[int | None] = ContextVar("_elsewhere", default=None)
"""GPUs of the machine that is planned for, where that is another one."""


@contextmanager
def of_nodes(count: int) -> Iterator[None]:
    """Plan for a node with ``count`` GPUs: within the block ``capabilities`` answers for it."""
    token = _elsewhere.set(count)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def capabilities() -> list[tuple[int, int]]:
    """Compute capability of each GPU, asked of the driver: importing torch takes seconds. Empty without driver or GPU."""
    if (count := _elsewhere.get()) is not None:
        return [ASSUMED] * count
    found = []
    for driver, device in _each():
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
        found.append((major.value, minor.value))
    return found


def memory() -> list[int]:
    """Bytes of memory that each GPU has, used or not."""
    found = []
    for driver, device in _each():
        size = ctypes.c_size_t()
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        found.append(size.value)
    return found


def _each() -> Iterator[tuple[ctypes.CDLL, int]]:
    """CUDA's driver with the number of each GPU that this process sees."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return
    for number in range(count.value):
        yield driver, number


def fault(error: BaseException) -> DependencyError | None:
    """What to tell of an error of torch when the GPU is to blame for it: full, or gone; None for any other."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return None
    said = str(error).partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return full(said)
    return failed(said) if FAULT.search(said) else None


def full(said: str) -> DependencyError:
    """The GPU has too little memory."""
    return DependencyError(
        f"the GPU's memory is full: {said}",
        hint="free it of other work, set a smaller validation.context, or device: cpu; what was finished is kept, and a "
        "rerun goes on from there",
    )


def failed(said: str) -> DependencyError:
    """The GPU does not answer any more."""
    return DependencyError(
        f"the GPU failed: {said}",
        hint="see nvidia-smi and the system's log; what was finished is kept, and a rerun goes on from there",
    )
