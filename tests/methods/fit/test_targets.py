"""What an entry of ``fit`` may say."""

import pytest
from pydantic import ValidationError

from quantool.methods._llama_cpp.fit.targets import FitTarget, bytes_of


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24 GiB", 24 << 30),
        ("1.5MiB", 3 << 19),
        ("7kb", 7000),
        ("123B", 123),
        ("2TB", 2 * 10**12),
    ],
)
def test_amounts_are_decimal_or_binary(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [("24QB", "unknown unit 'QB'"), ("24Gib2", "no amount"), ("much", "no amount"), ("24G", "'G'.*GB")],
)
def test_an_unknown_unit_is_named_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FitTarget(size=text)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "exactly one of size, vram, bpw, kld, recipe, not none"),
        ({"size": "1GB", "bpw": 4}, "not size and bpw"),
        ({"size": "1GB", "context": 4096}, "context goes with vram"),
        ({"kld": 0.0}, "greater than 0"),
        ({"vram": "8GB", "kv": "q3_k"}, "f16"),
        ({"sise": "1GB"}, "Extra inputs"),
    ],
)
def test_an_entry_has_one_goal(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FitTarget.model_validate(entry)


def test_it_says_what_the_user_wrote() -> None:
    assert (
        FitTarget(vram="24GiB", context=16384, kv="q8_0").describe()
        == "vram: 24GiB, context: 16384, kv: q8_0"
    )
