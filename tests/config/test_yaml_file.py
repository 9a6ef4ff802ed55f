import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.config.errors import Mistake
from quantool.config.yaml_file import YamlDocument, _override, parse, read
from quantool.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Write":
    monkeypatch.chdir(tmp_path)
    return Write()


class Write:
    def __call__(self, text: str | bytes, *overrides: str) -> YamlDocument:
        raw = text if isinstance(text, bytes) else text.encode()
        Path("c.yaml").write_bytes(raw)
        return read(Path("c.yaml"), overrides)


def fails(write: Write, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        write(text)
    return caught.value.message


def one_line(error: ConfigError) -> None:
    assert "\n" not in error.message


def told(document: YamlDocument) -> list[str]:
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
        ("a: !!int 1:30\n", "1:4", "does not fit '1:30'"),
        ("a: !!null x\n", "1:4", "does not fit 'x'"),
        ("a: !!int ''\n", "1:4", "does not fit"),
        ('a: "\\U00110000"\n', "1:7", "no character or number: chr() arg"),
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
    assert "more than 100000 values (aliases without end?)" in fails(write, "\n".join(lines))


@pytest.mark.parametrize("closed", [True, False])
def test_nested_too_deeply(write: Write, closed: bool) -> None:
    text = "a: " + "[" * 20_000 + "]" * 20_000 * closed
    assert fails(write, text) == "c.yaml:1:67: not YAML: nested more than 64 deep"


def test_aliases_that_nest(write: Write) -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 200))]
    assert "without end" in fails(write, "\n".join(lines))


@pytest.mark.parametrize(
    "text", ["1:30", "-1:30", "1:30.5", "010", "0o17", "190:20:30", "2024-13-45", "1_0:00"]
)
def test_what_yaml_1_1_takes_for_another_number_is_text(write: Write, text: str) -> None:
    assert write(f"a: {text}").data == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("-12", -12), ("+7", 7), ("1_000", 1000), ("0x1F", 31), ("0b11", 3), ("2.5", 2.5), ("-.5", -0.5), ("1.", 1.0),
        ("1e3", 1000.0), ("1.5e-2", 0.015), ("1_0.5", 10.5), ("e3", "e3"), ("1e", "1e"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_numbers(write: Write, text: str, value: object) -> None:
    found = write(f"a: {text}").data["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("number", ["0x" + "f" * 6000, "1" * 6000, "-" + "9" * 30, "!!int " + "1" * 5000])
def test_numbers_without_end(write: Write, number: str) -> None:
    (line,) = told(write(f"seed: {number}"))
    assert line.startswith("c.yaml:1:")
    assert "at most 18 digits" in line
    assert len(line) < 130


@pytest.mark.parametrize(
    ("text", "character"),
    [(r'a: "x\0y"', "0x0000"), (r'a: "\ud800"', "0xd800"), (r'a: ["\uDFFF"]', "0xdfff")],
)
def test_characters_that_no_file_name_can_have(write: Write, text: str, character: str) -> None:
    (line,) = told(write(text))
    assert f"the character {character} cannot stand in text" in line
    assert told(write(r'"a\0": 1'))[0].startswith("c.yaml:1:1: the key a")


def test_a_file_that_is_no_configuration_is_refused_at_once(write: Write) -> None:
    assert fails(write, "a: 1\n" * 10_000_000) == "c.yaml: is longer than 1,048,576 bytes"


def test_messages_stay_one_line(write: Write) -> None:
    long = write('"a\\nb": 1\n"a\\nb": 2\n' + "k" * 900 + ": .nan\n")
    lines = told(long)
    assert len(lines) == 2
    assert lines[0].startswith(r'c.yaml:2:1: "a\nb": duplicate key')
    assert len(lines[1]) < 150
    assert len(fails(write, "a: *" + "x" * 5000)) < 300


@pytest.mark.parametrize(
    ("text", "hint"), [("a: 1\n---\nb: 1\n", "a file is one document"), ("a: b: c", "put quotes around")]
)
def test_hints(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "x")
    assert caught.value.hint.startswith(hint)


WORDS = st.sampled_from([*"[]{}:,-?&*!|>'\"%@`#\n\t 01.e", "a", "a: ", "- ", "<<", "&x ", "*x ", "!!int ", "!!float ", "\\0", "\ud800",
    "1:30", "0x", "---", "...", "~", "\\U00110000", "%YAML 1.1", "=", "\u0085", "\x07"])  # fmt: skip


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=25).map("".join))
def test_any_text_is_data_or_a_config_error(text: str) -> None:
    try:
        document = parse(text, "x")
    except ConfigError as error:
        one_line(error)
        return
    assert document.mistakes or document.data == json.loads(json.dumps(document.data))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(WORDS, max_size=12).map("".join))
def test_any_override_fits_or_is_a_mistake(text: str) -> None:
    data: dict[str, Any] = {"a": [1, {"b": 2}], "c": "x"}
    for override in (text, f"a={text}", f"a.1.b={text}", f"{text}=1"):
        for mistake in _override(override, data, {}):
            assert "\n" not in mistake.text


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
        (
            "list." + "9" * 5000 + "=1",
            "--set list." + "9" * 54 + "…: list is a list of 1: say 0 to 1, the last appends",
        ),
        ("list.²=1", "--set list.²: list is a list of 1: say 0 to 1, the last appends"),
        ("b=1\n---\n2", "--set b: the value is not YAML: but found another document"),
        ("list.2=1", "--set list.2: list is a list of 1: say 0 to 1, the last appends"),
        ("b={1: 2}", "--set b: the key 1 is not text; put it in quotes"),
        ("b=.nan", "--set b: must be a finite number (value .nan)"),
    ],
)
def test_overrides_that_fit_nowhere(write: Write, override: str, line: str) -> None:
    assert told(write("a: 1\nlist: [x]\n", override)) == [line]


def test_an_override_of_three_thousand_parts(write: Write) -> None:
    (line,) = told(write("a: 1\n", ".".join("k" * 3000) + "=1"))
    assert "must be KEY=VALUE or KEY.SUB=VALUE" in line
    assert len(line) < 220


def test_an_override_that_is_not_yaml(write: Write) -> None:
    (line,) = told(write("a: 1\n", "a=[1"))
    assert line.startswith("--set a: the value is not YAML: ")


def test_mistakes_are_in_the_order_of_the_file_and_told_once(write: Write) -> None:
    document = write("a: 1\nb: 2\n", "c=3")
    mistakes = [Mistake(("c",), "z"), Mistake(("b",), "y"), Mistake(("a",), "x"), Mistake(("b",), "y")]
    assert document.error(mistakes).message.splitlines() == [
        "c.yaml:1:1: a: x",
        "c.yaml:2:1: b: y",
        "--set c: z",
    ]
