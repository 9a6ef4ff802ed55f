"""Child processes: everything that computes runs in one.

llama.cpp aborts the whole process on a failed assertion and ignores Ctrl-C inside a callback; torch keeps gigabytes
once it was imported. So the long work is done by *workers*: functions ``work(request, report)``, each run in a process of
its own with the request as JSON. What a worker and its libraries print goes to a log file; results, progress and errors
come back on a pipe of their own. Workers are forked from a server that has imported what they declare
(``worker.preloaded``), so that seconds of imports are paid once a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from quantool.errors import BY_NAME, DependencyError, QuantizationError, QuantoolError
from quantool.runtime import builds, children, gpus
from quantool.runtime.progress import Bar
from quantool.runtime.worker import Work, name_of, preload_of

__all__ = ["ENVIRONMENT", "call", "environment", "follow", "name_of", "tail"]

LOG_LINES_SHOWN = 12
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)

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


def call(
    work: Work,
    request: Mapping[str, Any],
    *,
    log: Path,
    bar: Bar | None = None,
    failure: type[QuantoolError] = QuantizationError,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run ``work``, a function of a module that a new process can import, on ``request`` and return its result.

    ``log`` receives all that the child prints (appended). ``bar`` is moved by the worker's reports, ``variables`` are added to its environment.
    Raises the
    ``QuantoolError`` that the worker raised (``failure`` if of no kind in ``errors``), or ``failure`` with the log's
    last lines when the child died. On any interruption the child is killed at once, and no process that it started
    outlives it.
    """
    target = name_of(work)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        forked = preload_of(work) != "nothing" and children.can_fork()
        result, code = _attempt(work, request, sink, bar, failure, variables, forked=forked)
        if (
            code is None
        ):  # the fork server died while it imported; a new interpreter says why, or does without
            result, code = _attempt(work, request, sink, bar, failure, variables, forked=False)
    if result is None and code == -signal.SIGBUS:
        free = shutil.disk_usage(log.parent).free
        raise DependencyError(
            f"{target} ended by SIGBUS: the disk is full, or a file that it had mapped was cut off ({free:,} bytes "
            f"are free in {log.parent.absolute()})",
            hint="free some, or set output_path to another disk; finished stages are kept",
        )
    if result is None:
        last = tail(log)
        if code == -signal.SIGABRT and gpus.FAULT.search(last):
            raise gpus.failed(next(line for line in last.splitlines() if gpus.FAULT.search(line)).strip())
        reason = builds.crash_of_own_cxx() if code in CRASHES else None
        if reason is not None and "llama" in last + target:
            raise DependencyError(f"{target} ended {_describe(code or 0)}: {reason}", hint=f"log: {log}")
        raise failure(
            f"{target} ended {_describe(code or 0)} without a result",
            hint=f"last lines of {log}:\n{last}",
        )
    return result


def _attempt(
    work: Work,
    request: Mapping[str, Any],
    sink: IO[bytes],
    bar: Bar | None,
    failure: type[QuantoolError],
    variables: Mapping[str, str],
    *,
    forked: bool,
) -> tuple[dict[str, Any] | None, int | None]:
    """The worker's result, if it gave one, and how its process ended (None: it never began)."""
    read_end, write_end = os.pipe()
    with contextlib.ExitStack() as stack:
        events = stack.enter_context(os.fdopen(read_end, encoding="utf-8"))
        try:
            libraries = preload_of(work) if forked else "nothing"
            child = children.start(name_of(work), sink, write_end, {**environment(), **variables}, libraries)
        finally:
            os.close(write_end)
        stack.callback(child.kill)
        stack.callback(_close, child.stdin)
        _send(child.stdin, request)
        return follow(events, bar, failure), child.wait()


def _send(stdin: IO[bytes], request: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError), stdin:  # a child that died at once: its exit is reported below
        stdin.write(json.dumps(request).encode())


def _close(stdin: IO[bytes]) -> None:
    """Close the pipe of a child whose request was interrupted."""
    with contextlib.suppress(BrokenPipeError):
        stdin.close()


def follow(events: Iterator[str], bar: Bar | None, failure: type[QuantoolError]) -> dict[str, Any] | None:
    """Follow a worker's events until its pipe closes; return its result, raise its error."""
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


def tail(log: Path, lines: int = LOG_LINES_SHOWN) -> str:
    """The last ``lines`` lines of a log file."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in text[-lines:])
