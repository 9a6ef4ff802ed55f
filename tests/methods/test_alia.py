"""A checkpoint of ALIA-40b's shapes, its 81 GB sparse: what the plans say of it. No weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantool.formats.safetensors_layout import encode, file_size
from quantool.records import OutputPlan, Plan
from tests.streaming import begin

TEXT = {"dataset_id": "python-docs", "sample_size": 128, "calibration_config": {"max_seq_length": 512}}
LAYERS, LINEAR = 48, 48 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 24576)
PARAMETERS = LINEAR + 2 * 256_000 * 8192 + LAYERS * 2 * 8192 + 8192
GIB = 1 << 30


@pytest.fixture(scope="module")
def alia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "alia-40b"
    for name, stored in begin(folder, LAYERS).items():
        with (folder / name).open("wb") as file:
            file.write(encode(stored)[0])
            file.truncate(file_size(stored))
    return folder


def weights(output: OutputPlan) -> dict[str, int]:
    return {file.name: file.bytes for file in output.files if file.name.endswith(".safetensors")}


def test_fp8_is_streamed_in_little_memory(alia: Path, tmp_path: Path, planned: Callable[..., Plan]) -> None:
    drawn = planned(alia, tmp_path, "fp8", ["FP8_DYNAMIC", "FP8_BLOCK"])
    assert drawn.source.facts.parameters == PARAMETERS
    shards = {path.name: path.stat().st_size for path in alia.glob("*.safetensors")}
    assert sum(shards.values()) == pytest.approx(2 * PARAMETERS, rel=1e-4)
    for output in drawn.outputs:
        assert weights(output).keys() == shards.keys()
        assert sum(weights(output).values()) == pytest.approx(2 * PARAMETERS - LINEAR, rel=1e-3)
        assert output.peak_ram < 4 * GIB < 2 * max(shards.values())


def test_calibrated_levels_need_the_model_in_memory(
    alia: Path, tmp_path: Path, planned: Callable[..., Plan]
) -> None:
    (static,) = planned(alia, tmp_path, "fp8", "FP8", **TEXT).outputs
    assert sum(weights(static).values()) == pytest.approx(2 * PARAMETERS - LINEAR, rel=1e-3)
    bits = {"W4A16": 4 + 16 / 128, "W4A16_ASYM": 4 + 20 / 128, "W8A16": 8 + 16 / 128}
    outputs = planned(alia, tmp_path, "awq", list(bits), **TEXT).outputs
    for output in outputs:
        expected = LINEAR * bits[output.level] / 8 + 2 * (PARAMETERS - LINEAR)
        assert sum(weights(output).values()) == pytest.approx(expected, rel=1e-3)
    for output in (static, *outputs):
        assert 2 * PARAMETERS < output.peak_ram < 3 * PARAMETERS
        sizes = list(weights(output).values())
        assert len(sizes) > 5
        assert max(sizes) < 5.1e9
        assert "model.safetensors.index.json" in {file.name for file in output.files}
