"""The comparison with the rule of llama.cpp's pull request 15550: its choices, and what is said of two files."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quantool.validation._findings.statistics import Tokens
from tests.fit_comparison import OURS, RULE, STOCK, advantage, scored, table
from tests.rule_15550 import Candidate, choose, hull, is_quantized, row_error

THREE = {
    name: hull([Candidate(kind, size * width, error * weight) for kind, size, error in (("q2_k", 2, 9.0), ("q4_k", 4, 3.0), ("q8_0", 8, 0.1))])
    for name, width, weight in (("output.weight", 30, 1.0), ("blk.0.ffn_up.weight", 20, 5.0), ("blk.0.ffn_down.weight", 10, 7.0))
}  # fmt: skip


def tokens(klds: list[float], same: float = 1.0) -> Tokens:
    kld = np.array(klds, dtype=np.float32)
    return Tokens(np.ones_like(kld), np.ones_like(kld), kld, np.full_like(kld, same))


def test_what_lies_above_the_hull_is_never_chosen() -> None:
    given = [Candidate("q4_k", 4, 3.0), Candidate("q2_k", 2, 9.0), Candidate("q3_k", 3, 8.0), Candidate("iq4_nl", 5, 3.5), Candidate("q8_0", 8, 0.1)]  # fmt: skip
    assert [one.type for one in hull(given)] == ["q2_k", "q4_k", "q8_0"]


@pytest.mark.parametrize("budget", [120, 150, 180, 240, 300, 420, 480, 999])
def test_the_budget_is_kept_and_nothing_that_fits_is_left(budget: int) -> None:
    chosen = choose(THREE, budget)
    picked = {name: next(one for one in THREE[name] if one.type == kind) for name, kind in chosen.items()}
    left = budget - sum(one.bytes for one in picked.values())
    assert left >= 0
    for name, one in picked.items():
        for larger in THREE[name][THREE[name].index(one) + 1 :][:1]:
            assert larger.bytes - one.bytes > left


def test_the_output_matrix_is_favoured() -> None:
    """At the rule's fifth of the price it is the first to get more, though another saves more error a byte."""
    alike = dict.fromkeys(("output.weight", "blk.0.ffn_up.weight"), THREE["output.weight"])
    assert choose(alike, 240) == {"output.weight": "q4_k", "blk.0.ffn_up.weight": "q4_k"}
    assert choose(alike, 360) == {"output.weight": "q8_0", "blk.0.ffn_up.weight": "q4_k"}


def test_more_bits_make_a_smaller_error_and_unimportant_columns_none() -> None:
    rows = np.random.default_rng(1).normal(size=(60, 256)).astype(np.float32)
    errors = [
        row_error(rows, kind, None) for kind in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "bf16")
    ]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 0.2
    weights = np.zeros(256, dtype=np.float32)
    weights[:32] = 1
    assert row_error(rows, "iq2_xxs", weights) < row_error(rows, "iq2_xxs", np.ones(256, dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("blk.0.ffn_up.weight", (256, 768), True),
        ("blk.0.ffn_up_exps.weight", (256, 256, 4), True),
        ("output.weight", (256, 4096), True),
        ("blk.0.attn_norm.weight", (256, 1), False),
        ("blk.0.attn_q_norm.weight", (64, 2), False),
        ("blk.0.ffn_gate_inp.weight", (256, 4), False),
        ("blk.0.attn_q.bias", (256, 2), False),
    ],
)
def test_what_the_rule_may_choose(name: str, shape: tuple[int, ...], wanted: bool) -> None:
    tensor: Any = SimpleNamespace(name=name, shape=shape)
    assert is_quantized(tensor) is wanted


def test_windows_are_paired() -> None:
    """Windows differ far more than the files do; a window at a time one is always better."""
    rng = np.random.default_rng(2)
    hard = rng.uniform(0.01, 1.0, size=16)
    stock = scored(100, tokens([value for one in hard for value in (one, one * 1.1)]), 16)
    ours = scored(100, tokens([value for one in hard for value in (one * 0.9, one)]), 16)
    assert len(stock.windows) == 16
    assert advantage(stock, ours) < 0.001
    assert advantage(ours, stock) > 0.99
    assert advantage(stock, stock) == 1.0


def test_the_table_names_what_is_worse() -> None:
    rows = {
        (level, "en"): {way: scored(size, tokens(list(itertools.repeat(kld, 8))), 4) for way, size, kld in (
            (STOCK, 3_000_000, 0.02), (RULE, 2_990_000, 0.018), (OURS, 2_995_000, ours))}
        for level, ours in (("Q4_K_M", 0.012), ("Q5_K_M", 0.021))
    }  # fmt: skip
    lines = table(rows).splitlines()
    assert lines[2].startswith(
        "| Q4_K_M | en | 3.000 / 2.990 / 2.995 | 0.02000 | 0.01800 | 0.01200 | 0.600 | "
    )
    assert "| 1.050 | 1 |" in lines[3]
