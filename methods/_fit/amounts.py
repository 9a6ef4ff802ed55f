"""Amounts of memory as users write them: ``24GB``, ``24GiB``."""

from __future__ import annotations

import re
from fractions import Fraction

from quantool.errors import nearest

UNITS = {"B": 1} | {
    f"{prefix}{mark}": base**power
    for mark, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", re.ASCII)


def bytes_of(text: str) -> int:
    """Bytes of an amount such as ``24GB`` (decimal) or ``24GiB`` (binary), rounded down.

    Raises ValueError naming the nearest unit, and for an amount of nothing.
    """
    found = AMOUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no amount of memory; write it as 24GB or 24GiB")
    by_name = {unit.casefold(): size for unit, size in UNITS.items()}
    if found[2].casefold() not in by_name:
        raise ValueError(
            f"{text!r} has the unknown unit {found[2]!r}; {nearest(found[2], list(UNITS)) or 'known: ' + ', '.join(UNITS)}"
        )
    size = int(Fraction(found[1]) * by_name[found[2].casefold()])
    if not size:
        raise ValueError(f"{text!r} is no byte")
    return size
