"""Records as they may leave this machine: what is marked as its own is dropped, of every path the last part stays.

The types decide, not the names of keys: a ``Path`` is a path wherever it stands, and ``record.Privacy`` marks the rest.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quantool.config.schema import Config
from quantool.plugins import find
from quantool.record import Privacy, Record
from quantool.records import Plan

OPTIONS = ("options", "quantization_config")
"""Fields without a type of their own, beside a field ``method`` that says whose options they are."""


def published(record: Record) -> dict[str, Any]:
    """The record as JSON values, without folders and state of this machine: a rerun elsewhere writes the same."""
    return _fields(record.model_dump(mode="json"), type(record))


def published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a plan holds it (what the user set), likewise."""
    return _fields(config, Config)


def _fields(value: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    kept = {}
    for name, entry in value.items():
        field = model.model_fields[name]
        if Privacy.DROPPED not in field.metadata:
            kept[name] = _of_type(entry, _type_of(model, name, field, value))
    return kept


def _type_of(model: type[BaseModel], name: str, field: FieldInfo, value: Mapping[str, Any]) -> Any:
    """The annotation, marks included; of a dictionary whose content another type describes, that type."""
    if model is Plan and name == "config":
        return Config
    if name in OPTIONS and value.get("method") in find.names("methods"):
        return find.find_method(value["method"]).options
    kind: Any = field.annotation
    for mark in field.metadata:
        kind = Annotated[kind, mark]
    return kind


def _of_type(value: Any, kind: Any) -> Any:
    """``value``, a JSON value, as one of ``kind`` may leave."""
    kinds = _alternatives(kind)
    if isinstance(value, str):
        is_path = any(entry is Privacy.NAMED or _is(entry, PurePath) for entry in kinds)
        return _last_part(value) if is_path else value
    if isinstance(value, Mapping):
        model = next((entry for entry in kinds if _is(entry, BaseModel)), None)
        if model is not None:
            return _fields(value, model)
        inner = next((get_args(entry)[1] for entry in kinds if get_origin(entry) is dict), Any)
        return {key: _of_type(entry, inner) for key, entry in value.items()}
    if isinstance(value, Sequence):
        inner = next((get_args(entry)[0] for entry in kinds if get_origin(entry) in (tuple, list)), Any)
        return [_of_type(entry, inner) for entry in value]
    return value


def _alternatives(kind: Any) -> list[Any]:
    """The types of a union and the marks on them, each by itself."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *marks = get_args(kind)
        return [*_alternatives(inner), *(mark for mark in marks if isinstance(mark, Privacy))]
    if origin in (Union, types.UnionType):
        return [entry for arm in get_args(kind) for entry in _alternatives(arm)]
    return [kind]


def _is(kind: Any, parent: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, parent)


def _last_part(text: str) -> str:
    """The name alone of a path that begins at the root or at home, or leads upwards; any other as it is."""
    path = Path(text)
    return path.name if path.is_absolute() or text.startswith("~") or ".." in path.parts else text
