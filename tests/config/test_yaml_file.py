from pathlib import Path

import pytest

from quantool.config.errors import Mistake
from quantool.config.yaml_file import Document, read
from quantool.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Write":
    monkeypatch.chdir(tmp_path)
    return Write()


class Write:
    def __call__(self, text: str | bytes, *overrides: str) -> Document:
        raw = text if isinstance(text, bytes) else text.encode()
        Path("c.yaml").write_bytes(raw)
        return read(Path("c.yaml"), overrides)


def fails(write: Write, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        write(text)
    return caught.value.message


def told(document: Document) -> list[str]:
    return document.error(document.mistakes).message.splitlines()


def test_data_and_places(write: Write) -> None:
    document = write("a: 1\nb:\n  c: [x, 2.5]\n  d:\n    - e: null\n      f: true\n")
    assert document.data == {"a": 1, "b": {"c": ["x", 2.5], "d": [{"e": None, "f": True}]}}
    assert document.place(("a",)) == (1, 1)
    assert document.place(("b", "c")) == (3, 3)
    assert document.place(("b", "c", 1)) == (3, 10)
    assert document.place(("b", "d", 0, "f")) == (6, 7)


def test_what_is_not_written_down_stands_where_its_parent_does(write: Write) -> None:
    document = write("a: 1\nb:\n  c: 2\n")
    assert document.place(("b", "missing", 0)) == (2, 1)
    assert document.place(("missing",)) == (1, 1)


def test_dates_are_text_and_exponents_are_numbers(write: Write) -> None:
    document = write("revision: 2024-01-31\nlimit: 1e-3\nother: -2E+2\nhash: 1e3f\n")
    assert document.data == {"revision": "2024-01-31", "limit": 0.001, "other": -200.0, "hash": "1e3f"}


def test_anchors_and_merges(write: Write) -> None:
    document = write("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\nc: *a\nd: {<<: [*a, {z: 4}]}\n")
    assert document.data["b"] == {"x": 3, "y": 2}
    assert document.data["c"] == document.data["a"] == {"x": 1, "y": 2}
    assert document.data["d"] == {"x": 1, "y": 2, "z": 4}
    assert document.place(("b", "x")) == (4, 3)
    assert not document.mistakes


def test_merge_of_something_else(write: Write) -> None:
    assert told(write("a: {<<: 3}")) == ["c.yaml:1:9: a: << takes a mapping or a list of them"]


def test_byte_order_mark_is_no_part_of_the_first_key(write: Write) -> None:
    document = write(b"\xef\xbb\xbfa: 1\n")
    assert document.data == {"a": 1}
    assert document.place(("a",)) == (1, 1)


def test_duplicate_keys_are_told_with_both_places(write: Write) -> None:
    document = write("a: 1\nb: {c: 1, c: 2}\na: 3\n")
    assert document.data == {"a": 1, "b": {"c": 1}}
    assert told(document) == [
        "c.yaml:2:11: b.c: duplicate key; it stands in line 2, column 5 already",
        "c.yaml:3:1: a: duplicate key; it stands in line 1, column 1 already",
    ]


@pytest.mark.parametrize("key", ["no", "1", "~", "2.5"])
def test_keys_that_are_not_text(write: Write, key: str) -> None:
    assert told(write(f"a: 1\n{key}: 1\n")) == [f"c.yaml:2:1: the key {key} is not text; put it in quotes"]


def test_keys_that_are_lists(write: Write) -> None:
    assert "is not text" in told(write("? [a, b]\n: 1\n"))[0]


@pytest.mark.parametrize(
    "text", ["a: !!python/name:os.system ''", "a: !!binary aGk=", "a: !mine 3", "a: !!set {x}"]
)
def test_tags_without_meaning(write: Write, text: str) -> None:
    (line,) = told(write(text))
    assert line.startswith("c.yaml:1:1: a: the YAML tag ")


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "1e999"])
def test_numbers_that_are_not_finite(write: Write, number: str) -> None:
    assert told(write(f"a: {number}")) == [f"c.yaml:1:1: a: must be a finite number (value {number})"]


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("a: [1, 2\nb: 3\n", "2:2", "expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "2:1", "a tab"),
        ("a: b: c\n", "1:5", "mapping values are not allowed"),
        ("a: *x\n", "1:4", "undefined alias"),
        ("a: 1\n---\nb: 2\n", "2:1", "another document"),
        ("a: 'x\n", "2:1", "end of stream"),
        ("a: 1\nb: x\x07\n", "2:5", "control character 0x07"),
        ("a: !!int x\n", "1:4", "does not fit"),
        ("a: !!bool x\n", "1:4", "does not fit"),
        ("a: &a [*a]\n", "1:4", "aliases without end"),
        ("a: &a {<<: *a}\n", "1:4", "aliases without end"),
    ],
)
def test_not_yaml(write: Write, text: str, place: str, word: str) -> None:
    message = fails(write, text)
    assert message.startswith(f"c.yaml:{place}: not YAML: ")
    assert word in message


