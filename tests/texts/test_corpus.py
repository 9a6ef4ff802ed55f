import ast
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.config.schema import Config, Corpus, Validation
from quantool.errors import ConfigError, SourceError
from quantool.formats.json_file import JsonLimits
from quantool.texts import corpus as texts
from quantool.texts import readers
from quantool.texts.corpus import Document
from quantool.texts.readers import BUILT_IN, docstrings

SENTENCE = "A sentence that is long enough to be worth reading"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path, **fields: Any) -> tuple[Document, ...]:
    return texts.read(Corpus(name="c", path=path, **fields))


def one_line(error: ConfigError) -> None:
    assert "\n" not in error.message


def config(**fields: Any) -> Config:
    return Config(model_id="m", **fields)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffuno\n\ndos\n", encoding="utf-8")
    assert read(path) == (Document(text="uno\n\ndos\n"),)


def test_reading_stops_at_the_characters_needed(tmp_path: Path) -> None:
    long = tmp_path / "a.txt"
    long.write_text("x" * 100)
    many = lines(tmp_path / "a.jsonl", *({"text": "x" * 10} for _ in range(10)))
    assert texts.read(Corpus(name="c", path=long), characters=30) == (Document(text="x" * 30),)
    assert len(texts.read(Corpus(name="c", path=many), characters=30)) == 3


def test_lines_hold_texts_or_conversations(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "uno"}, "", CHAT, '"dos"')
    first, chat, last = read(path)
    assert (first.text, last.text) == ("uno", "dos")
    assert list(chat.messages) == CHAT["messages"]
    assert list(chat.tools) == CHAT["tools"]


def test_field_names_the_column(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})
    assert read(path, field="body") == (Document(text="yes"),)


def test_parquet_rows_lose_the_nulls_of_other_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([CHAT, {"messages": [{"role": "user", "content": "x"}]}]), path)
    first, second = read(path)
    assert list(first.messages) == CHAT["messages"]
    assert second.messages == ({"role": "user", "content": "x"},)
    assert second.tools == ()


