"""A YAML file as plain data, with the place of every value, and the ``--set`` overrides on top of it.

YAML 1.1 as PyYAML reads it, except that a date is text and that ``1e-3`` is a number. Duplicate keys, keys that are
not text, and values without a JSON form are mistakes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantool.config.errors import KeyPath, Mistake, Place, dotted, show
from quantool.errors import ConfigError, nearest

_LIMIT = 100_000  # nodes, aliases counted each time they are used
_TAGS: dict[type[yaml.Node], tuple[str, ...]] = {
    yaml.ScalarNode: ("str", "int", "float", "bool", "null"),
    yaml.MappingNode: ("map",),
    yaml.SequenceNode: ("seq",),
}


@dataclass(frozen=True)
class Document:
    """The data of a file (JSON values), where each part stands, and what is wrong with it as YAML."""

    name: str
    data: dict[str, Any]
    places: Mapping[KeyPath, Place]
    mistakes: tuple[Mistake, ...] = ()

    def place(self, path: KeyPath) -> Place:
        """Where ``path`` stands, or the nearest part around it that is written down."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, (1, 1))

    def error(self, mistakes: Iterable[Mistake], hint: str = "") -> ConfigError:
        """All ``mistakes`` in one error, each on its line: ``FILE:LINE:COL: key.path: what is wrong``."""
        unique = dict.fromkeys(mistakes)
        ordered = sorted(unique, key=lambda mistake: _order(mistake.place or self.place(mistake.path)))
        return ConfigError("\n".join(self._line(mistake) for mistake in ordered), hint=hint)

    def _line(self, mistake: Mistake) -> str:
        place = mistake.place or self.place(mistake.path)
        where = place if isinstance(place, str) else f"{self.name}:{place[0]}:{place[1]}"
        return (
            f"{where}: {dotted(mistake.path)}: {mistake.text}" if mistake.path else f"{where}: {mistake.text}"
        )


