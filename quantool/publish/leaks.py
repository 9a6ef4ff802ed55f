"""The last look before a folder is complete: no file to publish may hold a path of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from quantool.errors import PublicationError

BEGINNING = 16 << 20
"""Bytes of a file that are searched: all of any text, the metadata of a GGUF or safetensors file."""
SMALL = 64 << 20
"""Bytes up to which a file of the checkpoint is read for what it says itself."""
SHOWN = 60  # characters of the finding


def refuse_leaks(
    folder: Path, names: Iterable[str], texts: Mapping[str, str], folders: Mapping[str, Path], source: Path
) -> None:
    """PublicationError when a file of ``names`` in ``folder``, or a text about to be written there, holds a place.

    ``folders`` are those of this machine by what they are (``"the home folder"``). A path counts as a whole, with what
    is below it: ``/root`` is not found in ``/rooted``, nor in ``https://example.org/root``. What the checkpoint's own
    files in ``source`` say is public already (a vocabulary holds ``/home``).
    """
    patterns = _patterns(folders)
    own = {
        what
        for what, pattern in patterns.items()
        if any(pattern.search(text) for text in _checkpoint(source))
    }
    contents = {name: text.encode() for name, text in texts.items()}
    for name in [*texts, *(name for name in names if name not in texts)]:
        content = contents[name] if name in contents else _beginning(folder / name)
        for what, pattern in patterns.items():
            if what not in own and (hit := pattern.search(content)) is not None:
                line = content.count(b"\n", 0, hit.start()) + 1
                shown = content[hit.start() : hit.start() + SHOWN].splitlines()[0].decode("utf-8", "replace")
                raise PublicationError(
                    f"{folder / name}, line {line}: holds {what} of this machine ({shown} …); the folder is not packed",
                    hint="nothing that is published may name a folder of this machine; what is made and judged is kept",
                )


def _patterns(folders: Mapping[str, Path]) -> dict[str, re.Pattern[bytes]]:
    """A pattern for each folder, as it was given and with links followed, as text and as JSON writes it.

    The root of the file system is no secret.
    """
    patterns = {}
    for what, place in folders.items():
        spellings = {str(path) for path in (place.absolute(), place.resolve()) if len(path.parts) > 1}
        spellings |= {json.dumps(text)[1:-1] for text in spellings}
        if spellings:
            listed = b"|".join(re.escape(text.encode()) for text in sorted(spellings))
            patterns[what] = re.compile(rb"(?<![\w.~/:-])(?:" + listed + rb")(?![\w.-])")
    return patterns


def _checkpoint(source: Path) -> Iterator[bytes]:
    """The small files of a checkpoint."""
    for path in sorted(source.glob("*")):
        if path.is_file() and path.suffix != ".safetensors" and path.stat().st_size <= SMALL:
            yield path.read_bytes()


def _beginning(path: Path) -> bytes:
    """The beginning of a file; nothing for one that was uploaded and deleted already."""
    try:
        with path.open("rb") as file:
            return file.read(BEGINNING)
    except FileNotFoundError:
        return b""
