from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantool.formats.safetensors import check_index
from quantool.records import Artifact

Made = Callable[..., Artifact]
pytestmark = pytest.mark.e2e


def test_smoothed_w8a8_of_a_model_with_tied_embeddings(
    qwen3: Path, made: Made, tmp_path: Path, logits: Callable[[Path], Any]
) -> None:
    artifact = made(qwen3, tmp_path, "gptq", "W8A8", quantization_config={"smoothing_strength": 0.5})
    found = check_index(artifact.folder)
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == "I8"
    assert "lm_head.weight" not in found
    recipe = (artifact.folder / "recipe.yaml").read_text()
    assert "SmoothQuantModifier" in recipe
    assert "GPTQModifier" in recipe
    assert json.loads((artifact.folder / "config.json").read_text())["tie_word_embeddings"] is True
    pair = torch.stack((logits(qwen3).flatten(), logits(artifact.folder).flatten()))
    assert float(torch.corrcoef(pair)[0, 1]) > 0.98
