from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantool.errors import QuantizationError
from quantool.formats.int4_layouts import dequantize
from quantool.methods._compressed.autoawq import convert

ROWS, COLUMNS, GROUP = 16, 64, 32


def quiet(done: float, total: float) -> None:
    """Take progress reports."""


def write(folder: Path, *, symmetric: bool, scale: float = 0.01) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # type: ignore[import-untyped]

    torch.manual_seed(5)
    weight = torch.randint(-8, 8, (ROWS, COLUMNS), dtype=torch.int8)
    zeros = torch.randint(-8, 8, (ROWS, COLUMNS // GROUP), dtype=torch.int8)
    scales = (scale * (1 + torch.rand(ROWS, COLUMNS // GROUP))).bfloat16()
    tensors = {
        "a.q_proj.weight_packed": pack_to_int32(weight, 4),
        "a.q_proj.weight_scale": scales,
        "a.q_proj.weight_shape": torch.tensor([ROWS, COLUMNS]),
        "lm_head.weight": torch.randn(4, COLUMNS).bfloat16(),
    }
    if not symmetric:
        tensors["a.q_proj.weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"hidden_size": COLUMNS, "quantization_config": {}}))
    zero = torch.zeros_like(zeros) if symmetric else zeros
    levels = weight.float() - zero.float().repeat_interleave(GROUP, 1)
    return {"weight": levels * scales.float().repeat_interleave(GROUP, 1), "head": tensors["lm_head.weight"]}


def request(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"folder": str(folder), "layers": ["a.q_proj"], "ignore": ["lm_head"], "group": GROUP, **changes}


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_converted_layer_has_the_same_numbers(tmp_path: Path, *, symmetric: bool) -> None:
    original = write(tmp_path, symmetric=symmetric)
    assert convert(request(tmp_path), quiet) == {"layers": 1}
    found = load_file(tmp_path / "model.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items() if name != "lm_head.weight"} == {
        "a.q_proj.qweight": ((COLUMNS, ROWS // 8), torch.int32),
        "a.q_proj.qzeros": ((COLUMNS // GROUP, ROWS // 8), torch.int32),
        "a.q_proj.scales": ((COLUMNS // GROUP, ROWS), torch.float16),
    }
    parts = {name.removeprefix("a.q_proj."): t for name, t in found.items() if name.startswith("a.")}
    assert torch.equal(dequantize(parts), original["weight"])
    assert torch.equal(found["lm_head.weight"], original["head"])
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    assert not list(tmp_path.glob("*.converted"))


def test_a_scale_without_float16_is_refused(tmp_path: Path) -> None:
    write(tmp_path, symmetric=False, scale=1e-9)
    with pytest.raises(QuantizationError, match="float16"):
        convert(request(tmp_path), quiet)


def test_a_layer_that_was_not_quantized_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, symmetric=False)
    with pytest.raises(QuantizationError, match="1 of 2"):
        convert(request(tmp_path, layers=["a.q_proj", "a.k_proj"]), quiet)
