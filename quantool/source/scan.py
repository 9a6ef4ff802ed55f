"""One full read of a checkpoint's weights: the hash of every file and the range of every tensor."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.formats.safetensors import BITS, TensorHeader, check_index, some
from quantool.records import Source, fingerprint
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace

if TYPE_CHECKING:
    import numpy as np

BUFFER = 1 << 24
"""Bytes of one read."""
THREADS = 4

INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
"""Bit pattern of +Inf: a larger one without its sign bit is a NaN, a smaller one finite and ordered by value."""


@dataclass
class _Values:
    """What one file's scan found. ``peak`` is the largest finite magnitude, ``broken`` name, NaN and Inf counts."""

    sha256: str = ""
    peak: float = -1.0
    peak_tensor: str | None = None
    broken: list[tuple[str, int, int]] = field(default_factory=list)


class _Meter:
    """Bytes read by all threads, reported about once a buffer; ``stop`` ends them early."""

    def __init__(self, total: int, report: Callable[[float, float], None]) -> None:
        self.stop = threading.Event()
        self._total, self._report = total, report
        self._lock, self._done, self._told = threading.Lock(), 0, 0

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._done - self._told >= BUFFER or self._done == self._total:
                self._told = self._done
                self._report(self._done, self._total)


def scan_source(source: Source, workspace: Workspace, progress: Progress) -> Source:
    """Hash every weight file and look at every weight once; the source with hashes and largest magnitude.

    Raises SourceError when weights are NaN or infinite.
    """

    def produce() -> tuple[list[Path], dict[str, Any]]:
        with progress.bar("scan weights", "B") as bar:
            found = process.call(
                scan_worker,
                {"folder": str(source.folder)},
                log=workspace.logs / "scan.log",
                bar=bar,
                failure=SourceError,
            )
        require_finite(found)
        return [], found

    return _with_scan(source, workspace.stage("scan", fingerprint(source.identity()), produce))


def recall_scan(source: Source, workspace: Workspace) -> Source:
    """The source with what an earlier scan of the same files found, if there was one."""
    is_here = all((source.folder / file.name).exists() for file in source.files)
    found = workspace.recall("scan", fingerprint(source.identity())) if is_here else None
    return source if found is None else _with_scan(source, found)


def forget_scan(workspace: Workspace) -> None:
    """Let the weights be read again, whatever their size and time say."""
    workspace.forget("scan")


def _with_scan(source: Source, found: dict[str, Any]) -> Source:
    hashes = {name: entry["sha256"] for name, entry in found["files"].items()}
    files = tuple(
        file if file.sha256 else file.model_copy(update={"sha256": hashes[file.name]})
        for file in source.files
    )
    return source.model_copy(update={"files": files, "max_abs": found["max_abs"]})


