"""The records of a checkpoint as it was found, and of what was done to it before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import JsonValue

from quantool.record import MachinePath, NameOrPath, Record


class SourceFile(Record):
    """One file of a checkpoint. ``sha256`` is None while nobody has read it (weights, in a plan)."""

    name: str
    bytes: int
    sha256: str | None = None


class Origin(Record):
    """A checkpoint or adapter as it was found, of which a ``Source`` was prepared."""

    model_id: NameOrPath
    commit: str | None
    folder: MachinePath
    files: tuple[SourceFile, ...]
    """Configuration, index and weights."""

    def identity(self) -> list[JsonValue]:
        """As ``Source.identity``."""
        where: list[JsonValue] = [self.model_id, self.commit] if self.commit else []
        return [*where, *identities(self.folder, self.files, None if self.commit else "time")]


class Prepared(Record):
    """What was done to a checkpoint before anything is made of it: its weights were dequantized, an adapter merged into it."""

    origin: Origin
    form: str = ""
    """How it was quantized, for people; empty for one that was not."""
    adapter: Origin | None = None
    merged: str = ""
    """What the adapter added, for people."""
    apart: bool = False
    """The adapter stays a file of its own in what is made (``merge: false``); merged, it is the reference."""

    def identity(self) -> list[JsonValue]:
        """What the prepared weights follow from."""
        adapter = self.adapter.identity() if self.adapter is not None else None
        return [self.form, self.origin.identity(), adapter, *["apart"] * self.apart]

    def described(self) -> str:
        """One sentence for plan, report and card."""
        found = []
        if self.form:
            found.append(f"quantized again from {self.form}: the reference is the dequantized model")
        if self.adapter is not None:
            names = (self.adapter, self.origin)
            adapter, base = (f"{o.model_id}@{o.commit}" if o.commit else Path(o.model_id).name for o in names)
            how = "beside" if self.apart else "merged into"
            found.append(f"adapter {adapter} ({self.merged}) {how} {base}: the reference is the merged model")
        return "; ".join(found)


def identities(folder: Path, files: Iterable[SourceFile], unread: JsonValue) -> list[JsonValue]:
    """Name, size and hash of files; ``unread`` stands for the hash of one that nobody has read, "time" for its time."""
    return [
        [
            file.name,
            file.bytes,
            file.sha256 or ((folder / file.name).stat().st_mtime_ns if unread == "time" else unread),
        ]
        for file in files
    ]
