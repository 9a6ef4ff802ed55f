"""What is written down when something happens that nobody foresaw: a traceback in a file, and the file that was at hand."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

from quantool import __version__
from quantool.errors import QuantoolError
from quantool.runtime.workspace import Workspace

LOG = "traceback.log"


def written_down(error: Exception) -> QuantoolError:
    """The one line that the user is told about ``error``; its traceback goes to the run's logs, or to a temporary file."""
    at_hand = file_at_hand(error)
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
    where = f" ({at_hand})" if at_hand else ""
    return QuantoolError(
        f"this should not happen{where}: {message}",
        hint=f"the traceback is in {_save(error)}; please report it with that file; finished stages are kept",
    )


def file_at_hand(error: Exception) -> Path | None:
    """The file that the error names, or the last one that the code where it was raised was given."""
    if isinstance(error, OSError) and isinstance(error.filename, str):
        return Path(error.filename)
    for frame in _frames(error):
        for found in frame.f_locals.values():
            with suppress(OSError, ValueError):
                if isinstance(found, Path) and found.is_file():
                    return found
    return None


def _save(error: Exception) -> Path:
    lines = [f"quantool {__version__}, Python {sys.version.split()[0]}: {' '.join(sys.argv)}\n"]
    text = "".join([*lines, *traceback.format_exception(error), "\n"])
    workspaces = (value for frame in _frames(error) for value in frame.f_locals.values())
    logs = next(
        (
            workspace.logs
            for workspace in workspaces
            if isinstance(workspace, Workspace) and workspace.logs.is_dir()
        ),
        None,
    )
    if logs is not None:
        with suppress(OSError), (logs / LOG).open("a", encoding="utf-8") as file:
            file.write(text)
            return (logs / LOG).absolute()
    with tempfile.NamedTemporaryFile(
        "w", prefix="quantool-traceback-", suffix=".log", delete=False, encoding="utf-8"
    ) as left:
        left.write(text)
    return Path(left.name)


def _frames(error: Exception) -> Iterator[FrameType]:
    """Where the error was raised first, where that was called from next, and so on."""
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        yield frame
