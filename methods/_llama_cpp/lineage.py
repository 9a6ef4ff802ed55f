"""Which tensors of a checkpoint each tensor of a converted file comes from, read from the converter's lazy tensors.

Upstream computes with tensors that remember their operands until the file is written (``gguf-py/gguf/lazy.py``); at the
end of every chain stands a place in a safetensors file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Place = tuple[str, int]
"""File name and byte offset."""


class Lineage:
    """What one upstream model object makes of its checkpoint; it watches from before ``prepare_tensors``."""

    def __init__(self, model: Any, gguf: Any) -> None:
        self._gguf = gguf
        self._by_call: dict[str, frozenset[Place]] = {}
        modify = model.modify_tensors

        def watched(tensor: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            given = frozenset(places(tensor))
            for made, data in modify(tensor, name, bid):
                self._by_call[made] = given
                yield made, data

        model.modify_tensors = watched

    def sources(self, writer: Any, folder: Path) -> dict[str, list[str]]:
        """Name of every tensor that ``writer`` holds to the names of the tensors in ``folder`` that it is made of.

        Empty for what the converter computes from config.json. Where a value was needed at once, so that its operands
        are forgotten, those count that the converter was working on.
        """
        named = self._names(folder)
        found: dict[str, list[str]] = {}
        for shard in writer.tensors:
            for name, info in shard.items():
                origin = set(places(info.tensor)) or self._by_call.get(name, frozenset())
                found[name] = sorted(named[place] for place in origin)
        return found

    def _names(self, folder: Path) -> dict[Place, str]:
        named: dict[Place, str] = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in self._gguf.utility.SafetensorsLocal(file).tensors.items():
                if tensor.data_range.size:
                    named[file.name, tensor.data_range.offset] = name
        return named


def places(tensor: Any) -> Iterator[Place]:
    """Where the data lie that a lazy tensor will be computed from."""
    seen: set[int] = set()
    waiting: list[Any] = [tensor]
    while waiting:
        entry = waiting.pop()
        if id(entry) in seen:
            continue
        seen.add(id(entry))
        if isinstance(entry, (list, tuple)):
            waiting += entry
        elif isinstance(entry, dict):
            waiting += entry.values()
        else:
            fields = _fields(entry)
            if (place := fields.get("data_range")) is not None:
                yield Path(place.filename).name, place.offset
            waiting += [fields.get("_args", ()), fields.get("_kwargs", {})]


def _fields(entry: Any) -> dict[str, Any]:
    """The attributes of a lazy tensor or of a place, whose own ``__getattr__`` would make another lazy tensor."""
    try:
        fields: dict[str, Any] = object.__getattribute__(entry, "__dict__")
    except AttributeError:
        return {}
    return fields
