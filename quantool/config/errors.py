"""Mistakes of a configuration in words: where, what, the value, and the nearest valid one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
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
    "string_type": "must be text",
    "path_type": "must be a path",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "set_type": "must be a list",
    "frozen_set_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
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
    """Validate ``data`` (JSON values) as an instance of ``model`` and tell what is wrong; nothing when all is well.

    ``prefix`` is where ``data`` stands in the document, ``homes`` where keys belong that stand in the wrong place.
    Of a union's members only those that got furthest are told.
    """
    located = [(*_locate(item["loc"], item["type"], data), item) for item in _invalid(model, data)]
    unions: dict[KeyPath, int] = {}
    for path, union, _ in located:
        if union is not None:
            unions[union] = max(unions.get(union, 0), len(path))
    found: dict[KeyPath, list[str]] = {}
    for path, union, item in located:
        if union is None or len(path) == unions[union]:
            found.setdefault(path, []).append(_text(item, path, model, homes))
    return [Mistake(prefix + path, _joined(texts, _value(data, path))) for path, texts in found.items()]


def _invalid(model: type[BaseModel], data: Any) -> list[Any]:
    """List pydantic's errors, scalars taken strictly: ``"3"`` is no number and 1 is not true.

    Lists are not: behind a validator that runs before, pydantic's strict mode refuses a list where a tuple is wanted.
    """
    text = json.dumps(data)
    errors = []
    for strict in (False, True):
        try:
            model.model_validate_json(text, strict=strict)
        except ValidationError as error:
            errors.append(error.errors(include_url=False))
        else:
            errors.append([])
    loose, strict_ones = errors
    wrong = {item["loc"] for item in loose}
    told = [
        item
        for item in strict_ones
        if item["loc"] in wrong or not isinstance(item["input"], (list, tuple, dict))
    ]
    return [*told, *(item for item in loose if item["loc"] not in {item["loc"] for item in told})]


def models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The models that the annotations of ``model`` allow at ``path``."""
    kinds: list[Any] = [model]
    for key in path:
        kinds = [inner for kind in kinds for inner in _inside(kind, key)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _inside(kind: Any, key: str | int) -> Iterator[Any]:
    """The types that ``kind`` allows under ``key``, unions and annotations opened."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(key))
        if field is not None:
            yield from _members(field.annotation)
        return
    items = [item for item in get_args(kind) if item is not Ellipsis]
    if items and get_origin(kind) is not Literal:
        yield from _members(items[-1])


def _members(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Annotated:
        yield from _members(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            yield from _members(member)
    else:
        yield kind


def _locate(loc: Sequence[str | int], kind: str, data: Any) -> tuple[KeyPath, KeyPath | None]:
    """The path in ``data``, and where a union stands in it: pydantic puts the names of its members into ``loc``."""
    path: list[str | int] = []
    union: KeyPath | None = None
    for index, key in enumerate(loc):
        if _holds(data, key):
            path.append(key)
            data = data[key]
        elif kind == "missing" and index == len(loc) - 1:
            path.append(key)
        elif union is None:
            union = tuple(path)
    return tuple(path), union


def _holds(data: Any, key: str | int) -> bool:
    if isinstance(data, dict):
        return key in data
    return isinstance(data, list) and isinstance(key, int) and key < len(data)


def _value(data: Any, path: KeyPath) -> tuple[Any, bool]:
    for key in path:
        if not _holds(data, key):
            return None, False
        data = data[key]
    return data, True


def _text(item: Any, path: KeyPath, model: type[BaseModel], homes: Mapping[str, Sequence[str]]) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        key = str(path[-1])
        known = [name for owner in models_at(model, path[:-1]) for name in owner.model_fields]
        if key in homes:
            near = get_close_matches(key, known, n=1, cutoff=0.6)
            return f"unknown key here; did you mean {' or '.join([*near, *homes[key]])}?"
        return f"unknown key{suggest(key, known)}"
    if kind == "string_type" and (example := _example(model, path)):
        return f'must be text such as "{example}"'
    if kind in _WORDS:
        return _WORDS[kind]
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        limit = item["ctx"][bound]
        text = words.format(f"{limit:g}" if isinstance(limit, float) else limit)
        if kind == "literal_error" and isinstance(item["input"], str):
            known_one = nearest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
            text += f"; {known_one}" if known_one else ""
        return text
    message = str(item["msg"])
    return f"must {message.removeprefix('Input should ')}" if message.startswith("Input should ") else message


def _example(model: type[BaseModel], path: KeyPath) -> str | None:
    """The default of the field at ``path`` when it is a text, which shows what is meant."""
    fields = [owner.model_fields.get(str(path[-1])) for owner in models_at(model, path[:-1])] if path else []
    return next((field.default for field in fields if field and isinstance(field.default, str)), None)


def _joined(texts: list[str], value: tuple[Any, bool]) -> str:
    """``must be text or a list (value 3); did you mean …?``."""
    stems = [text.partition("; ") for text in texts]
    heads = list(dict.fromkeys(head for head, _, _ in stems))
    tails = list(dict.fromkeys(tail for _, _, tail in stems if tail))
    start = "must be "
    together = (
        start + " or ".join(head.removeprefix(start) for head in heads)
        if all(head.startswith(start) for head in heads)
        else ", ".join(heads)
    )
    if value[1]:
        together += f" {show(value[0])}"
        wanted_text = any(head.startswith(("must be text", "must be a path")) for head in heads)
        has_example = any("such as" in head for head in heads)
        if wanted_text and isinstance(value[0], bool if has_example else (bool, int, float)):
            tails.append("put it in quotes if it is a word")
    return "; ".join([together, *tails])