def read(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Read ``path`` and put each ``key.sub=value`` of ``overrides`` over it.

    Mistakes that leave the rest readable (a duplicate key, an override that fits nowhere) are kept in the document.
    Raises ConfigError for a file that is missing, a folder, not UTF-8, not YAML or not a mapping.
    """
    name = str(path)
    data, places, mistakes = _parse(_text(path), name)
    if not isinstance(data, dict):
        line, column = places.get((), (1, 1))
        what = "the file is empty" if data is None else f"a configuration is a mapping of keys {show(data)}"
        raise ConfigError(f"{name}:{line}:{column}: {what}", hint="start with model_id: and method:")
    everywhere: dict[KeyPath, Place] = dict(places)
    for override in overrides:
        mistakes += _override(override, data, everywhere)
    return Document(name, data, everywhere, tuple(mistakes))


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        folder = path.parent
        known = [file.name for file in folder.glob("*.y*ml")] if folder.is_dir() else []
        raise ConfigError(f"{path}: there is no such file", hint=nearest(path.name, known)) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder", hint="name the YAML file in it") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ConfigError(
            f"{path}:{line}:{column}: byte 0x{raw[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
        ) from error


def _parse(text: str, name: str) -> tuple[Any, dict[KeyPath, tuple[int, int]], list[Mistake]]:
    """Data, places and mistakes of a YAML text; ConfigError when it is not YAML."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}, []
        walk = _Walk(loader)
        return walk.value(node, ()), walk.places, walk.mistakes
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        problem = (error.problem or error.context or "unreadable").replace("'\\t'", "a tab")
        raise ConfigError(f"{name}:{line}:{column}: not YAML: {problem}", hint=_advice(problem)) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        raise ConfigError(
            f"{name}:{line}:{column}: not YAML: control character {ord(text[error.position]):#04x}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply") from error


def _advice(problem: str) -> str:
    if "a tab" in problem:
        return "indent with spaces"
    return "put quotes around text that holds : # { } [ ] or starts with * & ! % @ `"


class _Loader(yaml.SafeLoader):
    """SafeLoader without dates and with YAML 1.2's floats."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Walk:
    """Turns nodes into data, keeping places and mistakes."""

    def __init__(self, loader: _Loader) -> None:
        self.loader = loader
        self.places: dict[KeyPath, tuple[int, int]] = {}
        self.mistakes: list[Mistake] = []
        self.nodes = 0
        self.open: set[int] = set()  # nodes being read: an alias to one of them would never end

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > _LIMIT or id(node) in self.open:
            raise yaml.constructor.ConstructorError(None, None, "aliases without end", node.start_mark)
        self.places.setdefault(path, _position(node))
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS[type(node)]:
            self.mistakes.append(Mistake(path, f"the YAML tag {node.tag} has no meaning here"))
            return None
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self.open.discard(id(node))

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (ValueError, LookupError) as error:  # an explicit tag on a value that it does not fit
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.tag} does not fit {node.value!r}", node.start_mark
            ) from error
        if isinstance(value, float) and not math.isfinite(value):
            self.mistakes.append(Mistake(path, f"must be a finite number (value {node.value})"))
            return None
        return value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key, item in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                merged += item.value if isinstance(item, yaml.SequenceNode) else [item]
            elif key.tag != "tag:yaml.org,2002:str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else key.id
                text = f"the key {shown} is not text; put it in quotes"
                self.mistakes.append(Mistake(path, text, _position(key)))
            elif key.value in data:
                line, column = self.places[*path, key.value]
                text = f"duplicate key; it stands in line {line}, column {column} already"
                self.mistakes.append(Mistake((*path, key.value), text, _position(key)))
            else:
                inside = (*path, key.value)
                self.places.setdefault(inside, _position(key))
                data[key.value] = self.value(item, inside)
        for other in merged:
            if not isinstance(other, yaml.MappingNode):
                self.mistakes.append(Mistake(path, "<< takes a mapping or a list of them", _position(other)))
                continue
            for key, value in self.value(other, path).items():
                data.setdefault(key, value)
        return data


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _override(override: str, data: dict[str, Any], places: dict[KeyPath, Place]) -> list[Mistake]:
    """Put ``key.sub=value`` into ``data``; mistakes when it fits nowhere."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    place = f"--set {name.strip()}"
    if not equals or not all(keys):
        return [Mistake((), f"must be KEY=VALUE or KEY.SUB=VALUE {show(override)}", place)]
    try:
        value, _, mistakes = _parse(text, place)
    except ConfigError as error:
        return [Mistake((), f"the value is not YAML: {error.message.rpartition('not YAML: ')[2]}", place)]
    if mistakes:
        return [Mistake((), mistake.text, place) for mistake in mistakes]
    path = _put(data, keys, value)
    if isinstance(path, str):
        return [Mistake((), path, place)]
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
    for length in range(1, len(path) + 1):  # mappings that were missing stand where the override stands
        places.setdefault(path[:length], place)
    return []


def _put(data: dict[str, Any], keys: list[str], value: Any) -> KeyPath | str:
    """Set ``value`` under ``keys``, making missing mappings; the path it went to, or what is wrong."""
    inside: Any = data
    path: KeyPath = ()
    for index, key in enumerate(keys):
        step: str | int = key
        if isinstance(inside, list):
            if not key.isdecimal() or int(key) > len(inside):
                return f"{dotted(path)} is a list of {len(inside)}: say 0 to {len(inside)}, the last appends"
            step = int(key)
            if step == len(inside):
                inside.append(None)
        elif not isinstance(inside, dict):
            return f"{dotted(path)} is not a mapping {show(inside)}"
        path = (*path, step)
        if index == len(keys) - 1:
            inside[step] = value
        else:
            if (isinstance(inside, dict) and key not in inside) or inside[step] is None:
                inside[step] = {}
            inside = inside[step]
    return path


def _order(place: Place) -> tuple[int, int, int]:
    return (1, 0, 0) if isinstance(place, str) else (0, *place)
