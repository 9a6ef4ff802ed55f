"""Amounts of memory in decimal and binary units, the same for every method."""

import pytest

from quantool.methods._fit.amounts import bytes_of


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24 GiB", 24 << 30),
        ("1.5MiB", 3 << 19),
        ("7kb", 7000),
        ("123B", 123),
        ("2TB", 2 * 10**12),
        ("1.001KB", 1001),
        ("4.35GB", 4_350_000_000),
        ("9007199254740993B", 2**53 + 1),
    ],
)
def test_amounts_are_decimal_or_binary_and_exact(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("24QB", "unknown unit 'QB'"),
        ("24Gib2", "no amount"),
        ("much", "no amount"),
        ("24", "no amount"),
        ("24G", "'G'.*GB"),
        ("24GX", "unknown unit 'GX'"),
        ("0GB", "no byte"),
        ("0.5B", "no byte"),
    ],
)
def test_an_unknown_unit_is_named_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bytes_of(text)
