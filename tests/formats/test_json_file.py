from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import SourceError
from quantool.formats.json_file import (
    DEPTH,
    TOKENIZER,
    JsonError,
    JsonLimits,
    brief,
    check_bounds,
    parse_json,
    read_json,
    read_optional,
    require_bounded,
)

TEXT = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**39), 10**39) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_what_python_writes_is_read(value: Any, indent: int | None, escaped: bool) -> None:
    assert parse_json(json.dumps(value, indent=indent, ensure_ascii=escaped).encode()) == value


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}",:\\u0d8019.eE+-tfn', max_size=60).map(str.encode))
def test_any_bytes_are_a_value_or_a_json_error(content: bytes) -> None:
    with contextlib.suppress(JsonError):
        json.dumps(parse_json(content, JsonLimits(unique=True, finite=True)), ensure_ascii=False).encode()


def nested(depth: int) -> bytes:
    return b'{"a":[' * (depth // 2) + b"]}" * (depth // 2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (nested(DEPTH + 2), "nested more than 64 deep"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"a":' * 100_000, "nested more than 64 deep"),
        (b"[[]," * 70 + b"]" * 70, "nested more than 64 deep"),
        (b"9" * 5000, "a number of more than 40 digits"),
        (b"-" + b"1" * 41, "a number of more than 40 digits"),
        (b"0." + b"1" * 2000, "a number of more than 1000 digits"),
        (b"[" + b"0," * 200 + b"0]", "more than 100 values"),
        (b'"a" ' * 300, "more than 100 values"),
        (b'"' + b"x" * 3000 + b'"', "3,002 bytes of JSON, at most 3,000 are read"),
        (b'"\\ud800"', "is half of a character"),
        (b'{"\\uDFFF": 1}', "is half of a character"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"NaN", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"1e999", "the number '1e999' is too large"),
        (b"\xff", "not UTF-8"),
        (b'{"a" 1}', "not JSON: Expecting ':' delimiter"),
        (b"", "not JSON"),
    ],
)
def test_each_limit(content: bytes, problem: str) -> None:
    limits = JsonLimits(unique=True, finite=True)
    if "values" in problem or "bytes" in problem:
        limits = replace(limits, bytes=3000, values=100)
    with pytest.raises(JsonError, match=problem):
        parse_json(content, limits)


def test_what_is_inside_strings_does_not_count() -> None:
    text = json.dumps({"a": "[" * 200 + '"\\' + "7" * 200, "b": "\\"})
    check_bounds(text.encode(), JsonLimits(values=300))
    assert parse_json(nested(DEPTH)) is not None
    assert parse_json('"\\ud83d\\ude00 é"'.encode()) == "😀 é"
    assert parse_json(b"0." + b"3" * 60) == pytest.approx(1 / 3)


def test_the_bounds_of_hostile_text_are_found_in_linear_time() -> None:
    started = time.process_time()
    for content in (b'"\\"' * 500_000, b'"' + b'\\"' * 700_000, b"[]" * 700_000, nested(60) * 10_000):
        with contextlib.suppress(JsonError):
            check_bounds(content, JsonLimits(bytes=1 << 26, values=20_000_000))
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{\n "a": 1,,\n}', r"c\.json:2:9: not JSON"),
        (b"\xff", r"c\.json: not UTF-8"),
        (b"[]", r"c\.json:1:1: not a JSON object"),
        (b'{"a":' + b"[" * 2000, r"c\.json: nested more than 64 deep"),
    ],
)
def test_a_file_names_the_place(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(SourceError, match=said):
        read_json(tmp_path / "c.json")


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(SourceError, match=f"{name}.json is not a file"):
            read_json(tmp_path / f"{name}.json")
    with pytest.raises(SourceError, match="is missing"):
        read_json(tmp_path / "none.json")
    assert read_optional(tmp_path / "none.json") == {}
    (tmp_path / "c.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "c.json") == {"a": 1}
    with pytest.raises(SourceError, match=r"has 11 bytes, at most 4 are read"):
        read_json(tmp_path / "c.json", JsonLimits(bytes=4))


def test_a_file_for_another_library_is_bounded_and_utf8(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"vocab": {"a": 0}}}')
    assert require_bounded(path) == path.read_bytes()
    for content, said in ((b'{"\xff": 1}', "not UTF-8"), (nested(100), "nested"), (b"[" * 9, "")):
        path.write_bytes(content)
        if said:
            with pytest.raises(SourceError, match=rf"tokenizer\.json: {said}"):
                require_bounded(path)
        else:
            require_bounded(path, TOKENIZER)  # its own library says what is wrong with it


def test_brief() -> None:
    assert brief("a\nb") == "'a\\nb'"
    assert len(brief("x" * 1000)) == 60
