"""A search for a divergence: what other text may have keeps it, not only the mean of the windows that were measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantool.methods._fit.allocation import Choice, cost_of
from quantool.methods._llama_cpp.fit import search
from quantool.methods._llama_cpp.fit.search import CONFIDENCE, LEAST, STUDENT, Tried, upper_bound
from quantool.methods._llama_cpp.fit.yardstick import WHOLE_WINDOWS

COST = {"q3_k": 4e-3, "q4_k": 1e-3, "q5_k": 2.5e-4, "q6_k": 6e-5, "f16": 0.0}
SIZE = {"q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210, "f16": 512}
GROUPS = {
    f"blk.{number}.a.weight": [Choice(kind, SIZE[kind], COST[kind] * (1 + number / 40)) for kind in COST]
    for number in range(40)
}


class Model:
    """Has types; what they cost adds up, 1.1 times over."""

    def __init__(self, spread: NDArray[np.float64]) -> None:
        self.types: dict[str, str] = {}
        self.spread = spread

    def apply(self, types: dict[str, str]) -> None:
        self.types = types

    def by_window(self) -> NDArray[np.float64]:
        return 1.1 * cost_of(GROUPS, self.types) * self.spread


def chosen(limit: float, spread: NDArray[np.float64]) -> dict[str, Any]:
    model: Any = Model(spread)
    tried = Tried()
    search._Trial(model, model, tried, 40 * 256, lambda *_: None).within(GROUPS, limit)
    return tried.best(limit)


@pytest.mark.parametrize("limit", [0.004, 0.02, 0.1])
def test_texts_that_differ_get_a_margin(limit: float) -> None:
    uneven = np.linspace(0.4, 1.6, WHOLE_WINDOWS)
    found = chosen(limit, uneven)
    assert LEAST * limit <= found["bound"] <= limit
    assert found["measured"] == pytest.approx(found["bound"] / upper_bound(uneven))
    assert found["measured"] < 0.85 * limit


def test_texts_that_are_alike_get_none() -> None:
    found = chosen(0.02, np.ones(WHOLE_WINDOWS))
    assert LEAST * 0.02 <= found["measured"] == pytest.approx(found["bound"])


def test_the_file_that_keeps_it_is_larger_the_more_texts_differ() -> None:
    sizes = [chosen(0.02, np.linspace(1 - by, 1 + by, WHOLE_WINDOWS))["bytes"] for by in (0, 0.3, 0.6, 0.9)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("windows", [2, 4, WHOLE_WINDOWS])
def test_the_bound_holds_as_often_as_it_says(windows: int) -> None:
    draws = np.random.default_rng(7).normal(1.0, 0.3, (20_000, windows))
    kept = np.mean([upper_bound(own) >= 1.0 for own in draws])
    assert kept == pytest.approx(CONFIDENCE, abs=0.006)
    assert len(STUDENT) == WHOLE_WINDOWS - 1
