from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from quantool.plugins.contract import Case
from quantool.records import Gates, Verdict
from quantool.runtime.progress import Progress
from quantool.validation.experts import compare, judge

FULL = {"blk.0": [900, 40, 33, 32], "blk.1": [64, 64, 64, 64]}
POOR = {"blk.0": [900, 40, 31, 32], "blk.1": [64, 0, 64, 64]}


def case(engine: str, artifact: Path, details: dict[str, Any], limit: int | None = None) -> Case:
    gates = Gates() if limit is None else Gates(min_expert_tokens=limit)
    return cast("Case", SimpleNamespace(engine=engine, artifact=artifact, details=details, gates=gates))


def test_experts_below_the_minimum_are_named_from_the_poorest() -> None:
    finding = compare(POOR, None)
    assert finding.verdict is Verdict.PASS
    assert finding.measured == 0
    assert finding.threshold is None
    assert "fewer than 32: 2 experts, blk.1 expert 1 (0), blk.0 expert 2 (31)" in finding.detail


def test_a_gate_makes_it_a_regression() -> None:
    finding = compare(POOR, 32)
    assert (finding.verdict, finding.threshold) == (Verdict.REGRESSION, 32)
    assert "blk.1 expert 1 (0)" in finding.detail
    assert compare(FULL, 32).verdict is Verdict.PASS
    assert compare(FULL, 33).verdict is Verdict.REGRESSION


def test_experts_that_were_all_calibrated_have_no_poorest() -> None:
    details = {"expert_tokens": POOR, "all_experts": True}
    (finding,) = judge.judge(case("transformers", Path(), details, limit=32), Progress(quiet=True))
    assert finding.verdict is Verdict.PASS
    assert "every expert saw the whole calibration text" in finding.detail


def test_what_a_method_counted_is_judged() -> None:
    (finding,) = judge.judge(
        case("transformers", Path(), {"expert_tokens": POOR}, limit=1), Progress(quiet=True)
    )
    assert finding.verdict is Verdict.REGRESSION
    assert "blk.1 expert 1 (0)" in finding.detail


@pytest.mark.parametrize("details", [{}, {"expert_tokens": {}}, {"expert_tokens": None}])
def test_nothing_is_said_of_models_without_experts(details: dict[str, Any]) -> None:
    assert judge.judge(case("transformers", Path(), details), Progress(quiet=True)) == []


def write_gguf(path: Path, keys: dict[str, str], tensors: dict[str, Any]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, arch="llama")
    for key, value in keys.items():
        writer.add_string(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_expert_that_the_importance_matrix_never_saw_is_found_by_name(tmp_path: Path) -> None:
    """The matrix beside the file, changed after the method did its work."""
    artifact = write_gguf(
        tmp_path / "m-Q4_K_M.gguf", {"quantize.imatrix.file": "m-imatrix.gguf"}, {"a": [0.0]}
    )
    counts = [[70.0], [70.0], [0.0], [70.0]]
    write_gguf(
        tmp_path / "m-imatrix.gguf",
        {},
        {
            "blk.1.ffn_up_exps.weight.counts": counts,
            "blk.1.ffn_down_exps.weight.counts": counts,
            "blk.1.ffn_down_exps.weight.in_sum2": np.ones((4, 8)),
            "blk.0.ffn_up.weight.counts": [[210.0]],
        },
    )
    (finding,) = judge.judge(case("llama.cpp", artifact, {}, limit=32), Progress(quiet=True))
    assert finding.verdict is Verdict.REGRESSION
    assert "1 experts, blk.1 expert 2 (0)" in finding.detail
    assert "4 experts in 1 layers" in finding.detail
