"""Measured costs: what follows from them for other types, and how a search that was killed goes on."""

import json
from pathlib import Path

import pytest

from quantool.errors import QuantizationError
from quantool.methods._llama_cpp.fit import candidates
from quantool.methods._llama_cpp.fit.costs import MatrixCost, anchors_of, choices, read_costs
from quantool.methods._llama_cpp.fit.search import Groups, with_slow

ERRORS = {"q3_k": 2e-2, "q4_k": 5e-3, "q6_k": 3e-4, "q8_0": 3e-5}


def test_the_cost_of_other_types_follows_from_two() -> None:
    """10 times the squared error, and 1e-4 of rounded activations that every quantized type has."""
    cost = MatrixCost({kind: 10 * ERRORS[kind] + 1e-4 for kind in ("q3_k", "q6_k")}, ERRORS)
    assert cost.of("q4_k") == pytest.approx(10 * 5e-3 + 1e-4)
    assert cost.of("q8_0") == pytest.approx(10 * 3e-5 + 1e-4)
    assert cost.of("f16") == 0.0


def test_a_fine_type_that_measures_worse_is_noise() -> None:
    cost = MatrixCost({"q3_k": 1e-6, "q6_k": 2e-6}, ERRORS)
    assert 0 < cost.of("q4_k") < cost.of("q3_k") + 3e-6


def test_a_matrix_of_zeros_loses_nothing_at_any_type() -> None:
    cost = MatrixCost({"q3_k": 0.0, "q6_k": 0.0}, dict.fromkeys(ERRORS, 0.0))
    assert [cost.of(kind) for kind in ERRORS] == [0.0] * 4


def test_choices_have_a_cost_and_a_size() -> None:
    cost = MatrixCost({"q3_k": 0.2, "q6_k": 0.003}, ERRORS)
    assert [(one.type, one.bytes, one.cost) for one in choices(cost, {"q3_k": 7, "f16": 9})] == [
        ("q3_k", 7, 0.2),
        ("f16", 9, 0.0),
    ]


def test_the_width_decides_the_types() -> None:
    assert (
        set(candidates.types_for(512, importance=False)) == {*candidates.K_QUANTS} - candidates.NEEDS_MATRIX
    )
    assert candidates.types_for(96, importance=True) == candidates.OTHERS
    assert candidates.types_for(100, importance=True) == ()
    assert anchors_of([*candidates.OTHERS]) == ("q4_0", "q8_0")
    assert anchors_of([*candidates.K_QUANTS]) == ("q3_k", "q6_k")


def test_slow_types_take_part_below_four_bits_alone() -> None:
    groups: Groups = {
        "blk.0.a.weight": choices(
            MatrixCost({"q3_k": 0.2, "q6_k": 0.01}, ERRORS | {"iq3_s": 1e-2}),
            {"q3_k": 430, "iq3_s": 430, "q6_k": 820},
        )
    }

    def cheapest(given: Groups) -> dict[str, str]:
        return {name: min(own, key=lambda one: (one.bytes, one.cost)).type for name, own in given.items()}

    assert with_slow(groups, cheapest, elements=1000) == {"blk.0.a.weight": "iq3_s"}
    assert with_slow(groups, cheapest, elements=800) == {"blk.0.a.weight": "q3_k"}


def test_a_line_that_was_not_finished_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    first = json.dumps({"tensor": "a", "error": {"q3_k": 0.1}}) + "\n"
    second = json.dumps({"tensor": "a", "divergence": {"q3_k": 0.5}}) + "\n"
    path.write_text(first + second[:20], encoding="utf-8")
    assert read_costs(path) == {"a": MatrixCost({}, {"q3_k": 0.1})}
    with path.open("a", encoding="utf-8") as file:
        file.write(second)
    assert read_costs(path) == {"a": MatrixCost({"q3_k": 0.5}, {"q3_k": 0.1})}
    assert read_costs(tmp_path / "none") == {}


@pytest.mark.parametrize("line", ["nonsense", "{}", "[1]", '{"tensor": "a", "error": 3}'])
def test_a_damaged_file_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "costs.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(QuantizationError, match="damaged"):
        read_costs(path)
