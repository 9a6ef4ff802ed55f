"""The allocation against every combination there is."""

import itertools
import random

import pytest

from quantool.methods._fit import allocation
from quantool.methods._fit.allocation import Choice, NoRoomError, allocate, allocate_cost, cost_of, size_of


def random_groups(seed: int, unit: int) -> dict[str, list[Choice]]:
    draw = random.Random(seed)
    return {
        f"group {number}": [
            Choice(f"t{bits}", unit * bits * draw.randint(1, 9), draw.random() / bits**2)
            for bits in (2, 3, 4, 8)
        ]
        for number in range(5)
    }


def every(groups: dict[str, list[Choice]]) -> list[dict[str, str]]:
    return [
        dict(zip(groups, (choice.type for choice in picks), strict=True))
        for picks in itertools.product(*groups.values())
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("unit", [1, 1056])
def test_it_is_the_best_under_the_budget(seed: int, unit: int) -> None:
    groups = random_groups(seed, unit)
    sizes = sorted(size_of(groups, types) for types in every(groups))
    for budget in (sizes[0], sizes[len(sizes) // 3], sizes[len(sizes) // 2], sizes[-1] + 7):
        types = allocate(groups, budget)
        best = min(cost_of(groups, other) for other in every(groups) if size_of(groups, other) <= budget)
        assert size_of(groups, types) <= budget
        assert cost_of(groups, types) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_smallest_of_a_cost(seed: int) -> None:
    groups = random_groups(seed, 1056)
    costs = sorted(cost_of(groups, types) for types in every(groups))
    for limit in (costs[0] * 1.000001, costs[len(costs) // 2], costs[-1] + 1):
        types = allocate_cost(groups, limit)
        best = min(size_of(groups, other) for other in every(groups) if cost_of(groups, other) <= limit)
        assert cost_of(groups, types) <= limit
        assert size_of(groups, types) == best


def test_sizes_without_a_common_divisor_still_fill_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "UNITS", 40)
    groups = {
        f"group {number}": [
            Choice("a", 1009 + number, 3.0),
            Choice("b", 2003 + number, 1.0),
            Choice("c", 4001, 0.1),
        ]
        for number in range(30)
    }
    budget = 70_000
    types = allocate(groups, budget)
    assert budget - 2000 < size_of(groups, types) <= budget


def test_no_room_says_what_the_nearest_is() -> None:
    groups = {"one": [Choice("a", 10, 2.0), Choice("b", 20, 1.0)], "two": [Choice("a", 5, 0.5)]}
    with pytest.raises(NoRoomError) as small:
        allocate(groups, 14)
    assert small.value.nearest == 15
    with pytest.raises(NoRoomError) as low:
        allocate_cost(groups, 1.4)
    assert low.value.nearest == 1.5
