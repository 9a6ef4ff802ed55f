"""Quantization with calibration text on all GPUs of a host: ``calibrate.quantize`` in processes that torchrun starts.

``python -m torch.distributed.run … -m quantool.methods._compressed.torchrun EVENTS REQUEST`` is one of them: it sends what a
worker sends to the named pipe EVENTS and reads its request from the file REQUEST.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import QuantizationError
from quantool.methods._compressed import calibrate
from quantool.runtime import machine, process, worker
from quantool.runtime.worker import Report

SPARE = 8 << 30
"""Beside the weights, what shared memory must hold: what quantizing adds, and what NCCL takes."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where torch puts tensors that processes share


def quantize(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker that lets ``processes`` of them quantize together; request and result otherwise as ``calibrate.quantize``'s.

    Raises what the first of them raised that failed; the others are ended then.
    """
    count = request["processes"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "request.json")
        place.write_text(json.dumps(request), encoding="utf-8")
        events = Path(folder, "events")
        os.mkfifo(events)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={count}", "-m", "quantool.methods._compressed.torchrun"]
        threads = {"OMP_NUM_THREADS": str(max(1, machine.cores() // count))}  # torchrun's own default is one
        reading = os.fdopen(os.open(events, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8")
        held = os.open(events, os.O_WRONLY)
        os.set_blocking(reading.fileno(), True)
        with (
            reading,
            subprocess.Popen([*command, str(events), str(place)], env=os.environ | threads) as running,
        ):
            threading.Thread(target=_close_behind, args=(running, held), daemon=True).start()
            try:
                result = process.follow(reading, _Forwarded(report), QuantizationError)
            finally:
                if sys.exc_info()[0] is not None:
                    running.kill()
    if result is None:
        raise QuantizationError(f"torchrun ended with exit code {running.returncode} without a result")
    return result


def _close_behind(running: subprocess.Popen[bytes], held: int) -> None:
    """Give the pipe an end when torchrun has ended, even if none of its processes ever opened it."""
    running.wait()
    os.close(held)


@dataclass(frozen=True)
class _Forwarded:
    """A bar that passes on what it is told."""

    report: Report

    def move(self, done: float, total: float) -> None:
        """See ``Bar``."""
        self.report(done, total)


def share(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """What one of the processes does; all but the first end here."""
    first = os.environ["RANK"] == "0"
    result = calibrate.quantize(request, report if first else lambda *_: None)
    if not first:
        sys.stdout.flush()
        os._exit(0)
    return result


def main() -> None:
    """Work as one of the processes."""
    worker.die_with_parent(os.getppid())
    events, request = sys.argv[1:]
    with Path(request).open(encoding="utf-8") as asked:
        worker.work(
            worker.name_of(share).replace("__main__", __spec__.name),
            os.open(events, os.O_WRONLY),
            json.load(asked),
        )


if __name__ == "__main__":
    main()
