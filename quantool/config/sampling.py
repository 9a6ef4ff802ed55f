"""Recommended sampling: the one answer that the checks and the model card give."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from quantool.config.schema import Config, Sampling
from quantool.records import Source

NAMES = tuple(Sampling.model_fields)
ROUNDING = 1e-6
"""Relative; a GGUF header holds float32."""
STATED = re.compile(rf"\b({'|'.join(NAMES)})\b\W{{1,6}}?(\d+(?:\.\d+)?)")


def recommended(source: Source, config: Config) -> Sampling:
    """What ``validation.generation`` says, and generation_config.json of the source where it says nothing."""
    given = config.validation.generation or Sampling()
    known = of_generation(source.generation)
    return Sampling.model_construct(**known | given.model_dump(exclude_none=True))


def of_generation(generation: Mapping[str, object]) -> dict[str, float]:
    """The sampling that a generation_config.json recommends, by the names of ``Sampling``."""
    found = {name: generation.get(name) for name in NAMES}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def listed(sampling: Sampling) -> str:
    """``temperature 0.6, top_k 20``: the sentence of the card, which ``stated`` reads back; empty without any."""
    values = sampling.model_dump(exclude_none=True)
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def stated(text: str) -> dict[str, float]:
    """What a text such as a model card says about sampling: the first number behind each name."""
    found: dict[str, float] = {}
    for name, value in STATED.findall(text):
        found.setdefault(name, float(value))
    return found


def disagreements(
    wanted: Mapping[str, float], found: Mapping[str, float], here: str, there: str
) -> list[str]:
    """Names whose values differ between ``wanted``, which ``there`` says, and ``found``, which ``here`` says."""
    problems = []
    for name in NAMES:
        one, other = found.get(name), wanted.get(name)
        if one is None and other is None:
            continue
        if one is None or other is None or not math.isclose(one, other, rel_tol=ROUNDING):
            problems.append(f"{name} is {_shown(one)} in {here} and {_shown(other)} in {there}")
    return problems


def _shown(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"
