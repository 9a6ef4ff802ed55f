"""Child processes: everything that computes runs in one.

llama.cpp aborts the whole process on a failed assertion and ignores Ctrl-C inside a callback; torch keeps gigabytes
once it was imported. So the long work is done by *workers*: functions ``work(request, report)``, run
by ``python -m quantool.runtime.worker`` with the request as JSON. What a worker and its libraries print goes to a log
file; results, progress and errors come back on a pipe of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from quantool.errors import BY_NAME, DependencyError, QuantizationError, QuantoolError
from quantool.runtime.progress import Bar
from quantool.runtime.worker import Work

LOG_LINES_SHOWN = 12

# Spinning OpenMP threads cost two to six times the time as soon as another process wants the cores.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GGML_NO_BACKTRACE": "1",
    "PYTHONUNBUFFERED": "1",
}


def environment() -> dict[str, str]:
    """The environment of a child process: ours, with the settings that computing needs unless the user set them."""
    return {**ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def name_of(work: Work) -> str:
    """``module:function``, by which a new process finds it."""
    return f"{work.__module__}:{work.__qualname__}"


def call(
    work: Work,
    request: Mapping[str, Any],
    *,
    log: Path,
    bar: Bar | None = None,
    failure: type[QuantoolError] = QuantizationError,
) -> dict[str, Any]:
    """Run ``work``, a function of a module that a new process can import, on ``request`` and return its result.

    ``log`` receives all that the child prints (appended). ``bar`` is moved by the worker's reports. Raises the
    ``QuantoolError`` that the worker raised (``failure`` if of no kind in ``errors``), or ``failure`` with the log's
    last lines when the child died. On any interruption the child is killed at once, and no process that it started
    outlives it.
    """
    target = name_of(work)
    log.parent.mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()
    with log.open("ab") as sink, contextlib.ExitStack() as stack:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "quantool.runtime.worker", target, str(write_end), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                pass_fds=(write_end,),
                env=environment(),
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        stack.callback(_kill, child)
        events = stack.enter_context(os.fdopen(read_end, encoding="utf-8"))
        _send(child.stdin, request)
        result = _listen(events, bar, failure)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # unreaped: its group keeps its number
    if result is None and child.returncode == -signal.SIGBUS:
        free = shutil.disk_usage(log.parent).free
        raise DependencyError(
            f"{target} ended by SIGBUS: the disk is full, or a file that it had mapped was cut off ({free:,} bytes "
            f"are free in {log.parent.absolute()})",
            hint="free some, or set output_path to another disk; finished stages are kept",
        )
    if result is None:
        raise failure(
            f"{target} ended {_describe(child.returncode)} without a result",
            hint=f"last lines of {log}:\n{tail(log)}",
        )
    return result


def _send(stdin: IO[bytes] | None, request: Mapping[str, Any]) -> None:
    if stdin is None:  # Popen was given PIPE
        raise AssertionError
    with contextlib.suppress(BrokenPipeError):  # a child that died at once: its exit is reported below
        stdin.write(json.dumps(request).encode())
        stdin.close()


def _listen(events: Iterator[str], bar: Bar | None, failure: type[QuantoolError]) -> dict[str, Any] | None:
    """Follow the worker's events until its pipe closes; return its result, raise its error."""
    for line in events:
        if not line.endswith("\n"):  # it died in the middle of a word
            return None
        event = json.loads(line)
        if "progress" in event:
            if bar is not None:
                bar.move(*event["progress"])
        elif "error" in event:
            failed = event["error"]
            kind = next((BY_NAME[name] for name in failed["kinds"] if name in BY_NAME), failure)
            raise kind(failed["message"], hint=failed["hint"])
        else:
            result: dict[str, Any] = event["result"]
            return result
    return None


def _describe(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name
    advice = {"SIGKILL": " (out of memory?)", "SIGABRT": " (an assertion of llama.cpp)"}
    return f"by {name}{advice.get(name, '')}"


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child, which nobody has reaped yet, with all that it started; reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def tail(log: Path, lines: int = LOG_LINES_SHOWN) -> str:
    """The last ``lines`` lines of a log file."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in text[-lines:])
