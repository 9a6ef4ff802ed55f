"""JSON that somebody else wrote, read within limits of size, depth, count and digits; every mistake says where it is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import QuantoolError, SourceError

DEPTH = 64
"""Lists and objects inside each other."""
DIGITS = 40
"""Of a whole number: more than 128 bits have."""
FRACTION = 1000
"""Digits of any number."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_LONG_NUMBER = re.compile(rb"(?<![.\d])\d{%d}|\d{%d}" % (DIGITS + 1, FRACTION + 1))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_AS_LISTS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))


@dataclass(frozen=True)
class JsonLimits:
    """What a JSON text may be; Python needs at most 250 bytes of memory a value."""

    bytes: int = 1 << 24
    values: int = 1_000_000
    unique: bool = False
    """Whether a key that occurs twice is a mistake; JSON readers keep the last one without a word."""
    finite: bool = False
    """Whether NaN and numbers beyond float64 are mistakes; Python writes and reads them."""


SMALL = JsonLimits()
"""Configurations, tokenizer settings, records."""
TOKENIZER = JsonLimits(bytes=1 << 28, values=8_000_000)
"""tokenizer.json, vocab.json: vocabularies and merges."""
TENSORS = JsonLimits(bytes=100_000_000, values=2_000_000, unique=True)
"""Headers and indexes of safetensors; the bytes are the limit of the safetensors library."""


class JsonError(ValueError):
    """Why a text is not JSON within its limits; ``line`` and ``column`` from 1 where the place is known."""

    def __init__(self, problem: str, line: int = 0, column: int = 0) -> None:
        super().__init__(problem)
        self.line, self.column = line, column

    @property
    def place(self) -> str:
        """``:LINE:COLUMN``, or nothing."""
        return f":{self.line}:{self.column}" if self.line else ""


def check_bounds(content: bytes, limits: JsonLimits = SMALL) -> None:
    """Raise JsonError unless ``content`` can be parsed without harm; linear in its length, nothing is parsed.

    Python's own parser ends deep nesting with RecursionError, makes numbers that cannot be printed, and needs up to 24
    times the text's memory.
    """
    if len(content) > limits.bytes:
        raise JsonError(f"{len(content):,} bytes of JSON, at most {limits.bytes:,} are read")
    values = sum(map(content.count, (b",", b"[", b"{")))
    if values > limits.values or content.count(b'"') > 4 * limits.values:
        raise JsonError(f"more than {limits.values:,} values")
    bare = _STRING.sub(b"", content)
    nested = bare.translate(_AS_LISTS, _NO_BRACKETS)
    for _ in range(DEPTH):
        nested = nested.replace(b"[]", b"")
    if b"[]" in nested or nested.count(b"[") > DEPTH:
        raise JsonError(f"nested more than {DEPTH} deep")
    if long := _LONG_NUMBER.search(bare):
        raise JsonError(f"a number of more than {len(long[0]) - 1} digits")


def parse_json(content: bytes, limits: JsonLimits = SMALL) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark; JsonError when it is none."""
    check_bounds(content, limits)
    try:
        value = json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=_unique if limits.unique else None,
            parse_constant=_refuse_constant if limits.finite else None,
            parse_float=_finite if limits.finite else None,
        )
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON: {error.msg}", error.lineno, error.colno) from error
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise JsonError(f"\\u{ord(half):x} is half of a character, the other half is missing") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JsonError(f"{brief(twice)} occurs twice")
    return entries


def _refuse_constant(name: str) -> Any:
    raise JsonError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise JsonError(f"the number {brief(text)} is too large")
    return value


def read_bounded(path: Path, most: int, kind: type[QuantoolError] = SourceError) -> bytes:
    """The bytes of a file, at most ``most``; ``kind`` when it is missing, no file, longer, or cannot be read."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise kind(f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError as error:
        raise kind(f"{path} is missing") from error
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror}") from error
    if len(content) > most:
        raise kind(f"{path} has {path.stat().st_size:,} bytes, at most {most:,} are read")
    return content


def read_json(path: Path, limits: JsonLimits = SMALL) -> dict[str, Any]:
    """A JSON object; SourceError naming the file, and line and column where they are known, when it is none."""
    content = read_bounded(path, limits.bytes)
    try:
        value = parse_json(content, limits)
    except JsonError as error:
        raise SourceError(f"{path}{error.place}: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}:1:1: not a JSON object")
    return value


def read_optional(path: Path, limits: JsonLimits = SMALL) -> dict[str, Any]:
    """Like ``read_json``; an empty object when the file is not there."""
    return read_json(path, limits) if path.exists() else {}


def require_bounded(path: Path, limits: JsonLimits = TOKENIZER) -> bytes:
    """The bytes of a large JSON file that another library will parse; SourceError where it would come to harm."""
    content = read_bounded(path, limits.bytes)
    try:
        check_bounds(content, limits)
        content.decode("utf-8")
    except (JsonError, UnicodeDecodeError) as error:
        problem = (
            f"not UTF-8: {error.reason} at byte {error.start}"
            if isinstance(error, UnicodeDecodeError)
            else error
        )
        raise SourceError(f"{path}: {problem}") from error
    return content


def brief(value: object, most: int = 60) -> str:
    """``value`` as Python writes it, cut to ``most`` characters: for messages that stay one line."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
