"""Recipes, read as llama-quantize reads them."""

import re
from pathlib import Path

import pytest

from quantool.errors import ConfigError
from quantool.formats.tensor_types import name_of, pattern, read_recipe, write_recipe

TYPES = {"token_embd.weight": "Q6_K", "blk.1.attn_q.weight": "q4_K", "blk.11.attn_q.weight": "iq4_xs"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.txt"
    path.write_text(write_recipe(TYPES), encoding="utf-8")
    assert {name_of(entry): kind for entry, kind in read_recipe(path).items()} == {
        name: kind.lower() for name, kind in TYPES.items()
    }


def test_an_expression_matches_its_tensor_alone() -> None:
    names = [
        "blk.1.attn_q.weight",
        "blk.11.attn_q.weight",
        "blk.1.attn_q.weights",
        "xblk.1.attn_q.weight",
        "blkX1.attn_q.weight",
    ]
    assert [name for name in names if re.search(pattern(names[0]), name)] == names[:1]
    assert name_of("ffn_down=q6_k") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a b=q4_k", "entry 1 is 'a'"),
        ("=q4_k", "entry 1"),
        ("a=q4_k A=q5_k", "twice"),
        ("a=", "entry 1"),
    ],
)
def test_what_llama_quantize_would_refuse_or_pass_over_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "recipe.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_recipe(path)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.txt"):
        read_recipe(tmp_path / "gone.txt")