@pytest.mark.e2e
def test_a_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", {"text": "uno"}, {"text": "dos"})
    found = texts.read(Corpus(name="c", dataset=str(folder)), cache_dir=tmp_path / "cache")
    assert [document.text for document in found] == ["uno", "dos"]
    with pytest.raises(ConfigError, match="cannot be loaded"):
        texts.read(Corpus(name="c", dataset=str(folder), split="absent"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', r"line 2 has no column 'text' or 'messages'; it has 'body'"),
        ('{"text": "a"}\n[1]\n', "line 2 is a list"),
        ('{"text": null}\n', "text is null"),
        ('{"messages": [{"content": "x"}]}\n', "line 1: messages: a message has no role"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "[}"}\n', "line 1: tools is not JSON"),
        ('\n{"text": ""}\n', "is empty"),
        ("", "is empty"),
        ("\n" * 1000, "is empty"),
        ('{"text": " \\u0000 \\n"}\n', "is empty"),
        ('{"text": ' + "[" * 5000, "line 1: nested more than 64 deep"),
        ('{"text": ' + "9" * 5000 + "}", "line 1: a number of more than 40 digits"),
        ('{"text": "a"}\n{"text": "\\ud800"}\n', r"line 2: \\ud800 is half of a character"),
        (
            '{"messages": [{"role": 1, "content": "x"}]}',
            "line 1: messages: a message has the role 1, not a text",
        ),
        ('{"messages": [{"role": " ", "content": "x"}]}', "has the role ' ', not a text"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "of the role 'user' has the content None, not a text",
        ),
        ('{"messages": [{"role": "user", "content": 3}]}', "has the content 3, not a text"),
        ('{"messages": [{"role": "user", "content": [3]}]}', r"has the content \[3\], not a text"),
        (
            '{"messages": [{"role": "user", "content": "x"}], "tools": "' + "[" * 5000 + '"}',
            "tools is not JSON: nested more than 64 deep",
        ),
        ('{"' + "k" * 5000 + '": 1}', "has no column 'text' or 'messages'; it has 'kkk[k]{50,60}…$"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    (tmp_path / "a.parquet").write_bytes(b"PAR?")
    (tmp_path / "a.csv").touch()
    lines(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8: .* at byte 2"):
        read(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="not a parquet file"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.csv is not a text"):
        read(tmp_path / "a.csv")
    with pytest.raises(ConfigError, match=r"there is no file .*absent\.txt"):
        read(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="no column 'body'; it has 'text'"):
        read(tmp_path / "a.jsonl", field="body")
    with pytest.raises(ConfigError, match="plain text and has no column"):
        read(tmp_path / "a.txt", field="body")


@pytest.mark.parametrize("content", [" \n\t\n" * 50, "\0" * 50, "\n", "\0 \n"])
def test_a_text_without_a_character_to_read_is_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ConfigError, match="is empty"):
        read(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="is empty"):
        texts.calibration(config(dataset_path=tmp_path / "a.txt"))


def test_a_file_of_newlines_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_EMPTY", 1000)
    (tmp_path / "a.jsonl").write_text("\n" * 1500)
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1001 is empty like 1,000 others"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="line 1001 is empty"):
        texts.calibration(config(dataset_path=tmp_path / "a.jsonl"))
    monkeypatch.setattr(texts, "MAX_EMPTY", 1000)
    lines(tmp_path / "a.jsonl", *({"text": " "} for _ in range(1500)))
    with pytest.raises(ConfigError, match="line 1001 is empty"):
        read(tmp_path / "a.jsonl")


def test_texts_have_a_longest_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROW", JsonLimits(bytes=100))
    monkeypatch.setattr(readers, "MAX_TEXT", 100)
    path = lines(tmp_path / "a.jsonl", {"text": "x"}, {"text": "x" * 100})
    with pytest.raises(ConfigError, match="line 2 is longer than 100 bytes"):
        read(path)
    (tmp_path / "a.txt").write_text("x" * 101)
    with pytest.raises(ConfigError, match="has 101 bytes, at most 100 are read"):
        read(tmp_path / "a.txt")


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(
        st.binary(max_size=20)
        | st.text('[]{}",:\\u0d8019', max_size=20).map(str.encode)
        | st.dictionaries(
            st.sampled_from(["text", "messages", "tools", "body"]),
            st.recursive(
                st.none() | st.integers() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=2)
                    | st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), inner, max_size=3)
                ),
                max_leaves=5,
            ),
        ).map(lambda row: json.dumps(row).encode()),
        max_size=3,
    )
)
def test_any_lines_are_documents_or_a_config_error(rows: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(b"\n".join(rows))
        try:
            documents = read(path)
        except ConfigError as error:
            one_line(error)
            return
    assert all(isinstance(document.text, str) for document in documents)
    json.dumps([document.messages for document in documents], ensure_ascii=False).encode()


def test_a_parquet_column_whose_name_is_not_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["uno"]}), path)
    path.write_bytes(path.read_bytes().replace(b"text", b"\xc6ext"))
    with pytest.raises(ConfigError, match=r"a\.parquet is not a parquet file: .*can't decode"):
        read(path)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6), st.booleans())
def test_a_damaged_parquet_file_is_a_config_error(place: int, patch: bytes, cut: bool) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": ["uno", "dos"] * 50}), sink)
    content = bytearray(sink.getvalue().to_pybytes())
    place %= len(content)
    content[place : place + len(patch)] = b"" if cut else patch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        path.write_bytes(content)
        try:
            read(path)
        except ConfigError as error:
            one_line(error)


