from __future__ import annotations

from pathlib import Path

import pytest

from quantool.errors import SourceError
from quantool.source.chat_template import end_of_turn, environment, read_named, read_template
from tests.checkpoint import TEMPLATE

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>x"]


def test_the_file_wins_over_tokenizer_config_and_a_difference_is_noted(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("NEW")
    assert read_template(tmp_path, {}) == ("NEW", [])
    assert read_template(tmp_path, {"chat_template": "NEW"}) == ("NEW", [])
    template, notes = read_template(tmp_path, {"chat_template": "OLD"})
    assert template == "NEW"
    assert "different chat templates" in notes[0]


def test_the_default_of_named_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert read_template(tmp_path, {"chat_template": named}) == ("D", [])
    assert read_template(tmp_path, {"chat_template": named[:1]}) == (None, [])
    assert read_template(tmp_path, {}) == (None, [])


def test_additional_templates_hide_that_of_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    template, notes = read_template(tmp_path, {"chat_template": "OLD"})
    assert template is None
    assert "ignores" in notes[0]


@pytest.mark.parametrize("inline", [False, True])
def test_a_template_that_does_not_parse_names_file_and_line(tmp_path: Path, inline: bool) -> None:
    text, config = "{{ a }}\n{% for m in %}", {}
    if inline:
        config = {"chat_template": text}
    else:
        (tmp_path / "chat_template.jinja").write_text(text)
    place = "tokenizer_config.json" if inline else "chat_template.jinja"
    with pytest.raises(SourceError, match=f"{place}:2: the chat template does not parse"):
        read_template(tmp_path, config)


def test_a_template_of_another_kind_or_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="neither a text nor a list"):
        read_template(tmp_path, {"chat_template": {"default": "x"}})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(SourceError, match="not UTF-8"):
        read_template(tmp_path, {})


def test_the_environment_has_what_templates_use() -> None:
    text = "{% generation %}{{ {'é': '<'} | tojson }}{% endgeneration %}{% for i in [1, 2] %}{% break %}{% endfor %}"
    assert environment().from_string(text).render() == '{"é": "<"}'


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, "<|im_end|>"),
        (TEMPLATE.replace("<|im_end|>", "{{ eos_token }}"), "</s>"),
        (TEMPLATE.replace("<|im_end|>", "<|im_end|>x"), "<|im_end|>x"),
        (TEMPLATE.replace("<|im_end|>", ""), None),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[0].content + 1 }}", None),
        ("{{ messages[9].content.x }}", None),
        ("nothing<|im_end|>", None),
    ],
)
def test_the_token_that_ends_an_answer(template: str, expected: str | None) -> None:
    assert end_of_turn(template, SPECIAL, {"bos_token": "<s>", "eos_token": "</s>"}) == expected


def test_templates_with_a_name_are_those_of_transformers(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert read_named(tmp_path, {"chat_template": listed}) == {"tool_use": "T"}
    assert read_named(tmp_path, {"chat_template": "D"}) == read_named(tmp_path, {}) == {}
    (tmp_path / "chat_template.jinja").write_text("NEW")
    assert read_named(tmp_path, {"chat_template": listed}) == {}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert read_named(tmp_path, {"chat_template": listed}) == {"rag": "R"}
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{% for m in %}")
    with pytest.raises(SourceError, match=r"rag\.jinja:1: the chat template does not parse"):
        read_named(tmp_path, {})
