from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.records import ModelCard
from quantool.source.model_card import model_card


def test_the_card(tmp_path: Path) -> None:
    front = "license: other\nlicense_name: x-1.0\nlicense_link: LICENSE\nlanguage: [no, ca]\nbase_model: a/b\ntags:\n- t"
    (tmp_path / "README.md").write_text(f"---\n{front}\npipeline_tag: text-generation\n---\n# Title\n---\n")
    card, notes = model_card(tmp_path)
    assert card == ModelCard(
        license="other",
        license_name="x-1.0",
        license_link="LICENSE",
        languages=("no", "ca"),
        pipeline_tag="text-generation",
        tags=("t",),
        base_models=("a/b",),
    )
    assert notes == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---\na: [1\nb: 2\n---\n", "README.md:3:2: the front matter is not YAML"),
        (
            "---\na: !!int abc\n---\n",
            "README.md:2:4: the front matter is not YAML: tag:yaml.org,2002:int does not fit",
        ),
        ("---\na: " + "[" * 20_000 + "\n---\n", "nested more than 64 deep"),
        (
            "---\na0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
            + "---\n",
            "aliases without end",
        ),
        ("---\n" + "x" * 5_000_000, "at most 4,194,304 are read"),
        ("---\n- a\n---\n", "not a mapping"),
        ("---\na: 1\n", "has no end"),
    ],
)
def test_a_malformed_card_is_a_note(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "README.md").write_text(text)
    card, notes = model_card(tmp_path)
    assert card == ModelCard()
    assert said in notes[0]


def test_what_is_wrong_with_one_key_leaves_the_rest(tmp_path: Path) -> None:
    number = "9" * 6000
    (tmp_path / "README.md").write_text(
        f"---\nlicense: mit\ndate: 2024-13-45\nn: {number}\ntags: [a, {{b: 1}}, 2]\n---\n"
    )
    card, (note,) = model_card(tmp_path)
    assert (card.license, card.tags) == ("mit", ("a", "2"))
    assert note.startswith("README.md:4:1: n: a whole number has at most 18 digits")


@pytest.mark.parametrize("text", [None, "# no front matter", "---\n---\n"])
def test_a_card_that_says_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert model_card(tmp_path) == (ModelCard(), [])


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["license: ", "tags: ", "language: ", "- a", "[a, ", "]", "{b: 1}", "no", "\n", "2024-13-45", "&x", "*x", "\t", "~", "\x07", "---"]),
        max_size=12,
    ).map("".join)
)  # fmt: skip
def test_any_front_matter_is_a_card_or_a_note(front: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "README.md").write_text(f"---\n{front}\n---\n# Title\n")
        card, notes = model_card(Path(folder))
    assert ModelCard.model_validate_json(card.model_dump_json()) == card
    assert all("\n" not in note for note in notes)
