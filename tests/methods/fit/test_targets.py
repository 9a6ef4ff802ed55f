"""What an entry of ``fit`` may say."""

import pytest
from pydantic import ValidationError

from quantool.methods._llama_cpp.fit.targets import FitTarget


def test_a_unit_is_refused_where_the_entry_is_read() -> None:
    for entry in ({"size": "24QB"}, {"vram": "24QB"}):
        with pytest.raises(ValidationError, match="unknown unit 'QB'"):
            FitTarget.model_validate(entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "exactly one of size, vram, bpw, kld, recipe, not none"),
        ({"size": "1GB", "bpw": 4}, "not size and bpw"),
        ({"size": "1GB", "context": 4096}, "context goes with vram"),
        ({"kld": 0.0}, "greater than 0"),
        ({"kld": float("inf")}, "finite"),
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
