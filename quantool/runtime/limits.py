"""Foreign code that must end: limits of processor time and memory that the kernel holds a process to.

Processor time is counted, not the clock: what takes 5 s of it is endless on a busy machine as on a quiet one, and nothing
else is.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 5
"""Processor time of one piece of work."""
BYTES = 1 << 30
"""Memory that it may take beside what the process has already."""


OUT_OF_MEMORY = 3  # exit code of the forked child


class EndlessError(Exception):
    """A piece of work did not end within its limits; the message says which limit."""


def limit(pid: int = 0, seconds: int = SECONDS, size: int = BYTES) -> None:
    """Let a process (this one by default) use ``seconds`` more of processor time and ``size`` more bytes.

    Beyond the first it is killed by SIGXCPU, beyond the second it gets no memory. Another process than this one is limited
    on Linux only, and not when it has ended.
    """
    if pid and not hasattr(resource, "prlimit"):
        return
    with suppress(ProcessLookupError, FileNotFoundError):
        _set(pid, resource.RLIMIT_CPU, int(_used_seconds(pid)) + 1 + seconds)
        _set(pid, resource.RLIMIT_DATA, _used_bytes(pid) + size)


def _set(pid: int, kind: int, soft: int) -> None:
    """Set a soft limit; the hard one stays, so that it may be raised again."""
    hard = (resource.prlimit(pid, kind) if pid else resource.getrlimit(kind))[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    if pid:
        resource.prlimit(pid, kind, (soft, hard))
    else:
        resource.setrlimit(kind, (soft, hard))


def _used_seconds(pid: int) -> float:
    if not pid:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _used_bytes(pid: int) -> int:
    """What RLIMIT_DATA counts; FileNotFoundError where there is no /proc, ProcessLookupError for one that has ended."""
    text = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in text.splitlines())
    if "VmData" not in lines:  # nobody has waited for it yet
        raise ProcessLookupError(pid)
    return int(lines["VmData"].split()[0]) << 10


def each_limited(items: Iterable[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    """``work`` on each of ``items``, in one forked child that has the limits anew for each; results are JSON values.

    Raises EndlessError after the results of those that ended. Only for ``work`` that starts no threads and needs none.
    """
    items = list(items)
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(read_end)
        _work(items, work, write_end)
    os.close(write_end)
    done, status = 0, None
    try:
        with os.fdopen(read_end, encoding="utf-8") as results:
            for line in results:
                if not line.endswith("\n"):  # it died in the middle of a word
                    break
                yield json.loads(line)
                done += 1
        _, status = os.waitpid(child, 0)
    finally:
        if status is None:  # nobody wants the rest
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if done < len(items):
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGXCPU:
            raise EndlessError(f"it did not end within {SECONDS} s")
        if code == OUT_OF_MEMORY:
            raise EndlessError(f"it took more than {BYTES >> 30} GB of memory")
        if code < 0:
            raise EndlessError(f"it was ended by {signal.Signals(-code).name}")
        raise RuntimeError(f"forked work ended with code {code}; its traceback is in the log")


def _work(items: list[Any], work: Callable[[Any], Any], write_end: int) -> None:
    """The child's side; never returns."""
    code = 1
    try:
        with os.fdopen(write_end, "w", encoding="utf-8") as results:
            for item in items:
                limit()
                results.write(json.dumps(work(item)) + "\n")
                results.flush()
        code = 0
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException:  # noqa: BLE001 - shown; a forked child must not go on as if it were its parent
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