def scan_worker(request: Mapping[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker: ``scan`` of the checkpoint in ``request["folder"]``, whose headers it checks first."""
    folder = Path(request["folder"])
    return scan(folder, check_index(folder), report)


def scan(
    folder: Path, headers: Mapping[str, TensorHeader], report: Callable[[float, float], None]
) -> dict[str, Any]:
    """Read every weight file of ``folder`` once, in order, and return what it holds, as JSON values.

    ``files`` (name → ``bytes``, ``sha256``), ``max_abs`` (largest finite magnitude of all F16, BF16, F32 and F64
    tensors, None without any) and ``max_abs_tensor`` that has it, ``not_finite`` (list of ``name``, ``nan``,
    ``inf`` counts), ``not_scanned`` (name → dtype of the tensors whose values are not looked at: integers, 8-bit
    floats), ``bytes`` and ``seconds``.

    Memory is one buffer of 16 MiB a thread whatever the size of the files; up to four files are read side by side.
    ``report`` gets bytes done and bytes in all. Raises SourceError when a file changes under the scan.
    """
    started = time.monotonic()
    shards: dict[str, list[TensorHeader]] = {}
    for tensor in headers.values():
        shards.setdefault(tensor.file, []).append(tensor)
    sizes = {name: (folder / name).stat().st_size for name in shards}
    meter = _Meter(sum(sizes.values()), report)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, THREADS)) as pool:
        tasks = {name: pool.submit(_scan_file, folder / name, shards[name], meter) for name in sorted(shards)}
        try:
            wait(tasks.values(), return_when=FIRST_EXCEPTION)
        finally:
            meter.stop.set()  # nothing left to do, or one has failed
    values = {name: task.result() for name, task in tasks.items()}
    peak = max(values.values(), key=lambda found: found.peak, default=_Values())
    return {
        "files": {name: {"bytes": sizes[name], "sha256": found.sha256} for name, found in values.items()},
        "max_abs": peak.peak if peak.peak_tensor is not None else None,
        "max_abs_tensor": peak.peak_tensor,
        "not_finite": [
            {"name": name, "nan": nan, "inf": inf}
            for found in values.values()
            for name, nan, inf in found.broken
        ],
        "not_scanned": {t.name: t.dtype for t in headers.values() if t.dtype not in INFINITY},
        "bytes": sum(sizes.values()),
        "seconds": time.monotonic() - started,
    }


def require_finite(scanned: Mapping[str, Any]) -> None:
    """Raise SourceError naming the tensors in which ``scan`` found NaN or Inf."""
    broken = scanned["not_finite"]
    if broken:
        named = [f"{entry['name']} ({entry['nan']} NaN, {entry['inf']} Inf)" for entry in broken]
        raise SourceError(
            f"{len(broken)} tensors hold values that are no numbers: {some(named)}",
            hint="the checkpoint is damaged or its training diverged; quantizing it makes no sense",
        )


def _scan_file(path: Path, tensors: Sequence[TensorHeader], meter: _Meter) -> _Values:
    """Hash a file and look at its values, tensor by tensor, so that every read starts at an element."""
    found, digest, buffer = _Values(), hashlib.sha256(), memoryview(bytearray(BUFFER))
    with path.open("rb", buffering=0) as file:
        position = 0
        for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
            tally = _Tally(tensor.dtype)
            while position < tensor.end and not meter.stop.is_set():
                inside = position >= tensor.start
                wanted = min((tensor.end if inside else tensor.start) - position, BUFFER)
                block = buffer[:wanted]
                _fill(file.readinto, block, path)
                digest.update(block)
                if inside:
                    tally.add(block)
                position += wanted
                meter.add(wanted)
            tally.close(tensor.name, found)
        if file.read(1):
            raise SourceError(f"{path} grew while it was read")
    found.sha256 = digest.hexdigest()
    return found


def _fill(readinto: Callable[[memoryview], int | None], block: memoryview, path: Path) -> None:
    done = 0
    while done < len(block):
        count = readinto(block[done:])
        if not count:
            raise SourceError(f"{path} shrank while it was read")
        done += count


class _Tally:
    """Counts of one tensor. Magnitudes of IEEE floats are ordered like their bit patterns without the sign."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.infinity = INFINITY.get(dtype)
        self.width = BITS[dtype] // 8
        self.peak, self.nan, self.inf = -1, 0, 0

    def add(self, block: memoryview) -> None:
        """Look at whole elements."""
        if self.infinity is None:
            return
        import numpy as np

        bits = np.frombuffer(block, f"<u{self.width}")
        sign = 1 << (8 * self.width - 1)
        # Two reductions and no copy: the largest pattern is the most negative value, the largest signed one the
        # most positive.
        unsigned, signed = int(bits.max()), int(bits.view(f"<i{self.width}").max())
        top = max(signed, unsigned & (sign - 1) if unsigned & sign else 0)
        if top >= self.infinity:
            top = self._count(bits & bits.dtype.type(sign - 1))
        self.peak = max(self.peak, top)

    def _count(self, magnitudes: np.ndarray[Any, Any]) -> int:
        self.nan += int((magnitudes > self.infinity).sum())
        self.inf += int((magnitudes == self.infinity).sum())
        return int(magnitudes[magnitudes < self.infinity].max(initial=0))

    def close(self, name: str, found: _Values) -> None:
        """Enter the counts into those of the file."""
        if self.nan or self.inf:
            found.broken.append((name, self.nan, self.inf))
        if self.peak >= 0 and (peak := self._value()) > found.peak:
            found.peak, found.peak_tensor = peak, name

    def _value(self) -> float:
        import numpy as np

        if self.dtype == "BF16":
            return float(np.uint32(self.peak << 16).view(np.float32))
        return float(np.array(self.peak, f"<u{self.width}").view(f"<f{self.width}"))
