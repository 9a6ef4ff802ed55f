"""Recommended sampling: the one answer that artifacts, checks and the model card give.

A recommendation is a number or a range (``0 to 0.2``). What engines read holds one number (``chosen``); the card says the
range.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from quantool.config.schema import Config
from quantool.config.served import Sampling
from quantool.records import Source

GENERATION = "generation_config.json"
NAMES = tuple(Sampling.model_fields)
WHOLE = frozenset({"top_k"})
"""Values that engines count with."""
ROUNDING = 1e-6
"""Relative; a GGUF header holds float32."""
TO = " to "
NUMBER = r"\d+(?:\.\d+)?"
STATED = re.compile(rf"\b({'|'.join(NAMES)})\b\W{{1,6}}?({NUMBER}(?:{TO}{NUMBER})?)")


def recommended(source: Source, config: Config) -> dict[str, float | str]:
    """What ``validation.generation`` says, and generation_config.json of the source where it says nothing."""
    return {**of_generation(source.generation), **given(config)}


def given(config: Config) -> dict[str, float | str]:
    """What ``validation.generation`` says."""
    section = config.validation.generation
    return {} if section is None else section.model_dump(exclude_none=True)


def of_generation(generation: Mapping[str, object]) -> dict[str, float]:
    """The sampling that a generation_config.json recommends, by the names of ``Sampling``."""
    found = {name: generation.get(name) for name in NAMES}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def chosen(source: Source, config: Config) -> dict[str, float]:
    """The recommendation as single numbers, which is what an engine can be told; by the names of ``Sampling``."""
    return numbers(recommended(source, config), source.generation)


def numbers(sampling: Mapping[str, float | str], generation: Mapping[str, object]) -> dict[str, float]:
    """Of a range the number that ``generation`` has where it lies inside, else the nearer end; the upper end without one."""
    known, found = of_generation(generation), {}
    for name, value in sampling.items():
        if isinstance(value, str):
            low, high = map(float, value.split(TO))
            number = min(max(known.get(name, high), low), high)
            found[name] = int(number) if name in WHOLE else number
        else:
            found[name] = value
    return found


def to_write(generation: Mapping[str, object], config: Config) -> dict[str, float]:
    """The numbers of ``validation.generation`` that ``generation`` (generation_config.json of the source) does not have."""
    known = of_generation(generation)
    wanted = numbers(given(config), generation)
    return {name: value for name, value in wanted.items() if known.get(name) != value}


def generation_file(source: Source) -> bytes | None:
    """generation_config.json with the user's sampling in it; None where that of the source (or none) is right as it is.

    transformers samples only with ``do_sample``, and refuses a temperature of 0 with it.
    """
    if not source.sampling:
        return None
    values = {**source.generation, **source.sampling}
    values["do_sample"] = values.get("temperature") != 0
    return f"{json.dumps(values, indent=2, ensure_ascii=False)}\n".encode()


def listed(sampling: Mapping[str, float | str]) -> str:
    """``temperature 0 to 0.2, top_k 20``: the sentence of the card, which ``stated`` reads back; empty without any."""
    return ", ".join(f"{name} {_shown(value)}" for name, value in sampling.items())


def stated(text: str) -> dict[str, float | str]:
    """What a text such as a model card says about sampling: the first number or range behind each name."""
    found: dict[str, float | str] = {}
    for name, value in STATED.findall(text):
        found.setdefault(name, value if TO in value else float(value))
    return found


def disagreements(
    wanted: Mapping[str, float | str], found: Mapping[str, float | str], here: str, there: str
) -> list[str]:
    """Names whose values differ between ``wanted``, which ``there`` says, and ``found``, which ``here`` says."""
    problems = []
    for name in NAMES:
        value, other = found.get(name), wanted.get(name)
        if not _same(value, other):
            problems.append(f"{name} is {_shown(value)} in {here} and {_shown(other)} in {there}")
    return problems


def _same(value: float | str | None, other: float | str | None) -> bool:
    if isinstance(value, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(value, other, rel_tol=ROUNDING)
    return value == other


def _shown(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "missing" if value is None else f"{value:.6g}"
