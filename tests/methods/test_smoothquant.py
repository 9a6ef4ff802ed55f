from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantool.formats.safetensors import check_index
from quantool.records import Artifact

pytestmark = pytest.mark.e2e


def test_w8a8(
    llama: Path, made: Callable[..., Artifact], tmp_path: Path, logits: Callable[[Path], Any]
) -> None:
    mappings = [
        [["re:.*gate_proj$", "re:.*up_proj$"], "re:.*post_attention_layernorm$"]
    ]  # as 0.2.0 spelt them
    artifact = made(llama, tmp_path, "smoothquant", "W8A8", quantization_config={"mappings": mappings})
    assert check_index(artifact.folder)["model.layers.1.mlp.gate_proj.weight"].dtype == "I8"
    assert artifact.folder.name == "toy-llama-SmoothQuant-W8A8"
    pair = torch.stack((logits(llama).flatten(), logits(artifact.folder).flatten()))
    assert float(torch.corrcoef(pair)[0, 1]) > 0.98
