"""Experts with zero points: packed here by compressed-tensors' own function, without calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import structures
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file

from quantool.validation._engines import unpacked
from quantool.validation._engines.reference import load_model

GROUP = 32
pytestmark = pytest.mark.e2e


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels -8..7, zero points and bfloat16 scales of min-max rounding, and the numbers that they stand for."""
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).bfloat16().clamp(min=1e-4)
    zero = (-8 - low / scale.float()).round().clamp(-8, 7)
    level = (groups / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(-8, 7)
    numbers = ((level - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)).view_as(weight)
    return level.view_as(weight).to(torch.int8), zero.to(torch.int8), scale, numbers.bfloat16()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixture of experts in W4A16_ASYM, and the unquantized model of the same numbers."""
    plain = structures.write_moe(tmp_path_factory.mktemp("checkpoints") / "plain")
    folder = structures.write_moe(tmp_path_factory.mktemp("checkpoints") / "packed")
    source = load_file(plain / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, weight in source.items():
        if ".experts." not in name:
            stored[name] = weight
            continue
        level, zero, scale, source[name] = rounded(weight)
        module = name.removesuffix(".weight")
        stored[f"{module}.weight_packed"] = pack_to_int32(level, 4)
        stored[f"{module}.weight_zero_point"] = pack_to_int32(zero, 4, packed_dim=0).contiguous()
        stored[f"{module}.weight_scale"] = scale
        stored[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    save_file(source, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder, plain


def test_experts_with_zero_points_are_the_numbers_that_were_packed(packed: tuple[Path, Path]) -> None:
    models = [load_model(folder, "auto", "cpu", trust_remote_code=False) for folder in packed]
    weights = [model.state_dict() for model in models]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_only_what_transformers_cannot_load_is_unpacked(packed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, plain = packed
    assert unpacked.must_unpack(folder)
    assert not unpacked.must_unpack(plain)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    dense = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file(dense, tmp_path / "model.safetensors")
    assert not unpacked.must_unpack(tmp_path)


def test_experts_that_were_left_alone_beside_packed_layers(packed: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers would look for packed experts, and find none."""
    folder, plain = packed
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    source = load_file(plain / "model.safetensors")
    name = next(name for name in source if name.endswith("q_proj.weight"))
    level, zero, scale, numbers = rounded(source[name])
    module = name.removesuffix(".weight")
    stored = {other: tensor for other, tensor in source.items() if other != name}
    stored[f"{module}.weight_packed"] = pack_to_int32(level, 4)
    stored[f"{module}.weight_zero_point"] = pack_to_int32(zero, 4, packed_dim=0).contiguous()
    stored[f"{module}.weight_scale"] = scale
    stored[f"{module}.weight_shape"] = torch.tensor(source[name].shape)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = load_model(plain, "auto", "cpu", trust_remote_code=False).state_dict()
    for tensor, held in load_model(tmp_path, "auto", "cpu", trust_remote_code=False).state_dict().items():
        assert torch.equal(held, numbers if tensor == name else expected[tensor]), tensor
