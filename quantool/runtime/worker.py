"""The child's side of ``quantool.runtime.process``: ``python -m quantool.runtime.worker module:function EVENTS_FD PARENT_PID``."""

from __future__ import annotations

import atexit
import ctypes
import errno
import importlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal, NoReturn, TypeVar

from quantool.errors import DependencyError, QuantoolError
from quantool.runtime import gpus

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NUMPY_WROTE_LESS = re.compile(r"^\d+ requested and \d+ written$")  # numpy/_core/src/multiarray/convert.c

Report = Callable[[float, float], None]
"""``report(done, total)``: how far the work is, in the unit of the caller's bar."""

Work = Callable[[dict[str, Any], Report], dict[str, Any]]
"""What a child process does: a request and a way to tell how far it is, to a result; both are JSON values."""

AnyWork = TypeVar("AnyWork", bound=Callable[..., dict[str, Any]])

Preload = Literal["nothing", "quantool", "torch", "transformers", "llmcompressor"]
"""What a worker finds imported when it begins: each includes those before it; ``nothing`` is a new interpreter."""

_PRELOADS: dict[str, Preload] = {}


def name_of(work: Callable[..., dict[str, Any]]) -> str:
    """``module:function``, by which another process finds it."""
    return f"{work.__module__}:{work.__qualname__}"


def preloaded(libraries: Preload) -> Callable[[AnyWork], AnyWork]:
    """Declare what a worker is forked with: libraries that take seconds to import are then paid for once a run.

    A worker without this declaration is forked with quantool's own modules, which import nothing heavy.
    """

    def declared(work: AnyWork) -> AnyWork:
        _PRELOADS[name_of(work)] = libraries
        return work

    return declared


def preload_of(work: Work) -> Preload:
    """What the worker was declared to be forked with."""
    return _PRELOADS.get(name_of(work), "quantool")


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies (``kill -9`` included)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def main() -> None:
    """Read the request from standard input, work, and answer on the events pipe."""
    die_with_parent(int(sys.argv[3]))
    work(sys.argv[1], int(sys.argv[2]), json.load(sys.stdin))
    leave()


def leave() -> NoReturn:
    """End this process, whose result was sent: what was registered for the end is done, libraries are not taken apart.

    With torch and transformers that takes a third of a second, a forked child copies their pages for it.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 - what the interpreter itself calls
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def work(target: str, descriptor: int, request: dict[str, Any]) -> None:
    """Call ``target`` on ``request``; progress, result and errors of a known kind (a GPU's too) go to the events pipe ``descriptor``."""
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
        except RuntimeError as error:
            if (blamed := gpus.fault(error)) is None:
                raise
            traceback.print_exc()
            _send_error(send, blamed)
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
