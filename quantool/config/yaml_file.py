"""A YAML file as plain data, with the place of every value, and the ``--set`` overrides on top of it.

YAML 1.1 as PyYAML reads it, except that a date, ``1:30`` and ``010`` are text and that ``1e-3`` is a number. Duplicate
keys, keys that are not text, and values without a JSON form are mistakes; size, depth, count and digits have limits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantool.config.errors import KeyPath, Mistake, Place, dotted, line_of, show
from quantool.errors import ConfigError, nearest

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
"""Values, aliases counted each time they are used."""
MAX_DEPTH = 64
MAX_DIGITS = 18
"""Of a whole number: what 64 bits hold."""

_TAG = "tag:yaml.org,2002:"
_TAGS: dict[type[yaml.Node], tuple[str, ...]] = {
    yaml.ScalarNode: ("str", "int", "float", "bool", "null"),
    yaml.MappingNode: ("map",),
    yaml.SequenceNode: ("seq",),
}
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class YamlDocument:
    """The data of a file (JSON values), where each part stands, and what is wrong with it as YAML."""

    name: str
    data: Any
    places: Mapping[KeyPath, Place]
    mistakes: tuple[Mistake, ...] = ()

    def place(self, path: KeyPath) -> Place:
        """Where ``path`` stands, or the nearest part around it that is written down."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, (1, 1))

    def error(self, mistakes: Iterable[Mistake], hint: str = "") -> ConfigError:
        """All ``mistakes`` in one error, each on its line: ``FILE:LINE:COL: key.path: what is wrong``."""
        placed = {mistake: mistake.place or self.place(mistake.path) for mistake in mistakes}
        ordered = sorted(
            placed.items(), key=lambda entry: (1,) if isinstance(entry[1], str) else (0, *entry[1])
        )
        return ConfigError("\n".join(self._line(*entry) for entry in ordered), hint=hint)

    def _line(self, mistake: Mistake, place: Place) -> str:
        where = place if isinstance(place, str) else f"{self.name}:{place[0]}:{place[1]}"
        key = dotted(mistake.path)
        return ": ".join(
            part for part in (where, "" if where == f"--set {key}" else key, mistake.text) if part
        )


def read(path: Path, overrides: Sequence[str] = ()) -> YamlDocument:
    """Read ``path`` and put each ``key.sub=value`` of ``overrides`` over it.

    Mistakes that leave the rest readable (a duplicate key, an override that fits nowhere) are kept in the document.
    Raises ConfigError for a file that is missing, a folder, too long, not UTF-8, not YAML or not a mapping.
    """
    document = parse(_text(path), str(path))
    if not isinstance(document.data, dict):
        what = f"a configuration is a mapping of keys {show(document.data)}"
        mistake = Mistake((), "the file is empty" if document.data is None else what)
        raise document.error([mistake], hint="start with model_id: and method:")
    places = dict(document.places)
    wrong = [mistake for override in overrides for mistake in _override(override, document.data, places)]
    return YamlDocument(document.name, document.data, places, (*document.mistakes, *wrong))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        known = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: there is no such file", hint=nearest(path.name, known)) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder", hint="name the YAML file in it") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: is longer than {MAX_BYTES:,} bytes", hint="is this the configuration?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = line_of(raw.decode("latin-1"), error.start)
        raise ConfigError(
            f"{path}:{line}:{column}: byte 0x{raw[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
        ) from error


def parse(text: str, name: str) -> YamlDocument:
    """One YAML document; None as data when it is empty. Raises ConfigError ``NAME:LINE:COL: not YAML: …`` when it is none."""
    place = (1, 1)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError) as error:  # "\U00110000", %YAML 999…
            raise yaml.MarkedYAMLError(
                problem=f"no character or number: {error}", problem_mark=loader.get_mark()
            ) from error
        walk = _Walk(loader)
        data = None if node is None else walk.value(node, ())
    except yaml.MarkedYAMLError as error:
        if mark := error.problem_mark or error.context_mark:
            place = _position(mark)
        problem = (error.problem or error.context or "unreadable").replace("'\\t'", "a tab")[:200]
        raise _no_yaml(name, place, problem) from error
    except yaml.reader.ReaderError as error:
        place = line_of(text, error.position)
        raise _no_yaml(name, place, f"control character {ord(text[error.position]):#04x}") from error
    return YamlDocument(name, data, walk.places, tuple(walk.mistakes))


