"""The child's side of ``quantool.runtime.process``: ``python -m quantool.runtime.worker module:function EVENTS_FD PARENT_PID``."""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

from quantool.errors import DependencyError, QuantoolError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NUMPY_WROTE_LESS = re.compile(r"^\d+ requested and \d+ written$")  # numpy/_core/src/multiarray/convert.c

Report = Callable[[float, float], None]
"""``report(done, total)``: how far the work is, in the unit of the caller's bar."""

Work = Callable[[dict[str, Any], Report], dict[str, Any]]
"""What a child process does: a request and a way to tell how far it is, to a result; both are JSON values."""


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies (``kill -9`` included)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def main() -> None:
    """Read the request from standard input, work, and answer on the events pipe."""
    target, descriptor, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent)
    request: dict[str, Any] = json.load(sys.stdin)
    module, _, function = target.partition(":")
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as events:

        def send(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")

        def report(done: float, total: float) -> None:
            send({"progress": [done, total]})

        try:
            send({"result": getattr(importlib.import_module(module), function)(request, report)})
        except QuantoolError as error:
            _send_error(send, error)
        except OSError as error:
            place = (
                error.filename or request.get("output") or request.get("target") or target
            )  # a full disk names none
            _send_error(send, DependencyError(f"{reason(error)}: {place}"))
        except ModuleNotFoundError as error:
            _send_error(send, DependencyError(f"{target} needs {error.name}, which is not installed"))


def reason(error: OSError) -> str:
    """Why it could not read or write; NumPy says of a full disk how many bytes it asked for, and no reason."""
    if error.strerror is None and NUMPY_WROTE_LESS.search(str(error)):
        return f"{os.strerror(errno.ENOSPC)} ({error})"
    return error.strerror or str(error)


def _send_error(send: Callable[[dict[str, Any]], None], error: QuantoolError) -> None:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    send({"error": {"kinds": kinds, "message": error.message, "hint": error.hint}})


if __name__ == "__main__":
    main()
