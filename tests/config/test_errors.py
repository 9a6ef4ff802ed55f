from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from quantool.config.errors import dotted, explain, models_at, show, suggest


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Inner(Closed):
    name: str
    level: Annotated[int, Field(ge=1, lt=9)] = 1


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Outer(Closed):
    one: Inner | None = None
    many: list[Inner] = []
    named: dict[str, Annotated[Inner, Field()]] = {}
    mixed: bool | Inner | list[int] = False
    layers: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    mode: Literal["fast", "slow"] = "fast"
    limit: float = 0.5
    even: int = 0

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value


def told(data: Any) -> list[str]:
    return [f"{dotted(mistake.path)}: {mistake.text}" for mistake in explain(Outer, data)]


def test_sound_data_has_none() -> None:
    assert told({"one": {"name": "a"}, "mixed": [1], "layers": "x", "limit": 1}) == []
    assert told({"layers": ["x", "y"], "mixed": {"name": "a"}, "one": None}) == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"one": {"nme": 1, "name": "a"}}, "one.nme: unknown key (value 1); did you mean name?"),
        ({"many": [{"name": "a"}, {}]}, "many.1.name: missing"),
        ({"named": {"x": {"name": "a", "level": 9}}}, "named.x.level: must be less than 9 (value 9)"),
        (
            {"named": {"x": {"name": "a", "lvl": 9}}},
            "named.x.lvl: unknown key (value 9); did you mean level?",
        ),
        ({"named": {"x": {"name": "a", "zz": 9}}}, "named.x.zz: unknown key (value 9); known: name, level"),
        ({"mixed": "x"}, 'mixed: must be true or false or a mapping or a list (value "x")'),
        ({"mixed": {"name": 1}}, "mixed.name: must be text (value 1); put it in quotes if it is a word"),
        ({"mixed": [1, "x"]}, 'mixed.1: must be a whole number (value "x")'),
        ({"mixed": 1}, "mixed: must be true or false or a mapping or a list (value 1)"),
        ({"layers": 3}, "layers: must be a list (value 3)"),
        ({"mode": "fsat"}, "mode: must be 'fast' or 'slow' (value \"fsat\"); did you mean fast?"),
        ({"limit": "0.5"}, 'limit: must be a number (value "0.5")'),
        ({"limit": True}, "limit: must be a number (value true)"),
        ({"even": 3}, "even: must be even (value 3)"),
        ({"even": "2"}, 'even: must be a whole number (value "2")'),
    ],
)
def test_words(data: Any, text: str) -> None:
    assert told(data) == [text]


def test_a_key_in_the_wrong_place() -> None:
    (mistake,) = explain(Inner, {"name": "a", "levels": 3}, ("top", 0), {"levels": ["outer.levels"]})
    assert mistake.path == ("top", 0, "levels")
    assert mistake.text == "unknown key here (value 3); did you mean level or outer.levels?"


def test_models_at() -> None:
    assert models_at(Outer, ()) == [Outer]
    for path in (("one",), ("many", 3), ("named", "x"), ("mixed",)):
        assert models_at(Outer, path) == [Inner]
    assert models_at(Outer, ("one", "name")) == []
    assert models_at(Outer, ("nothing", "name")) == []


def test_show() -> None:
    assert show({"a": ["ñ", None, True]}) == '(value {"a": ["ñ", null, true]})'
    assert show("hf_abcdefghij") == '(value "hf_…")'
    assert len(show("x" * 1000)) == 68


def test_suggest() -> None:
    assert suggest("sede", ["seed", "split"]) == "; did you mean seed?"
    assert suggest("zzz", ["seed", "split"]) == "; known: seed, split"
    assert suggest("zzz", [f"name{n}" for n in range(50)]) == ""
    assert suggest("zzz", []) == ""
