from __future__ import annotations

from typing import Any

import pytest

from quantool.source.experts import Experts, coverage_note, read_experts


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"num_experts": 128, "num_experts_per_tok": 8}, Experts(128, 8)),
        ({"n_routed_experts": 64, "num_experts_per_tok": 6}, Experts(64, 6)),
        ({"text_config": {"num_local_experts": 8, "num_experts_per_tok": 2}}, Experts(8, 2)),
        ({"num_experts": 0, "num_experts_per_tok": 2}, None),
        ({"num_experts": 8}, None),
        ({"num_experts": None, "num_experts_per_tok": 2}, None),
    ],
)
def test_experts_by_config_json(config: dict[str, Any], expected: Experts | None) -> None:
    assert read_experts(config) == expected


def test_too_little_text_for_the_experts_is_said_before_the_work() -> None:
    config = {"num_experts": 128, "num_experts_per_tok": 8}
    (note,) = coverage_note(config, 448, 32)
    assert (
        "448 tokens of calibration text reach each of 128 experts 28 times on average, and 32 are the least"
        in note
    )
    assert coverage_note(config, 512, 32) == []
    assert coverage_note({}, 1, 32) == []
