"""Whether the Hub holds what was sent: sizes and hashes from its listing, and bytes read back in part."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from quantool.hub.errors import asking
from quantool.publish.parcel import Parcel
from quantool.records import FileRecord, Part

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

HEAVY_ENDS = (".gguf", ".safetensors")
HEAVY = 10_000_000
"""Bytes from which the Hub takes a file as a large one only."""
HEAD, TAIL = 1 << 20, 1 << 16
"""Bytes read back from the beginning (more where the header is longer) and the end of a large file."""
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of GGUF's scalar types (ggml, docs/gguf.md: gguf_metadata_value_type)."""
STRING, ARRAY = 8, 9
TENSOR = 4 + 8  # a tensor's entry after name, count of dimensions and dimensions: type and offset


def listed(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """The files of a revision by name."""
    from huggingface_hub.hf_api import RepoFile

    with asking(f"list {repo_id} at {revision[:12]}"):
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def is_same(entry: RepoFile | None, file: FileRecord, folder: Path) -> bool:
    """Whether the Hub's file has the size and the hash of ours (SHA-256 of large files, git's of the others)."""
    if entry is None or entry.size != file.bytes:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == file.sha256
    content = (folder / file.name).read_bytes()  # small: the Hub takes nothing over 10 MB into git
    return (
        entry.blob_id
        == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    )


def is_heavy(file: FileRecord) -> bool:
    """Whether a file goes to the Hub's storage of large files, not into git."""
    return file.bytes >= HEAVY or file.name.endswith(HEAVY_ENDS)


def compare(
    api: HfApi, repo_id: str, commit: str, files: Sequence[FileRecord], parcel: Parcel
) -> tuple[str, ...] | str:
    """Compare every file at ``commit``; the names of those read back in part, or what differs."""
    there = listed(api, repo_id, commit)
    differing = [
        f"{file.name}: {_told(there.get(file.name), file)}"
        for file in files
        if not is_same(there.get(file.name), file, parcel.folder)
    ]
    heavy = [file.name for file in files if is_heavy(file)]
    if not differing:
        ends = {
            name: parcel.uploads[name].ends if name in parcel.uploads else ends_of(parcel.folder / name)
            for name in heavy
        }
        damaged = _read_back(api, f"{repo_id}@{commit}", ends)
        differing = [f"{name}: the bytes read back differ" for name in damaged]
    return "; ".join(differing) if differing else tuple(heavy)


def _told(entry: RepoFile | None, file: FileRecord) -> str:
    if entry is None:
        return "missing"
    if entry.size != file.bytes:
        return f"{entry.size} bytes instead of {file.bytes}"
    return "another hash"


def ends_of(path: Path) -> tuple[Part, ...]:
    """The beginning (all of the header) and the end of a file, as they will be compared."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = min(size, max(HEAD, header_bytes(file)))
        places = [(0, head)]
        if size > head:
            places.append((max(size - TAIL, head), min(size - head, TAIL)))
        return tuple(
            Part(start=start, bytes=length, sha256=_hash_at(file, start, length)) for start, length in places
        )


def _read_back(api: HfApi, place: str, ends: Mapping[str, Sequence[Part]]) -> list[str]:
    """Names of files whose beginning or end is not ours; asks for these bytes alone."""
    from huggingface_hub import HfFileSystem

    remote = HfFileSystem(endpoint=api.endpoint, token=True, skip_instance_cache=True)
    damaged = []
    for name, parts in ends.items():
        with (
            asking(f"read {place}/{name} back"),
            remote.open(f"{place}/{name}", "rb", cache_type="none") as theirs,
        ):
            if not all(_hash_at(theirs, part.start, part.bytes) == part.sha256 for part in parts):
                damaged.append(name)
    return damaged


def _hash_at(file: IO[bytes], start: int, length: int) -> str:
    file.seek(start)
    return hashlib.sha256(file.read(length)).hexdigest()


def header_bytes(file: IO[bytes]) -> int:
    """Where the tensor data of a GGUF or safetensors file begins; 0 for another kind of file.

    Sources: ggml, docs/gguf.md; safetensors, "Format".
    """
    file.seek(0)
    start = file.read(24)
    if len(start) < 24:
        return 0
    if start[:4] == b"GGUF":
        _, tensors, keys = struct.unpack("<IQQ", start[4:])
        return _gguf_header(file, tensors, keys)
    length = int.from_bytes(start[:8], "little")
    return 8 + length if start[8:9] == b"{" else 0


def _gguf_header(file: IO[bytes], tensors: int, keys: int) -> int:
    """Walk over the keys and the tensors' entries; padding before the data is not counted."""

    def number(size: int) -> int:
        return int.from_bytes(file.read(size), "little")

    def pass_over(kind: int) -> None:
        if kind == STRING:
            file.seek(number(8), 1)
        elif kind == ARRAY:
            inner, count = number(4), number(8)
            if inner in SIZES:
                file.seek(count * SIZES[inner], 1)
            else:
                for _ in range(count):
                    pass_over(inner)
        else:
            file.seek(SIZES[kind], 1)

    for _ in range(keys):
        pass_over(STRING)
        pass_over(number(4))
    for _ in range(tensors):
        pass_over(STRING)
        file.seek(8 * number(4) + TENSOR, 1)
    return file.tell()
