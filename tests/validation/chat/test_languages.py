"""A model is asked in the languages that its own card names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tampering import case

from quantool.plugins.contract import Case
from quantool.validation._chat.answers import _conversations
from quantool.validation._chat.conversations import of_case
from quantool.validation._chat.languages import QUESTIONS, questions


def speaking(*languages: str) -> Case:
    chosen = case("qwen3", Path("toy.gguf"))
    card = chosen.source.card.model_copy(update={"languages": languages})
    return replace(chosen, source=chosen.source.model_copy(update={"card": card}))


def test_codes_as_cards_have_them() -> None:
    assert [*questions(["en", "PT", "zh-CN", "nb", "nn", "multilingual"])] == ["pt", "zh", "no"]


def test_questions_end_as_the_language_does_and_stand_once() -> None:
    assert len(set(QUESTIONS.values())) == len(QUESTIONS)
    assert all(text == text.strip() and len(text) > 10 for text in QUESTIONS.values())


def test_both_suites_have_the_languages_of_the_card() -> None:
    rendered = {each.name: each for each in of_case(speaking("de", "ja", "en"))}
    assert {"in de", "in ja"} <= rendered.keys()
    assert "in en" not in rendered
    assert rendered["in de"].settings == rendered["one question"].settings
    asked, _ = _conversations(speaking("de", "ja", "en"))
    assert {"question, de", "question, ja"} <= {each.name for each in asked}
    assert "in de" not in {each.name for each in of_case(speaking("en"))}
