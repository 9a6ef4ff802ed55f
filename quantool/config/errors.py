"""Mistakes of a configuration in words: where, what, the value, and the nearest valid one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from quantool.errors import nearest

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the document."""

Place = tuple[int, int] | str
"""Line and column, both from 1, or the override that set the value: ``--set key.sub``."""

_FEW = 14  # a list of known names up to this long is shown when none of them is near

_WORDS = {
    "missing": "missing",
    "path_type": "must be a path",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a mapping"),
}
_BOUNDS = {
    "greater_than_equal": ("ge", "must be at least {}"),
    "greater_than": ("gt", "must be more than {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "less_than": ("lt", "must be less than {}"),
    "string_pattern_mismatch": ("pattern", "must match {}"),
    "literal_error": ("expected", "must be {}"),
    "value_error": ("error", "{}"),
}


@dataclass(frozen=True)
class Mistake:
    """Something wrong at ``path``; ``place`` is given when the document does not know the path's."""

    path: KeyPath
    text: str
    place: Place | None = None


def dotted(path: KeyPath) -> str:
    """``("quantizations", 0, "method")`` as ``quantizations.0.method``, on one line and not endless."""
    keys = (key if key.isprintable() else json.dumps(key) for key in map(str, path))
    return ".".join(key if len(key) <= 60 else f"{key[:59]}…" for key in keys)


def line_of(text: str, position: int) -> tuple[int, int]:
    """Line and column, from 1, of a character."""
    before = text[:position]
    return before.count("\n") + 1, position - before.rfind("\n")


def show(value: Any) -> str:
    """``(value …)`` as YAML has it, cut to 60 characters; a Hub token is never shown."""
    text = json.dumps(value, ensure_ascii=False)
    text = re.sub(r"hf_\w{6,}", "hf_…", text)
    return f"(value {text if len(text) <= 60 else text[:59] + '…'})"


def suggest(value: str, known: Sequence[str]) -> str:
    """What is nearest to ``value``, else all of ``known`` when few, as the end of a sentence."""
    near = nearest(value, list(known))
    if near:
        return f"; {near}"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= _FEW else ""


def explain(
    model: type[BaseModel],
    data: Any,
    prefix: KeyPath = (),
    homes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Mistake]:
    """Validate ``data`` (JSON values) as an instance of ``model`` and say what is wrong; nothing when all is well.

    ``prefix`` is where ``data`` stands in the document, ``homes`` where keys belong that stand in the wrong place.
    Of a union's members only those that got furthest count.
    """
    located = [(*_locate(item, data), item) for item in _invalid(model, data)]
    furthest = {
        union: max(len(path) for path, other, _ in located if other == union) for _, union, _ in located
    }
    texts: dict[KeyPath, list[str]] = {}
    for path, union, item in located:
        if union is None or len(path) == furthest[union]:
            texts.setdefault(path, []).append(_text(item, path, model, homes))
    return [Mistake(prefix + path, _joined(lines, *_value(data, path))) for path, lines in texts.items()]


def _invalid(model: type[BaseModel], data: Any) -> list[Any]:
    """List pydantic's errors, scalars taken strictly: ``"3"`` is no number and 1 is not true.

    Lists are not: behind a validator that runs before, pydantic's strict mode refuses a list where a tuple is wanted.
    """
    loose, strict = (_errors(model, json.dumps(data), strict=strict) for strict in (False, True))
    wrong = {item["loc"] for item in loose}
    kept = [
        item for item in strict if item["loc"] in wrong or not isinstance(item["input"], (list, tuple, dict))
    ]
    return [*kept, *(item for item in loose if item["loc"] not in {item["loc"] for item in kept})]


def _errors(model: type[BaseModel], text: str, *, strict: bool) -> list[Any]:
    try:
        model.model_validate_json(text, strict=strict)
    except ValidationError as error:
        return list(error.errors(include_url=False))
    return []


def models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The models that the annotations of ``model`` allow at ``path``."""
    kinds: list[Any] = [model]
    for key in path:
        kinds = [member for kind in kinds for inner in _inside(kind, key) for member in _members(inner)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _inside(kind: Any, key: str | int) -> list[Any]:
    """The type that ``kind`` allows under ``key``; nothing when it has no such key."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(key))
        return [] if field is None else [field.annotation]
    items = [item for item in get_args(kind) if item is not Ellipsis]
    return [] if get_origin(kind) is Literal else items[-1:]


def _members(kind: Any) -> list[Any]:
    """The types of a union, annotations opened."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [inner for member in get_args(kind) for inner in _members(member)]
    return [kind]


def _locate(item: Any, data: Any) -> tuple[KeyPath, KeyPath | None]:
    """The path in ``data``, and where a union stands in it: pydantic puts the names of its members into ``loc``."""
    path: KeyPath = ()
    union: KeyPath | None = None
    for index, key in enumerate(item["loc"]):
        holds = _value(data, (*path, key))[1]
        if holds or (item["type"] == "missing" and index == len(item["loc"]) - 1):
            path = (*path, key)
        elif union is None:
            union = path
    return path, union


def _value(data: Any, path: KeyPath) -> tuple[Any, bool]:
    """What stands at ``path``, and whether anything does."""
    for key in path:
        if not (
            key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
        ):
            return None, False
        data = data[key]
    return data, True


def _text(item: Any, path: KeyPath, model: type[BaseModel], homes: Mapping[str, Sequence[str]]) -> str:
    kind, owners = item["type"], models_at(model, path[:-1])
    if kind == "extra_forbidden":
        key, known = str(path[-1]), [name for owner in owners for name in owner.model_fields]
        if key not in homes:
            return f"unknown key{suggest(key, known)}"
        near = get_close_matches(key, known, n=1, cutoff=0.6)
        return f"unknown key here; did you mean {' or '.join([*near, *homes[key]])}?"
    if kind == "string_type":
        fields = [owner.model_fields.get(str(path[-1])) for owner in owners] if path else []
        defaults = [field.default for field in fields if field and isinstance(field.default, str)]
        return f'must be text such as "{defaults[0]}"' if defaults else "must be text"
    if kind in _WORDS:
        return _WORDS[kind]
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        limit = item["ctx"][bound]
        text = words.format(f"{limit:g}" if isinstance(limit, float) else limit)
        known = re.findall(r"'([^']*)'", str(limit)) if kind == "literal_error" else []
        near_one = nearest(item["input"], known) if isinstance(item["input"], str) else ""
        return f"{text}; {near_one}" if near_one else text
    message = str(item["msg"])
    return f"must {message.removeprefix('Input should ')}" if message.startswith("Input should ") else message


def _joined(texts: list[str], value: Any, given: bool) -> str:
    """``must be text or a list (value 3); did you mean …?``."""
    parts = [text.partition("; ") for text in texts]
    heads = list(dict.fromkeys(head for head, _, _ in parts))
    tails = list(dict.fromkeys(tail for _, _, tail in parts if tail))
    start = "must be "
    together = ", ".join(heads)
    if all(head.startswith(start) for head in heads):
        together = start + " or ".join(head.removeprefix(start) for head in heads)
    if given:
        together += f" {show(value)}"
        example = any("such as" in head for head in heads)  # shows what is meant: a number in quotes is not
        word = isinstance(value, bool if example else (bool, int, float))
        if word and any(head.startswith(("must be text", "must be a path")) for head in heads):
            tails.append("put it in quotes if it is a word")
    return "; ".join([together, *tails])
