"""Workers that end without an answer: whether the artifact is to blame."""

from __future__ import annotations

from quantool.errors import QuantizationError
from quantool.validation._findings.builder import without_folders

SIGNALS = ("SIGABRT", "SIGSEGV", "SIGXCPU")
"""llama.cpp aborts on a file that breaks its assumptions, and a template that does not end is stopped by SIGXCPU; another
end (out of memory) says nothing about the file."""


class WorkerError(QuantizationError):
    """The worker ended without an answer."""


def crash(error: WorkerError, engine: str) -> str:
    """Say that ``engine`` crashed on the artifact; raises ``error`` where its end says nothing about the artifact."""
    if not any(name in error.message for name in SIGNALS):
        raise error
    return without_folders(f"{engine} crashes on it: {error.message}\n{error.hint}")
