"""Hashes of many files at the speed of the disk: blocks are read ahead while others are hashed, files side by side."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

BLOCK = 8 << 20
"""Bytes of one read."""
SIDE_BY_SIDE = 4
"""Files hashed at once, at most: each has a thread that hashes and one that reads."""


def sha256_of_files(
    folder: Path, names: Sequence[str], advance: Callable[[int], None] = lambda _: None
) -> Mapping[str, str | None]:
    """SHA-256 of the files ``names`` below ``folder``; None for one that is not there. ``advance`` gets bytes that are done.

    Largest files first. Raises OSError for one that cannot be read.
    """
    lock = Lock()

    def count(size: int) -> None:
        with lock:
            advance(size)

    present = [name for name in names if (folder / name).is_file()]
    ordered = sorted(present, key=lambda name: -(folder / name).stat().st_size)
    with ThreadPoolExecutor(min(SIDE_BY_SIDE, os.cpu_count() or 1)) as hashers:
        found = dict(
            zip(ordered, hashers.map(lambda name: _sha256(folder / name, count), ordered), strict=True)
        )
    return {name: found.get(name) for name in names}


def _sha256(path: Path, count: Callable[[int], None]) -> str:
    """One block is read while the one before it is hashed; both let go of the interpreter's lock."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as reader:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        blocks = (bytearray(BLOCK), bytearray(BLOCK))
        number, waiting = 0, reader.submit(file.readinto, blocks[0])
        while size := waiting.result():
            filled, number = blocks[number], 1 - number
            waiting = reader.submit(file.readinto, blocks[number])
            digest.update(memoryview(filled)[:size])
            count(size)
    return digest.hexdigest()
