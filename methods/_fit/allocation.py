"""Which type each group of matrices gets: the least cost under a budget of bytes, or the fewest bytes at a cost.

A multiple-choice knapsack (Kellerer, Pferschy, Pisinger: Knapsack Problems, chapter 11), solved by dynamic programming over
bytes. Matrices of a model have few different sizes, so their greatest common divisor mostly is a unit in which the solution
is exact; where it is not, bytes are counted in ``UNITS`` steps, rounded up, and what that leaves is filled greedily.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNITS = 1 << 16
"""Steps into which the bytes between the smallest and the largest choice are cut at most."""


@dataclass(frozen=True)
class Choice:
    """One type that a group may get: all bytes that its tensors then take, and what that costs (nats a token)."""

    type: str
    bytes: int
    cost: float


Groups = Mapping[str, Sequence[Choice]]
"""By the name of a group (``blk.3.ffn_down``, ``output``), its choices in any order; costs are taken to add up."""


class NoRoomError(Exception):
    """No choice fits: ``nearest`` is the smallest size (of ``allocate``) or the lowest cost (of ``allocate_cost``) there is."""

    def __init__(self, nearest: float) -> None:
        super().__init__(nearest)
        self.nearest = nearest


def allocate(groups: Groups, budget: int) -> dict[str, str]:
    """The type of each group with the least sum of costs whose bytes are at most ``budget``.

    Raises NoRoomError with the smallest size when even that is larger.
    """
    table = _Table(groups)
    if budget < table.smallest:
        raise NoRoomError(table.smallest)
    return table.filled(table.solution(min(table.width, (budget - table.smallest) // table.unit)), budget)


def allocate_cost(groups: Groups, limit: float) -> dict[str, str]:
    """The type of each group with the fewest bytes whose costs add up to at most ``limit``.

    Raises NoRoomError with the lowest cost when even that is higher.
    """
    table = _Table(groups)
    lowest = float(table.costs[-1])
    if lowest > limit:
        raise NoRoomError(lowest)
    return table.solution(int(np.argmax(table.costs <= limit)))


def size_of(groups: Groups, types: Mapping[str, str]) -> int:
    """Bytes of an allocation."""
    return sum(_chosen(choices, types[name]).bytes for name, choices in groups.items())


def cost_of(groups: Groups, types: Mapping[str, str]) -> float:
    """Sum of the costs of an allocation."""
    return sum(_chosen(choices, types[name]).cost for name, choices in groups.items())


def _chosen(choices: Sequence[Choice], kind: str) -> Choice:
    return next(choice for choice in choices if choice.type == kind)


class _Table:
    """``costs[n]``: the least cost within ``smallest + n * unit`` bytes; ``picks``: by group the choice that gives it."""

    def __init__(self, groups: Groups) -> None:
        self.groups = {
            name: sorted(choices, key=lambda choice: choice.bytes) for name, choices in groups.items()
        }
        first = {name: choices[0].bytes for name, choices in self.groups.items()}
        self.smallest = sum(first.values())
        span = sum(choices[-1].bytes - first[name] for name, choices in self.groups.items())
        steps = [choice.bytes - first[name] for name, choices in self.groups.items() for choice in choices]
        self.unit = max(1, math.gcd(*steps, 0), -(-span // UNITS))
        self.width = sum(self._weight(choices[-1], first[name]) for name, choices in self.groups.items())
        self.costs: NDArray[np.float64] = np.zeros(self.width + 1)
        self.picks: list[NDArray[np.int8]] = []
        for name, choices in self.groups.items():
            self._add(choices, first[name])

    def _weight(self, choice: Choice, least: int) -> int:
        return -(-(choice.bytes - least) // self.unit)

    def _add(self, choices: Sequence[Choice], least: int) -> None:
        best = np.full(self.width + 1, np.inf)
        picks = np.zeros(self.width + 1, np.int8)
        for number, choice in enumerate(choices):
            weight = min(self._weight(choice, least), self.width + 1)
            with_choice = self.costs[: self.width + 1 - weight] + choice.cost
            better = with_choice < best[weight:]
            best[weight:][better] = with_choice[better]
            picks[weight:][better] = number
        self.costs = best
        self.picks.append(picks)

    def solution(self, room: int) -> dict[str, str]:
        """The types that ``costs[room]`` stands for."""
        types = {}
        for (name, choices), picks in reversed([*zip(self.groups.items(), self.picks, strict=True)]):
            choice = choices[picks[room]]
            types[name] = choice.type
            room -= self._weight(choice, choices[0].bytes)
        return {name: types[name] for name in self.groups}

    def filled(self, types: dict[str, str], budget: int) -> dict[str, str]:
        """What rounding left of the budget, given where a byte saves most."""
        chosen = {name: _chosen(choices, types[name]) for name, choices in self.groups.items()}
        left = budget - sum(choice.bytes for choice in chosen.values())
        while True:
            steps = [
                ((chosen[name].cost - choice.cost) / (choice.bytes - chosen[name].bytes), name, choice)
                for name, choices in self.groups.items()
                for choice in choices
                if 0 < choice.bytes - chosen[name].bytes <= left and choice.cost < chosen[name].cost
            ]
            if not steps:
                return {name: choice.type for name, choice in chosen.items()}
            _, name, choice = max(steps, key=lambda step: step[0])
            left -= choice.bytes - chosen[name].bytes
            chosen[name] = choice
