from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantool.methods import _autoawq
from quantool.records import Artifact, Plan
from quantool.weights import check_index

Made = Callable[..., Artifact]
QUICK = {"n_grid": 3, "duo_scaling": False}
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def asymmetric(llama: Path, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return made(llama, tmp_path_factory.mktemp("awq"), "awq", "W4A16_ASYM", quantization_config=QUICK)


def agreement(reference: Any, found: Any) -> float:
    """Correlation of the logits."""
    return float(torch.corrcoef(torch.stack((reference.flatten(), found.flatten())))[0, 1])


def test_every_layer_is_packed_and_the_sizes_were_planned(
    llama: Path, asymmetric: Artifact, planned: Callable[..., Plan]
) -> None:
    found = check_index(asymmetric.folder)
    assert sum(name.endswith(".weight_packed") for name in found) == asymmetric.details["layers"] == 14
    assert found["lm_head.weight"].dtype == "BF16"
    (output,) = planned(
        llama,
        asymmetric.folder.parent,
        "awq",
        "W4A16_ASYM",
        quantization_config=QUICK,
        dataset_id="python-docs",
    ).outputs
    expected = {file.name: file.bytes for file in output.files if file.name != "config.json"}
    found_sizes = {file.name: file.bytes for file in asymmetric.files}
    assert {name: found_sizes[name] for name in expected} == expected
    assert found_sizes.keys() - expected.keys() == {"config.json", "recipe.yaml"}


def test_companions_are_the_sources_bytes(llama: Path, asymmetric: Artifact) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    ):
        assert (asymmetric.folder / name).read_bytes() == (llama / name).read_bytes(), name


def test_transformers_loads_it_and_it_answers_alike(
    llama: Path, asymmetric: Artifact, logits: Callable[[Path], Any]
) -> None:
    # plain rounding gives 0.939 on these random weights, a broken layout about 0
    assert agreement(logits(llama), logits(asymmetric.folder)) > 0.9


def test_nothing_but_the_weights_depends_on_this_machine(asymmetric: Artifact) -> None:
    for name in ("config.json", "recipe.yaml"):
        assert str(asymmetric.folder.parent) not in (asymmetric.folder / name).read_text()


def test_autoawq_layout_of_a_mixture_of_experts(moe: Path, made: Made, tmp_path: Path) -> None:
    options = {**QUICK, "n_grid": 2, "format": "autoawq", "ignore": ["lm_head"]}
    artifact = made(moe, tmp_path, "awq", "W4A16", quantization_config=options)
    tensors = load_file(artifact.folder / "model.safetensors")
    module = "model.layers.1.mlp.experts.3.up_proj"
    weight = _autoawq.dequantize(
        {part: tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")}
    )
    original = load_file(moe / "model.safetensors")[f"{module}.weight"].float()
    assert weight.shape == original.shape
    rows = torch.nn.functional.cosine_similarity(
        weight, original, dim=1
    )  # AWQ scales rows or columns of some layers
    assert rows.min() > 0.9
    settings = json.loads((artifact.folder / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["version"], settings["group_size"]) == ("awq", "gemm", 128)
    assert settings["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    ]
    assert artifact.bits_per_weight == pytest.approx(
        8 * sum(t.nbytes for t in tensors.values()) / sum(t.elements for t in check_index(moe).values())
    )