def test_a_missing_text_names_its_key(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("x")
    gone = Path("gone.txt")
    for key, fields in (
        ("dataset_path", {"dataset_path": gone}),
        ("eval_dataset", {"eval_dataset": str(gone)}),
        (
            "validation.corpora.1.path",
            {"validation": {"corpora": [{"name": "a", "path": text}, {"name": "b", "path": gone}]}},
        ),
        ("validation.conversations", {"validation": {"conversations": gone}}),
        ("validation.behaviour.prompts", {"validation": {"behaviour": {"prompts": gone}}}),
        ("validation.needle.haystack", {"validation": {"needle": {"haystack": gone}}}),
    ):
        with pytest.raises(ConfigError) as caught:
            texts.require_texts(Config.model_validate({"model_id": "m", **fields}))
        assert caught.value.message == f"{key}: there is no file gone.txt"
        assert caught.value.hint == "a relative path starts in the current folder"
    with pytest.raises(ConfigError, match=f"dataset_path: {tmp_path} is a folder"):
        texts.require_texts(config(dataset_path=tmp_path))


class Tokenizer:
    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def apply_chat_template(self, conversation: Any, tools: Any = None, *, tokenize: bool = True) -> Any:
        import jinja2

        assert not tokenize
        if self.chat_template == "refuse":
            raise jinja2.TemplateError("roles must alternate")
        return f"{len(conversation)} messages, {tools and len(tools)} tools"


def test_rendering() -> None:
    chat = Document(messages=tuple(CHAT["messages"]), tools=tuple(CHAT["tools"]))
    plain = Document(messages=({"role": "user", "content": "x"},))
    assert texts.render(Document(text="a"), Tokenizer(None)) == "a"
    assert texts.render(chat, Tokenizer("t")) == "2 messages, 1 tools"
    assert texts.render(plain, Tokenizer("t")) == "1 messages, None tools"
    with pytest.raises(SourceError, match="no chat template"):
        texts.render(chat, Tokenizer(None))
    with pytest.raises(ConfigError, match=r"roles user, assistant.*must alternate"):
        texts.render(chat, Tokenizer("refuse"))


def test_the_corpora_of_a_run(tmp_path: Path) -> None:
    given = Corpus(name="x", path=tmp_path / "x.txt")
    assert texts.corpora(config(validation=Validation(corpora=(given,)), eval_dataset="y")) == (given,)
    (file,) = texts.corpora(config(eval_dataset="some/held out.txt"))
    assert (file.name, file.path) == ("held-out", Path("some/held out.txt"))
    (data,) = texts.corpora(config(eval_dataset="owner/set", dataset_config="eu", split="test"))
    assert (data.dataset, data.config, data.split) == ("owner/set", "eu", "test")
    (default,) = texts.corpora(config())
    assert default.name == BUILT_IN
    with pytest.raises(ConfigError, match="same name"):
        texts.corpora(config(validation=Validation(corpora=(given, given))))


def test_the_default_text_needs_nothing_and_never_changes() -> None:
    corpus = Corpus(name="c", dataset=BUILT_IN)
    first = texts.read(corpus, characters=20_000)
    assert first == texts.read(corpus, characters=20_000)
    assert 20_000 <= sum(document.size() for document in first) < 40_000
    assert texts.identity(corpus) == texts.identity(corpus)


def test_docstrings_are_taken_once_and_tests_left_out(tmp_path: Path) -> None:
    text = "A sentence that is long enough to be worth reading."
    (tmp_path / "b.py").write_text(f'def f():\n    """{text}"""\n')
    (tmp_path / "a.py").write_text(f'"""Module: {text}"""\nclass A:\n    """{text}"""\n    x = "\\d"\n')
    (tmp_path / "bad.py").write_text("print 'two'")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text(f'"""Test: {text}"""')
    assert list(docstrings(tmp_path)) == [f"Module: {text}", text]


def test_docstrings_are_found_wherever_a_statement_may_stand(tmp_path: Path) -> None:
    """In the order of ``ast.walk``, so that a sample of them stays what it was."""
    blocks = (
        "if a:", "else:", "while a:", "for a in b:", "try:", "except E:", "finally:", "with a:", "match a:\n case 1:", "def outer():",
        "class Outer:", "async def other():",
    )  # fmt: skip
    source = "".join(
        f"{block}\n  def f{number}():\n   '''{SENTENCE} {number}'''\n   class Inner:\n    '''{SENTENCE} in {number}'''\n"
        for number, block in enumerate(blocks)
    )
    (tmp_path / "a.py").write_text(source)
    walked = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    expected = [text for text in walked if text]
    assert len(expected) == 2 * len(blocks)
    assert list(docstrings(tmp_path)) == expected


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = texts.identity(Corpus(name="c", path=path))
    path.write_text("two")
    assert texts.identity(Corpus(name="c", path=path)) != before
    assert texts.identity(Corpus(name="c", dataset="owner/set")) is None


def test_calibration_samples_by_seed(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": str(number)} for number in range(20)))
    order = list(range(20))
    random.Random(7).shuffle(order)
    shuffled = texts.calibration(config(dataset_path=path, sample_size=5, dataset_seed=7))
    assert [document.text for document in shuffled] == [str(number) for number in order[:5]]
    plain = texts.calibration(config(dataset_path=path, sample_size=2, shuffle=False))
    assert [document.text for document in plain] == ["0", "1"]


def test_calibration_settings(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"body": "x"})
    named = config(dataset_path=path, calibration_config={"text_field": "body"})
    assert texts.calibration(named) == (Document(text="x"),)
    with pytest.raises(ConfigError, match="text_field must be the name"):
        texts.calibration(config(dataset_path=path, calibration_config={"text_field": 3}))
    with pytest.raises(ConfigError, match="neither dataset_path nor dataset_id"):
        texts.calibration(config())
    with pytest.raises(ConfigError, match="is empty"):
        texts.calibration(config(dataset_path=lines(tmp_path / "b.jsonl", "")))
