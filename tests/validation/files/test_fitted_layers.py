"""Folders whose layers were chosen by measuring: healthy by the choice that config.json records, and damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tampering import case, findings, folder_of, fp8_of, regressions, spoilt

from quantool.ledger import ArtifactTensor, Fate, Ledger, TensorLine
from quantool.plugins.contract import Case
from quantool.validation._files.fitted_layers import with_choice
from quantool.validation._files.modules import promise

NAME = "spm_llama"
WHOLE = (
    "model.layers.0.mlp.down_proj",
    *(f"model.layers.1.self_attn.{part}_proj" for part in "qkv"),
)
OTHER = "model.layers.1.mlp.up_proj"


def numbers(bits: int) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}


MIXED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["model.layers.0.a", "model.layers.1.b"], "weights": numbers(4)},
        "group_1": {"targets": ["model.layers.1.a"], "weights": numbers(8)},
    },
    "ignore": ["lm_head", "model.layers.0.b"],
}


def test_each_layer_is_promised_as_its_group_says() -> None:
    packed = ArtifactTensor(name="model.layers.{0-1}.{a,b}.weight_packed", dtype="I32", shape=(256, 32))
    lines = [
        TensorLine(
            name=f"model.layers.{{0-1}}.{last}.weight", dtype="BF16", shape=(256, 256), fate=Fate.QUANTIZED, to=(packed,)
        )
        for last in "ab"
    ] + [TensorLine(name="model.norm.weight", dtype="BF16", shape=(256,), fate=Fate.COPIED)]  # fmt: skip
    found = with_choice(Ledger(tensors=tuple(lines)), promise(MIXED))
    stored = {line.name: {(t.name, t.dtype, t.shape) for t in line.stored()} for line in found.tensors}
    for module, words in (("model.layers.0.a", 32), ("model.layers.1.a", 64), ("model.layers.1.b", 32)):
        assert stored[f"{module}.weight"] == {
            (f"{module}.weight_packed", "I32", (256, words)),
            (f"{module}.weight_scale", "BF16", (256, 2)),
            (f"{module}.weight_shape", "I64", (2,)),
        }
    assert stored["model.layers.0.b.weight"] == {("model.layers.0.b.weight", "BF16", (256, 256))}
    assert stored["model.norm.weight"] == set()
    assert sum(line.count() for line in found.tensors) == 5


def whole(tensors: dict[str, Any]) -> None:
    """The chosen layers as the source has them."""
    from safetensors.torch import load_file

    source = load_file(folder_of(NAME) / "model.safetensors")
    for module in WHOLE:
        tensors[f"{module}.weight"] = source[f"{module}.weight"]
        del tensors[f"{module}.weight_scale"]


def ignored(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"] += WHOLE


def fitted(
    target: Path,
    tensors: Callable[[dict[str, Any]], None] = lambda _: None,
    settings: Callable[[dict[str, Any]], None] = lambda _: None,
    bpw: float = 15.0,
) -> Case:
    """The FP8 folder of the structure with some layers whole, further damaged, and a plan that set a budget."""
    made, output = fp8_of(NAME)

    def changed(stored: dict[str, Any]) -> None:
        whole(stored)
        tensors(stored)

    def configured(config: dict[str, Any]) -> None:
        ignored(config)
        settings(config)

    folder = spoilt(made, target, changed, configured)
    files = tuple(
        file.model_copy(update={"bytes": file.bytes * 2}) if file.name.endswith(".safetensors") else file
        for file in output.files
    )
    options = output.options | {"fit": {"bpw": bpw}}
    output = output.model_copy(update={"options": options, "files": files, "bits_per_weight": bpw})
    return replace(case(NAME, folder, output="fp8/FP8_DYNAMIC-fit"), output=output)


def failing(chosen: Case) -> set[str]:
    return {
        f"{check}/{metric}" for check in ("integrity", "ledger", "serving") for metric in regressions(findings(check, chosen))
    }  # fmt: skip


@pytest.mark.e2e
def test_a_healthy_choice_passes(tmp_path: Path) -> None:
    chosen = fitted(tmp_path / "artifact")
    assert failing(chosen) == set()
    assert "5 left alone" in str(findings("integrity", chosen)["layers"].measured)


@pytest.mark.e2e
def test_without_a_budget_in_the_plan_the_same_folder_fails(tmp_path: Path) -> None:
    """What the plan promised of each layer is then not there."""
    chosen = fitted(tmp_path / "artifact")
    assert chosen.output is not None
    options = {key: value for key, value in chosen.output.options.items() if key != "fit"}
    plain = replace(chosen, output=chosen.output.model_copy(update={"options": options}))
    assert {"ledger/tensors", "integrity/planned_size"} <= failing(plain)


def dequantized(tensors: dict[str, Any]) -> None:
    """A layer more is whole than config.json says."""
    import torch

    weight, scale = tensors[f"{OTHER}.weight"], tensors.pop(f"{OTHER}.weight_scale")
    tensors[f"{OTHER}.weight"] = (weight.float() * scale.float()).to(torch.bfloat16)


def lost(tensors: dict[str, Any]) -> None:
    del tensors[f"{WHOLE[0]}.weight"]


def zeros(tensors: dict[str, Any]) -> None:
    """A whole layer without its values."""
    tensors[f"{WHOLE[0]}.weight"].zero_()


def not_ignored(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].remove(WHOLE[0])


def half_fused(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].remove(WHOLE[1])


def eight_bits(config: dict[str, Any]) -> None:
    """A second group that no FP8 level has."""
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {
        "targets": [OTHER],
        "weights": numbers(8),
        "format": "pack-quantized",
    }


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("tensors", "settings", "found"),
    [
        (dequantized, None, {"integrity/layers", "ledger/tensors"}),
        (lost, None, {"integrity/layers", "ledger/tensors"}),
        (zeros, None, {"ledger/values"}),
        (None, not_ignored, {"integrity/layers", "ledger/tensors"}),
        (None, half_fused, {"integrity/layers", "ledger/tensors", "serving/fused_modules"}),
        (None, eight_bits, {"integrity/level", "serving/fused_modules"}),
    ],
)
def test_damage_is_found(
    tmp_path: Path,
    tensors: Callable[[dict[str, Any]], None] | None,
    settings: Callable[[dict[str, Any]], None] | None,
    found: set[str],
) -> None:
    nothing: Callable[[Any], None] = lambda _: None  # noqa: E731
    assert found <= failing(fitted(tmp_path / "artifact", tensors or nothing, settings or nothing))


@pytest.mark.e2e
def test_more_than_the_budget_is_found(tmp_path: Path) -> None:
    assert failing(fitted(tmp_path / "artifact", bpw=9.0)) == {"integrity/planned_size"}
