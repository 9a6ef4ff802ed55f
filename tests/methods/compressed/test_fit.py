"""Layers chosen by measuring: what is refused, what rounding costs, what is chosen under a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import ValidationError

from quantool.errors import ConfigError, QuantizationError, QuantoolError
from quantool.formats.safetensors import TensorHeader, check_index
from quantool.methods._compressed.fit.budget import Budget
from quantool.methods._compressed.fit.choose import WHOLE, Candidates, choose, scope_of
from quantool.methods._compressed.fit.measure import _Divergence, costs_of
from quantool.methods._compressed.fit.rounding import rounded
from quantool.methods._compressed.schemes import (
    FP8,
    W4A16,
    W4A16_ASYM,
    W8A8,
    W8A16,
    WeightScheme,
    planned,
    select,
)
from quantool.records import Plan

Planned = Callable[..., Plan]
TEXT = {"dataset_id": "python-docs", "sample_size": 4, "calibration_config": {"max_seq_length": 48}}
LAYERS = 2


def model() -> dict[str, TensorHeader]:
    """A Llama of two layers, by its headers alone."""
    shapes = {
        "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
        "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512),
    }  # fmt: skip
    named = {
        f"model.layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in shapes.items()
    }
    named |= {"model.embed_tokens.weight": (300, 256), "lm_head.weight": (300, 256)}
    return {
        name: TensorHeader(name, "BF16", shape, "model.safetensors", 0, 2 * shape[0] * shape[1])
        for name, shape in named.items()
    }


def written(path: Path, costs: Mapping[tuple[str, str], float]) -> Path:
    lines = [{"group": group, "scheme": scheme, "cost": cost} for (group, scheme), cost in costs.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": {"size": "24Gb5"}}, "no amount of memory"),
        ({"fit": {"size": "24QB"}}, "unknown unit 'QB'"),
        ({"fit": {"kld": 0.02}}, "kld is for the method gguf"),
        ({"fit": {}}, "one of size and bpw"),
        ({"fit": {"size": "24GB", "bpw": 5}}, "one of size and bpw"),
        ({"fit": [{"bpw": 5}]}, "is one budget"),
        ({"fit": {"bpw": 0}}, "greater than 0"),
        ({"fit": {"bpw": float("inf")}}, "less than or equal to 32"),
        ({"fit": {"bits": 4}}, "bits"),
        ({"fit": {"bpw": 4.5}}, "takes more than that with every layer quantized"),
        ({"fit": {"size": "100kB"}}, "takes more than that with every layer quantized"),
        ({"fit": {"bpw": 16}}, "fits without quantization"),
        ({"fit": {"bpw": 11}, "format": "autoawq"}, "holds one"),
    ],
)
def test_what_cannot_be_met_is_refused_by_the_plan(
    llama: Path, tmp_path: Path, planned: Planned, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((QuantoolError, ValidationError), match=message):
        planned(llama, tmp_path, "awq", "W4A16", quantization_config=options, **TEXT)


def test_the_nearest_budget_that_can_be_met_is_accepted(
    llama: Path, tmp_path: Path, planned: Planned
) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(llama, tmp_path, "fp8", "FP8_DYNAMIC", quantization_config={"fit": {"bpw": 1}}, **TEXT)
    nearest = float(str(refused.value.hint).partition("bpw: ")[2].rstrip("}"))
    (output,) = planned(
        llama, tmp_path, "fp8", "FP8_DYNAMIC", quantization_config={"fit": {"bpw": nearest}}, **TEXT
    ).outputs
    assert output.id == "fp8/FP8_DYNAMIC-fit"
    assert output.repo == "toy-llama-FP8-dynamic-fit"


def test_text_is_needed_also_where_the_level_itself_needs_none(
    llama: Path, tmp_path: Path, planned: Planned
) -> None:
    with pytest.raises(ConfigError, match="FP8_DYNAMIC with fit needs calibration text"):
        planned(llama, tmp_path, "fp8", "FP8_DYNAMIC", quantization_config={"fit": {"bpw": 13}})


def test_experts_are_refused(moe: Path, tmp_path: Path, planned: Planned) -> None:
    with pytest.raises(ConfigError, match="mixture of experts"):
        planned(moe, tmp_path, "fp8", "FP8_DYNAMIC", quantization_config={"fit": {"bpw": 13}}, **TEXT)


def test_the_plan_promises_the_budget_not_more(llama: Path, tmp_path: Path, planned: Planned) -> None:
    plain = planned(llama, tmp_path, "fp8", "FP8_DYNAMIC", **TEXT).outputs[0]
    size = sum(file.bytes for file in plain.files if file.name.endswith(".safetensors")) + 40_000
    options = {"fit": {"size": f"{size}B"}}
    (output,) = planned(llama, tmp_path, "fp8", "FP8_DYNAMIC", quantization_config=options, **TEXT).outputs
    found = sum(file.bytes for file in output.files if file.name.endswith(".safetensors"))
    assert size - 64 <= found <= size
    assert output.operations > plain.operations == 0


SCHEMES = {"W4A16": W4A16, "W4A16_ASYM": W4A16_ASYM, "W8A16": W8A16, "W8A8": W8A8, **FP8}


@pytest.mark.parametrize("name", list(SCHEMES))
def test_rounding_is_that_of_compressed_tensors(name: str) -> None:
    """With the same scales; an odd width exercises blocks that are not filled."""
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme  # type: ignore[import-untyped]
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # type: ignore[import-untyped]
    from compressed_tensors.quantization.utils import calculate_qparams  # type: ignore[import-untyped]

    scheme = SCHEMES[name]
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 0, 384)
    weight[3] = 0
    args = preset_name_to_scheme(scheme.preset, ["Linear"]).weights
    parts = {
        "channel": weight, "tensor": weight.reshape(1, -1), "group": weight.reshape(256, -1, 128),
        "block": weight.reshape(2, 128, 3, 128).transpose(1, 2).flatten(2),
    }[scheme.strategy]  # fmt: skip
    least, most = parts.amin(-1), parts.amax(-1)
    scale, zero = calculate_qparams(least, most, args)
    if scheme.strategy == "channel":
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    if scheme.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    wanted = fake_quantize(weight, scale, zero, args)
    assert torch.allclose(rounded(weight, scheme), wanted, atol=1e-6)


def test_blocks_at_the_edge_are_smaller() -> None:
    import torch

    weight = torch.randn(130, 200, generator=torch.Generator().manual_seed(4))
    found = rounded(weight, FP8["FP8_BLOCK"])
    assert found.shape == weight.shape
    assert torch.equal(found[:128, :128], rounded(weight[:128, :128], FP8["FP8_BLOCK"]))


def test_what_vllm_runs_as_one_is_chosen_as_one() -> None:
    located = model()
    candidates = Candidates.of(select(located, ["Linear"], None, tied=False), "W4A16", W4A16)
    assert list(candidates.schemes) == ["W4A16", "W8A16"]
    assert len(candidates.groups) == 4 * LAYERS
    assert [layer.name for layer in candidates.groups["model.layers.1.self_attn.qkv_proj"]] == [
        f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"
    ]
    assert candidates.bytes("model.layers.0.mlp.down_proj", WHOLE) == 2 * 256 * 512
    assert list(Candidates.of(select(located, ["Linear"], None, tied=False), "W8A8", W8A8).schemes) == [
        "W8A8"
    ]


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("level", "scheme"), [("W4A16", W4A16), ("FP8_DYNAMIC", FP8["FP8_DYNAMIC"])])
def test_the_dearest_layers_get_more_bits_under_the_budget(
    tmp_path: Path, share: float, level: str, scheme: WeightScheme
) -> None:
    located = model()
    selection = select(located, ["Linear"], None, tied=False)
    smallest = sum(tensor.bytes for tensor in planned(located, selection, scheme))
    largest = sum(tensor.end - tensor.start for tensor in located.values())
    elements = sum(tensor.elements for tensor in located.values())
    allowed = smallest + share * (largest - smallest)
    room = scope_of(Budget(bpw=8 * allowed / elements), level, scheme, selection, located)
    costs = {
        (group, name): 0.01 * (number + 1) / (10 if name == "W8A16" else 1)
        for number, group in enumerate(room.candidates.groups)
        for name in room.candidates.schemes
    }
    choice = choose(room, written(tmp_path / "costs.jsonl", costs))
    whole = set(choice.whole)
    kept = [layer for layer in selection.layers if layer.name not in whole]
    made = sum(
        tensor.bytes
        for tensor in planned(located, replace(selection, layers=tuple(kept)), scheme, choice.others)
    )
    assert made <= allowed
    assert made > smallest or share == 0.02
    for parts in room.candidates.groups.values():
        assert len({(part.name in whole, choice.others.get(part.name)) for part in parts}) == 1
    assert choice.cost == pytest.approx(
        sum(
            0.0 if parts[0].name in whole else costs[group, "W8A16" if parts[0].name in choice.others else level]
            for group, parts in room.candidates.groups.items()
        )
    )  # fmt: skip
    plain = sum(costs[group, level] for group in room.candidates.groups)
    assert choice.cost < plain or share == 0.02


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = written(tmp_path / "costs.jsonl", {("a", "W4A16"): 0.5, ("b", "W4A16"): 0.25})
    path.write_bytes(path.read_bytes()[:-9])
    assert costs_of(path) == {("a", "W4A16"): 0.5}
    assert costs_of(tmp_path / "none.jsonl") == {}


def test_logits_that_are_no_numbers_are_no_cost_of_nothing() -> None:
    import torch

    logits = torch.randn(1, 8, 5, generator=torch.Generator().manual_seed(5))
    model = Mock(device=torch.device("cpu"), side_effect=lambda **_: Mock(logits=logits))
    model.config.get_text_config.return_value.vocab_size = 5
    meter = _Divergence(model, [[1] * 8])
    assert meter.of(model) == 0.0
    logits[0, 3] = torch.nan
    with pytest.raises(QuantizationError, match="not finite"):
        meter.of(model)


@pytest.mark.e2e
def test_made_measured_and_resumed(
    llama: Path, made: Callable[..., Any], tmp_path: Path, served: Any
) -> None:
    """A folder with whole layers under its budget; what was measured before a run died is not measured again."""
    options = {"fit": {"bpw": 13.0}}
    artifact = made(llama, tmp_path, "fp8", "FP8_DYNAMIC", quantization_config=options)
    details = artifact.details
    assert details["fit"] == "bpw: 13"
    stored = check_index(artifact.folder)
    whole = [name for name, kind in details["schemes"].items() if kind == WHOLE]
    assert 0 < len(whole) < len(details["schemes"]) == 14
    for module, kind in details["schemes"].items():
        assert stored[f"{module}.weight"].dtype == ("BF16" if kind == WHOLE else "F8_E4M3")
    assert 12.5 < artifact.bits_per_weight <= 13.0
    config = json.loads((artifact.folder / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", *whole}
    assert {finding.verdict for finding in served(artifact.folder)} == {"PASS"}
    (costs,) = (tmp_path / ".quantool" / "work").glob("fit-*.jsonl")
    lines = costs.read_text().splitlines(keepends=True)
    first = json.loads(lines[0]) | {"cost": 7.0}  # would not come out of measuring
    costs.write_text(json.dumps(first) + "\n" + "".join(lines[1:-1]) + lines[-1][:20])
    for record in (tmp_path / ".quantool").rglob("*FP8_DYNAMIC-fit*.json"):
        record.unlink()
    again = made(llama, tmp_path, "fp8", "FP8_DYNAMIC", quantization_config=options)
    found = costs_of(costs)
    assert found[first["group"], "FP8_DYNAMIC"] == 7.0
    assert len(found) == len(lines)
    kept = {name.rpartition(".")[0] for name, kind in again.details["schemes"].items() if kind == WHOLE}
    assert first["group"].rpartition(".")[0] in kept