def test_tabs_get_advice(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        write("a:\n\tb: 2\n")
    assert caught.value.hint == "indent with spaces"


def test_aliases_that_multiply(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "aliases without end" in fails(write, "\n".join(lines))


def test_nested_too_deeply(write: Write) -> None:
    assert fails(write, "a: " + "[" * 2000 + "]" * 2000) == "c.yaml: nested too deeply"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml:1:1: the file is empty"),
        ("# only a comment\n", "c.yaml:1:1: the file is empty"),
        ("\n- a\n", 'c.yaml:2:1: a configuration is a mapping of keys (value ["a"])'),
        ("hello", 'c.yaml:1:1: a configuration is a mapping of keys (value "hello")'),
    ],
)
def test_not_a_mapping(write: Write, text: str, message: str) -> None:
    assert fails(write, text) == message


def test_not_utf8(write: Write) -> None:
    assert fails(write, "a: 1\nb: año".encode("latin-1")) == "c.yaml:2:5: byte 0xf1 is not UTF-8"


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="there is no such file") as caught:
        read(tmp_path / "quickstrat.yaml")
    assert caught.value.hint == "did you mean quickstart.yaml?"
    with pytest.raises(ConfigError, match="there is no such file"):
        read(tmp_path / "nowhere" / "x.yaml")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        read(tmp_path)


def test_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a: 1")
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        read(tmp_path / "x" / "y.yaml")


def test_overrides(write: Write) -> None:
    document = write(
        "a: 1\nlist: [{b: x}, y]\nnothing: null\n",
        "a=[1, two]",
        "list.0.b=false",
        "list.2=z",
        "new.sub.deep=1e-3",
        "nothing.there=",
        "e=x=y",
    )
    assert document.data == {
        "a": [1, "two"],
        "list": [{"b": False}, "y", "z"],
        "nothing": {"there": None},
        "new": {"sub": {"deep": 0.001}},
        "e": "x=y",
    }
    assert not document.mistakes
    assert document.place(("a", 1)) == "--set a"
    assert document.place(("list", 0, "b")) == "--set list.0.b"
    assert document.place(("list", 1)) == (2, 16)
    assert document.place(("new",)) == "--set new.sub.deep"


def test_an_override_hides_the_places_of_what_it_replaces(write: Write) -> None:
    document = write("a:\n  b: {c: 1}\n", "a.b={c: 2}")
    assert document.place(("a", "b", "c")) == "--set a.b"
    assert document.place(("a",)) == (1, 1)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("a", '--set a: must be KEY=VALUE or KEY.SUB=VALUE (value "a")'),
        ("=1", '--set : must be KEY=VALUE or KEY.SUB=VALUE (value "=1")'),
        ("a..b=1", '--set a..b: must be KEY=VALUE or KEY.SUB=VALUE (value "a..b=1")'),
        ("a.b=1", "--set a.b: a is not a mapping (value 1)"),
        ("list.x=1", "--set list.x: list is a list of 1: say 0 to 1, the last appends"),
        ("list.2=1", "--set list.2: list is a list of 1: say 0 to 1, the last appends"),
        ("b={1: 2}", "--set b: the key 1 is not text; put it in quotes"),
        ("b=.nan", "--set b: must be a finite number (value .nan)"),
    ],
)
def test_overrides_that_fit_nowhere(write: Write, override: str, line: str) -> None:
    assert told(write("a: 1\nlist: [x]\n", override)) == [line]


def test_an_override_that_is_not_yaml(write: Write) -> None:
    (line,) = told(write("a: 1\n", "a=[1"))
    assert line.startswith("--set a: the value is not YAML: ")


def test_mistakes_are_in_the_order_of_the_file_and_told_once(write: Write) -> None:
    document = write("a: 1\nb: 2\n", "c=3")
    mistakes = [Mistake(("c",), "z"), Mistake(("b",), "y"), Mistake(("a",), "x"), Mistake(("b",), "y")]
    assert document.error(mistakes).message.splitlines() == [
        "c.yaml:1:1: a: x",
        "c.yaml:2:1: b: y",
        "--set c: c: z",
    ]