def _no_yaml(name: str, place: tuple[int, int], problem: str) -> ConfigError:
    hint = "put quotes around text that holds : # { } [ ] or starts with * & ! % @ `"
    if "another document" in problem:
        hint = "a file is one document: remove the line --- before the second one"
    elif "a tab" in problem:
        hint = "indent with spaces"
    return ConfigError(f"{name}:{place[0]}:{place[1]}: not YAML: {problem}", hint=hint)


class _Loader(yaml.SafeLoader):
    """SafeLoader without dates, base 60 and numbers that begin with 0, with YAML 1.2's floats, and of bounded depth."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML, counting how deep it is."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in resolvers if entry[0].removeprefix(_TAG) not in ("timestamp", "int", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in (
    ("int", r"[-+]?(0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"))


class _Walk:
    """Turns nodes into data, keeping places and mistakes."""

    def __init__(self, loader: _Loader) -> None:
        self.loader = loader
        self.places: dict[KeyPath, Place] = {}
        self.mistakes: list[Mistake] = []
        self.nodes = 0
        self.open: set[int] = set()  # nodes being read: an alias to one of them would never end

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or id(node) in self.open or len(self.open) > MAX_DEPTH:
            what = (
                "aliases without end"
                if id(node) in self.open
                else f"more than {MAX_NODES} values (aliases without end?)"
            )
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        self.places.setdefault(path, _position(node.start_mark))
        if node.tag.removeprefix(_TAG) not in _TAGS[type(node)]:
            return self._wrong(path, f"the YAML tag {node.tag[:60]} has no meaning here")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            data: Any = self._mapping(node, path)
        else:
            data = [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        self.open.discard(id(node))
        return data

    def _wrong(self, path: KeyPath, text: str, node: yaml.Node | None = None) -> None:
        self.mistakes.append(Mistake(path, text, None if node is None else _position(node.start_mark)))

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind == "int" and len(text) > MAX_DIGITS:
            return self._wrong(path, f"a whole number has at most {MAX_DIGITS} digits (value {text[:40]}…)")
        if kind == "str" and (bad := _NOT_TEXT.search(text)):
            return self._wrong(path, f"the character {ord(bad[0]):#06x} cannot stand in text")
        fits = kind != "null" or text.lower() in ("", "~", "null")
        try:
            value = self.loader.construct_object(node)
        except (ValueError, LookupError):  # an explicit tag on a value that it does not fit
            fits = False
        if not fits or (kind in ("int", "float") and ":" in text):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.tag} does not fit {text[:60]!r}", node.start_mark
            )
        if isinstance(value, float) and not math.isfinite(value):
            return self._wrong(path, f"must be a finite number (value {text[:60]})")
        return value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key, item in node.value:
            if key.tag == _TAG + "merge":
                merged += item.value if isinstance(item, yaml.SequenceNode) else [item]
            elif key.tag != _TAG + "str" or _NOT_TEXT.search(key.value):
                shown = key.value[:60] if isinstance(key, yaml.ScalarNode) else key.id
                self._wrong(path, f"the key {shown} is not text; put it in quotes", key)
            elif key.value in data:
                first = self.places[*path, key.value]
                text = f"duplicate key; it stands in line {first[0]}, column {first[1]} already"
                self._wrong((*path, key.value), text, key)
            else:
                inside = (*path, key.value)
                self.places.setdefault(inside, _position(key.start_mark))
                data[key.value] = self.value(item, inside)
        for other in merged:
            if not isinstance(other, yaml.MappingNode):
                self._wrong(path, "<< takes a mapping or a list of them", other)
                continue
            for name, value in self.value(other, path).items():
                data.setdefault(name, value)
        return data


def _position(mark: yaml.Mark) -> tuple[int, int]:
    return mark.line + 1, mark.column + 1


def _override(override: str, data: dict[str, Any], places: dict[KeyPath, Place]) -> list[Mistake]:
    """Put ``key.sub=value`` into ``data``; mistakes when it fits nowhere."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    place = f"--set {dotted((name.strip(),))}"
    if not equals or not all(keys) or len(keys) > MAX_DEPTH // 2 or _NOT_TEXT.search(name):
        return [Mistake((), f"must be KEY=VALUE or KEY.SUB=VALUE {show(override)}", place)]
    try:
        given = parse(text, place)
    except ConfigError as error:
        return [Mistake((), f"the value is not YAML: {error.message.rpartition('not YAML: ')[2]}", place)]
    if given.mistakes:
        return [Mistake((), mistake.text, place) for mistake in given.mistakes]
    path = _put(data, keys, given.data)
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
            count = len(inside)
            if not re.fullmatch("[0-9]{1,6}", key) or int(key) > count:
                return f"{dotted(path)} is a list of {count}: say 0 to {count}, the last appends"
            step = int(key)
            if step == count:
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
