"""The last look before a folder is complete: no file to publish may hold a path of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    spellings = _spellings(folders)
    own = {
        what for what, paths in spellings.items() if any(_find(paths, text) for text in _checkpoint(source))
    }
    contents = {name: text.encode() for name, text in texts.items()}
    for name in [*texts, *(name for name in names if name not in texts)]:
        content = contents[name] if name in contents else _beginning(folder / name)
        for what, paths in spellings.items():
            if what not in own and (hit := _find(paths, content)) is not None:
                line = content.count(b"\n", 0, hit.start()) + 1
                shown = content[hit.start() : hit.start() + SHOWN].splitlines()[0].decode("utf-8", "replace")
                raise PublicationError(
                    f"{folder / name}, line {line}: holds {what} of this machine ({shown} …); the folder is not packed",
                    hint="nothing that is published may name a folder of this machine; what is made and judged is kept",
                )


def _spellings(folders: Mapping[str, Path]) -> dict[str, list[bytes]]:
    """What each folder is written as: as it was given and with links followed, as text and as JSON writes it.

    The root of the file system is no secret.
    """
    spellings = {}
    for what, place in folders.items():
        texts = {str(path) for path in (place.absolute(), place.resolve()) if len(path.parts) > 1}
        texts |= {json.dumps(text)[1:-1] for text in texts}
        if texts:
            spellings[what] = sorted(text.encode() for text in texts)
    return spellings


def _find(paths: Sequence[bytes], content: bytes) -> re.Match[bytes] | None:
    """The first of ``paths`` that ``content`` holds as a whole path.

    The pattern alone, which looks behind at every byte, takes fifty times as long as to see that none is there.
    """
    present = [path for path in paths if path in content]
    if not present:
        return None
    listed = b"|".join(map(re.escape, present))
    return re.search(rb"(?<![\w.~/:-])(?:" + listed + rb")(?![\w.-])", content)


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
