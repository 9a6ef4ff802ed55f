"""Which tensors of a checkpoint those of a GGUF come from, by the converter's own lazy tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structures
import vision_structures
from safetensors.torch import load_file, save_file

from quantool.errors import SourceError
from quantool.ledger import Fate, Ledger, TensorLine
from quantool.records import Plan

pytestmark = pytest.mark.e2e
Planned = Callable[..., Plan]


def ledger(plan: Plan) -> Ledger:
    found = plan.outputs[0].ledger
    assert found is not None
    return found


def lines(plan: Plan) -> dict[str, TensorLine]:
    return {line.name: line for line in ledger(plan).tensors}


def test_experts_are_merged_and_everything_is_in(moe: Path, tmp_path: Path, planned: Planned) -> None:
    plan = planned(moe, tmp_path / "out", "gguf", "Q4_K_M")
    found = lines(plan)
    up = found["model.layers.{0-1}.mlp.experts.{0-7}.up_proj.weight"]
    assert (up.fate, up.to[0].name, up.count()) == (Fate.MERGED, "blk.{0-1}.ffn_up_exps.weight", 16)
    router = found["model.layers.{0-1}.mlp.gate.weight"]
    assert (router.fate, router.to[0].dtype) == (Fate.CONVERTED, "F32")
    assert ledger(plan).summary().endswith("tensors: 69 in")


def test_a_tied_head_that_was_saved_too(qwen3: Path, tmp_path: Path, planned: Planned) -> None:
    folder = tmp_path / "tied"
    folder.mkdir()
    for path in qwen3.iterdir():
        (folder / path.name).symlink_to(path)
    tensors = load_file(qwen3 / "model.safetensors")
    (folder / "model.safetensors").unlink()
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
    found = lines(planned(folder, tmp_path / "out", "gguf", "Q8_0"))
    assert found["lm_head.weight"].fate in (Fate.TIED, Fate.QUANTIZED)
    assert found["model.embed_tokens.weight"].fate is Fate.QUANTIZED


def test_frequencies_are_computed(tmp_path: Path, planned: Planned) -> None:
    """Llama 3.1's factors of its rotary frequencies stand in config.json alone; the converter makes a tensor of them."""
    import json

    folder = structures.write_spm_llama(tmp_path / "toy")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    plan = planned(folder, tmp_path / "out", "gguf", "Q8_0")
    added = [line for line in ledger(plan).tensors if line.fate is Fate.ADDED]
    assert [(line.to[0].name, line.reason) for line in added] == [
        ("rope_freqs.weight", "the converter computes it from config.json")
    ]


def test_a_tower_is_left_out_on_purpose_or_the_plan_is_refused(tmp_path: Path, planned: Planned) -> None:
    folder = vision_structures.write_gemma3_vision(tmp_path / "toy")
    with pytest.raises(SourceError, match="holds more than a language model: vision"):
        planned(folder, tmp_path / "out", "gguf", "Q8_0")
    plan = planned(folder, tmp_path / "out", "gguf", "Q8_0", drop=["vision"])
    found = ledger(plan)
    assert found.parts_left_out().keys() == {"vision"}
    assert found.statement().endswith("left out: this is a text-only file")
    assert plan.outputs[0].repo == "toy-GGUF-text-only"
    reasons: dict[str, Any] = {line.name: line.reason for line in found.files}
    assert "towers" in reasons["preprocessor_config.json"]
    named = planned(folder, tmp_path / "out", "gguf", "Q8_0", drop=["vision"], repo_id="me/mine")
    assert named.outputs[0].repo == "mine"


def test_a_tensor_that_the_converter_would_lose(tmp_path: Path, planned: Planned) -> None:
    """A buffer by its name in llama.cpp's eyes, weights in those of the checkpoint."""
    folder = structures.write_spm_llama(tmp_path / "toy")
    tensors = load_file(folder / "model.safetensors")
    extra = {"vision_tower.block.weight": tensors["model.norm.weight"].clone()}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"vision \(1 tensors, 256 weights\)"):
        planned(folder, tmp_path / "out", "gguf", "Q8_0")
