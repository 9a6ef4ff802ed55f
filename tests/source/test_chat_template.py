from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from quantool.errors import SourceError
from quantool.source import chat_template
from quantool.source.chat_template import ChatTemplates, end_of_turn, read_templates
from quantool.source.template_child import environment
from tests.checkpoint import TEMPLATE

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>x"]


def default(folder: Path, config: dict[str, Any]) -> tuple[str | None, list[str]]:
    templates = read_templates(folder, config)
    return templates.default, list(templates.notes)


def compiled(folder: Path, config: dict[str, Any]) -> None:
    end_of_turn(read_templates(folder, config), SPECIAL, {})


def end(template: str) -> str | None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return end_of_turn(ChatTemplates(template, {}, {"": "t.jinja"}), SPECIAL, tokens)


def test_the_file_wins_over_tokenizer_config_and_a_difference_is_noted(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("NEW")
    assert default(tmp_path, {}) == ("NEW", [])
    assert default(tmp_path, {"chat_template": "NEW"}) == ("NEW", [])
    template, notes = default(tmp_path, {"chat_template": "OLD"})
    assert template == "NEW"
    assert "different chat templates" in notes[0]


def test_the_default_of_named_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert default(tmp_path, {"chat_template": named}) == ("D", [])
    assert default(tmp_path, {"chat_template": named[:1]}) == (None, [])
    assert default(tmp_path, {}) == (None, [])


def test_additional_templates_hide_that_of_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    template, notes = default(tmp_path, {"chat_template": "OLD"})
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
        compiled(tmp_path, config)


def test_a_template_of_another_kind_or_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="neither a text nor a list"):
        default(tmp_path, {"chat_template": {"default": "x"}})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(SourceError, match="not UTF-8"):
        default(tmp_path, {})


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
    assert end(template) == expected


def test_templates_with_a_name_are_those_of_transformers(tmp_path: Path) -> None:
    def named(config: dict[str, Any]) -> dict[str, str]:
        return read_templates(tmp_path, config).named

    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert named({"chat_template": listed}) == {"tool_use": "T"}
    assert named({"chat_template": "D"}) == named({}) == {}
    (tmp_path / "chat_template.jinja").write_text("NEW")
    assert named({"chat_template": listed}) == {}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert named({"chat_template": listed}) == {"rag": "R"}
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{% for m in %}")
    with pytest.raises(SourceError, match=r"rag\.jinja:1: the chat template does not parse"):
        compiled(tmp_path, {})


@pytest.mark.parametrize(
    "listed",
    [
        [{"name": 1, "template": 2}],
        [{"name": "a"}],
        [1],
        {"default": "x"},
        3,
        [{"name": "a", "template": None}],
    ],
)
def test_templates_of_the_wrong_shape(tmp_path: Path, listed: Any) -> None:
    with pytest.raises(SourceError, match=r"tokenizer_config\.json: chat_template is neither"):
        read_templates(tmp_path, {"chat_template": listed})


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "writes": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "doubles": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "pads": "{{ '%999999999d'|format(1) }}",
    "multiplies": "{{ 'x' * 10**10 }}",
    "powers": "{{ 9**(9**(9**9)) }}",
    "folds": "{{ ('x' * 99999)|center(999999999999) }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "calls": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nests": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 500 + "]" * 500 + " }}",
    "fors": "{% for a in b %}" * 25 + "{% endfor %}" * 25,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_is_held_to_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    monkeypatch.setattr(chat_template, "MEMORY", 1 << 28)
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"^t\.jinja: the chat template ") as caught:
        end(HOSTILE[name])
    assert time.monotonic() - started < 30  # 1 of processor time
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "template", ["{{ range(10**9) }}", "{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ '%q' % 1 }}"]
)
def test_a_template_may_refuse_the_messages(template: str) -> None:
    assert end(template) is None


def test_a_named_template_is_held_to_limits_too() -> None:
    templates = ChatTemplates(TEMPLATE, {"rag": HOSTILE["nests"]}, {"": "t.jinja", "rag": "rag.jinja"})
    with pytest.raises(SourceError, match=r"^rag\.jinja: the chat template "):
        end_of_turn(templates, SPECIAL, {})


def test_a_file_that_is_no_template(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("x" * 2_000_000)
    with pytest.raises(SourceError, match="at most 1,048,576 are read"):
        read_templates(tmp_path, {})
