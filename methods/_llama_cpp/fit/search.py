"""The types of a file, chosen by what each matrix costs, and measured together on text that no cost was measured on.

Costs add up: on a trained Llama of 26 M the sum is 1 to 4 % off what the whole file measures on the same text, at three bits as
at five. Correcting costs by what each kind of matrix adds in company, and choosing again, gave files that measured 1 % worse,
so it is not done. For a divergence that is asked for, the sum is scaled until what is measured keeps it: not its mean, which
other text of the kind exceeds half of the time, but the upper bound of that mean as far as the windows tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantool.errors import QuantizationError
from quantool.methods._fit.allocation import (
    Choice,
    NoRoomError,
    allocate,
    allocate_cost,
    cost_of,
    size_of,
)
from quantool.methods._llama_cpp.fit import candidates
from quantool.methods._llama_cpp.fit.costs import choices, importance, read_costs
from quantool.methods._llama_cpp.fit.live_model import LiveModel, live_model
from quantool.methods._llama_cpp.fit.yardstick import Yardstick, whole_windows, yardstick
from quantool.runtime.worker import Report, preloaded

TRIALS = 5
"""Files tried for a divergence."""
AIM, LEAST = 0.97, 0.92
"""Of the divergence asked for: where the search puts the upper bound, and from where it is content."""
FIRST_RATIO = 1.15
"""The upper bound over the sum of costs, before a file was measured: about what models here have."""
CONFIDENCE = 0.95
STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796)
"""Student's t that ``CONFIDENCE`` of the distribution lies below, for 1 to ``WHOLE_WINDOWS`` - 1 degrees of freedom."""

Groups = Mapping[str, list[Choice]]
Solve = Callable[[Groups], dict[str, str]]


@dataclass
class Tried:
    """Files that were measured: types, bytes of the matrices, the divergence added up, the one measured, its upper bound."""

    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, types: dict[str, str], size: int, predicted: float, windows: NDArray[np.float64]
    ) -> dict[str, Any]:
        """Note one, whose divergences by window are ``windows``."""
        entry = {
            "types": types,
            "bytes": size,
            "predicted": predicted,
            "measured": float(windows.mean()),
            "bound": upper_bound(windows),
        }
        self.entries.append(entry)
        return entry

    def best(self, limit: float | None) -> dict[str, Any]:
        """The lowest divergence; with a ``limit`` the smallest whose bound keeps it, and the nearest where none does."""
        within = [entry for entry in self.entries if limit is not None and entry["bound"] <= limit]
        if within:
            return min(within, key=lambda entry: entry["bytes"])
        return min(self.entries, key=lambda entry: entry["bound" if limit is not None else "measured"])


def upper_bound(windows: NDArray[np.float64]) -> float:
    """What the mean over all text of this kind lies below with ``CONFIDENCE``, by two windows or more (Student's t)."""
    student = STUDENT[min(len(windows) - 1, len(STUDENT)) - 1]
    return float(windows.mean() + student * windows.std(ddof=1) / math.sqrt(len(windows)))


@preloaded("torch")
def search(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Choose types under ``budget`` bytes, or for a mean KL divergence of ``kld`` nats (one of them is null).

    Request: ``base``, ``imatrix``, ``ids``, ``folder``, ``costs`` as for ``costs.measure``; ``sizes`` (tensor to type to bytes).
    Result: ``types`` (tensor to type), ``bytes``, ``predicted`` and ``measured`` divergence on calibration text held apart,
    ``bound`` (``upper_bound`` of it), ``rounds`` (all files tried, without types). Raises QuantizationError with the nearest that can be had.
    """
    groups = _groups(request)
    ids = whole_windows(np.load(request["ids"]))
    tried = Tried()
    with (
        live_model(Path(request["base"]), importance(request["imatrix"])) as model,
        yardstick(model, ids, Path(request["folder"]), whole=True) as judged,
    ):
        trial = _Trial(model, judged, tried, request["elements"], report)
        if request["kld"] is None:
            trial.under(groups, request["budget"])
        else:
            trial.within(groups, request["kld"])
    best = tried.best(request["kld"])
    if request["kld"] is not None and best["bound"] > request["kld"]:
        raise QuantizationError(
            f"fit: kld: {request['kld']:g} is not reached: the nearest is {best['measured']:.4g} on calibration text, which "
            f"may be {best['bound']:.4g} on other text",
            hint="ask for more, give more calibration text, or take F16",
        )
    rounds = [{key: value for key, value in entry.items() if key != "types"} for entry in tried.entries]
    return {**best, "rounds": rounds}


def _groups(request: dict[str, Any]) -> Groups:
    costs = read_costs(Path(request["costs"]))
    missing = [name for name in request["sizes"] if name not in costs]
    if missing:
        raise QuantizationError(f"{request['costs']} lacks {missing[0]} and {len(missing) - 1} more")
    return {name: choices(costs[name], sizes) for name, sizes in request["sizes"].items()}


@dataclass
class _Trial:
    """Files made in memory, one after another."""

    model: LiveModel
    judged: Yardstick
    tried: Tried
    elements: int
    report: Report

    def under(self, groups: Groups, budget: int) -> None:
        """The best types under ``budget`` bytes."""
        try:
            types = with_slow(groups, lambda some: allocate(some, budget), self.elements)
        except NoRoomError as error:
            raise QuantizationError(
                f"fit: no choice of types takes {budget:,} bytes or fewer, the smallest takes {error.nearest:,.0f}"
            ) from error
        self._measure(types, groups)
        self.report(1, 1)

    def within(self, groups: Groups, limit: float) -> None:
        """The smallest file the upper bound of whose divergence is at most ``limit``, by how the sum compares with that bound."""
        ratio = FIRST_RATIO
        for number in range(TRIALS):
            wanted = AIM * limit / ratio

            def fewest(given: Groups, wanted: float = wanted) -> dict[str, str]:
                return allocate_cost(given, wanted)

            try:
                types = with_slow(groups, fewest, self.elements)
            except NoRoomError as error:
                raise QuantizationError(
                    f"fit: kld: {limit:g} is lower than any choice of types keeps, {error.nearest * ratio:.4g} is the lowest"
                ) from error
            if self.tried.entries and types == self.tried.entries[-1]["types"]:  # there is nothing between
                return
            bound = self._measure(types, groups)["bound"]
            self.report(number + 1, TRIALS)
            if LEAST * limit <= bound <= limit:
                return
            ratio = bound / max(cost_of(groups, types), 1e-12)

    def _measure(self, types: dict[str, str], groups: Groups) -> dict[str, Any]:
        self.model.apply(types)
        return self.tried.add(types, size_of(groups, types), cost_of(groups, types), self.judged.by_window())


def with_slow(groups: Groups, solve: Solve, elements: int) -> dict[str, str]:
    """The solution without the slow types, or with them where it has fewer than ``SLOW_BELOW`` bits a weight."""
    quick = {name: [c for c in given if c.type not in candidates.SLOW] for name, given in groups.items()}
    types = solve(quick)
    if 8 * size_of(quick, types) >= candidates.SLOW_BELOW * elements:
        return types
    return solve(groups)
