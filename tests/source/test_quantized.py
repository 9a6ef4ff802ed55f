"""Quantized checkpoints are read as the libraries that wrote them read them, and what cannot be read is refused by the headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_sources
import torch
from quantized_sources import FORMS
from safetensors.torch import load_file, save_file

from quantool.errors import SourceError
from quantool.formats.quantized_weights import mxfp4
from quantool.formats.safetensors import SINGLE, TensorHeader, check_index
from quantool.source import rewrite as rewriting
from quantool.source.rewrite import preparation_of, rewrite

TINY = Path(__file__).parents[1] / "models" / "tiny-chat"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    room = tmp_path_factory.mktemp("quantized")
    plain = quantized_sources.write_plain(TINY, room / "plain")
    return {
        name: (folder, quantized_sources.write(name, plain, folder))
        for number, name in enumerate(FORMS)
        for folder in [room / str(number)]
    }


def read(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    """What the worker makes of ``folder``."""
    target.mkdir()
    rewrite({"folder": str(folder), "target": str(target), "adapter": None}, lambda _done, _total: None)
    return load_file(target / SINGLE)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("elements", [1 << 13, 1 << 23])
def test_weights_are_bit_for_bit_those_of_the_library(
    name: str, elements: int, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a weight is computed some rows at a time."""
    monkeypatch.setattr(rewriting, "SLICE", elements)
    folder, expected = written[name]
    found = read(folder, tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", FORMS)
def test_what_is_planned_is_what_is_written(name: str, written: Any, tmp_path: Path) -> None:
    folder, _ = written[name]
    planned = preparation_of(folder, check_index(folder), None).made_headers()
    read(folder, tmp_path / "out")
    assert check_index(tmp_path / "out") == planned


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("FP8 channel", "FP8 (compressed-tensors)"),
        ("DeepSeek FP8", "FP8 in blocks of 128 x 128 (FP8 of transformers)"),
        ("INT4 group", "INT4 (compressed-tensors)"),
        ("GPTQ INT2", "INT2 (GPTQ)"),
        ("NVFP4", "NVFP4 (compressed-tensors)"),
    ],
)
def test_form_is_said(name: str, form: str, written: Any) -> None:
    folder, _ = written[name]
    unpacking = preparation_of(folder, check_index(folder), None).unpacking
    assert unpacking is not None
    assert unpacking.form == form
    dropped = {tensor.name.rpartition(".")[2] for tensor in unpacking.dropped}
    scale = "input_global_scale" if name == "NVFP4" else "input_scale"
    assert dropped == ({scale} if "compressed" in form else set())


def lost(written: Any, name: str, end: str) -> SourceError:
    """The refusal when the first tensor that ends in ``end`` is not there."""
    folder, _ = written[name]
    headers = check_index(folder)
    gone = next(key for key in headers if key.endswith(end))
    with pytest.raises(SourceError) as error:
        preparation_of(folder, {key: tensor for key, tensor in headers.items() if key != gone}, None)
    assert gone.rpartition(".")[0] in error.value.message
    return error.value


PARTS = {
    "FP8 channel": ("weight_scale", "proj.weight"),
    "DeepSeek FP8": ("weight_scale_inv", "proj.weight"),
    "INT4 asymmetric": ("weight_packed", "weight_scale", "weight_shape"),
    "AutoAWQ": ("qweight", "qzeros", "scales"),
    "NVFP4": ("weight_packed", "weight_scale", "weight_global_scale"),
    "ModelOpt NVFP4": ("proj.weight", "weight_scale", "weight_scale_2"),
    "GPTQ": ("qweight", "qzeros", "scales", "g_idx"),
}


@pytest.mark.parametrize(("name", "end"), [(name, end) for name, ends in PARTS.items() for end in ends])
def test_a_part_that_is_lost_is_named(name: str, end: str, written: Any) -> None:
    lost(written, name, end)


def test_scale_of_another_shape_is_refused(written: Any) -> None:
    folder, _ = written["DeepSeek FP8"]
    headers = check_index(folder)
    name = next(key for key in headers if key.endswith("scale_inv"))
    headers[name] = TensorHeader(name, "F32", (3, 7), SINGLE, 0, 84)
    with pytest.raises(SourceError, match="do not fit each other"):
        preparation_of(folder, headers, None)


SETTINGS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes"},
    "W4A8": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
    "no method": {"bits": 4},
    "mxfp4-pack-quantized": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
    "sparse-24-bitmask": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "sparsity_config": {"format": "sparse-24-bitmask"},
    },
    "rotated": {"quant_method": "compressed-tensors", "format": "float-quantized", "transform_config": {"a": 1}},
    "marlin": {"quant_method": "gptq", "checkpoint_format": "marlin"},
    "gemv": {"quant_method": "awq", "version": "gemv", "bits": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_form_that_cannot_be_read_is_refused_by_name(name: str, written: Any, tmp_path: Path) -> None:
    folder, _ = written["FP8 channel"]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS[name]}))
    with pytest.raises(SourceError, match="in a form that quantool cannot read") as error:
        preparation_of(tmp_path, check_index(folder), None)
    assert name.partition("-")[0] in error.value.message or name in ("no method", "rotated")
    assert error.value.hint == "start from the bf16 or f16 checkpoint it was made from"


def test_eight_bit_floats_without_a_configuration_are_refused(written: Any, tmp_path: Path) -> None:
    folder, _ = written["DeepSeek FP8"]
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"8 tensors are parts of quantized .* has no quantization_config"):
        preparation_of(tmp_path, check_index(folder), None)


def test_scales_may_be_exponents(written: Any) -> None:
    """DeepSeek-V3.1 and later store E8M0, as a type of its own or as bytes."""
    folder, _ = written["DeepSeek FP8"]
    headers = check_index(folder)
    name = next(key for key in headers if key.endswith("down_proj.weight"))
    grid = headers[f"{name}_scale_inv"]
    headers[grid.name] = TensorHeader(grid.name, "F8_E8M0", grid.shape, SINGLE, 0, grid.elements)
    weight = preparation_of(folder, headers, None).packed[name]
    exponents = torch.arange(grid.elements, dtype=torch.uint8).reshape(grid.shape) + 120
    values = torch.ones(weight.shape).to(torch.float8_e4m3fn)
    powers = 2.0 ** (exponents.float() - 127)
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        stored = {"weight": values, "scale": scale}
        found = weight.numbers(lambda part, rows, stored=stored: stored[part][rows], 0, weight.shape[0])  # type: ignore[misc]
        spread = powers.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(found, spread[: weight.shape[0], : weight.shape[1]])


def change(folder: Path, target: Path, alter: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / SINGLE)
    alter(tensors)
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    return target


def test_shape_that_contradicts_the_words_is_found(written: Any, tmp_path: Path) -> None:
    def alter(tensors: dict[str, torch.Tensor]) -> None:
        name = next(key for key in tensors if key.endswith("weight_shape"))
        tensors[name] = tensors[name] * 2

    folder = change(written["INT4 group"][0], tmp_path / "changed", alter)
    with pytest.raises(SourceError, match="weight_shape is "):
        read(folder, tmp_path / "out")


def test_group_beyond_the_scales_is_found(written: Any, tmp_path: Path) -> None:
    def alter(tensors: dict[str, torch.Tensor]) -> None:
        name = next(key for key in tensors if key.endswith("g_idx"))
        tensors[name] = tensors[name] + 100

    folder = change(written["GPTQ"][0], tmp_path / "changed", alter)
    with pytest.raises(SourceError, match="g_idx names group"):
        read(folder, tmp_path / "out")


def test_value_beyond_the_target_is_found(written: Any, tmp_path: Path) -> None:
    def alter(tensors: dict[str, torch.Tensor]) -> None:
        name = next(key for key in tensors if key.endswith("weight_scale"))
        tensors[name] = tensors[name].float() * 1e38

    folder = change(written["FP8 channel"][0], tmp_path / "changed", alter)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(SourceError, match="which F16 cannot hold"):
        read(folder, tmp_path / "out")


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 8, 4), generator=generator, dtype=torch.uint8)
    parts = {
        "blocks": TensorHeader("x_blocks", "U8", tuple(blocks.shape), SINGLE, 0, blocks.numel()),
        "scales": TensorHeader("x_scales", "U8", tuple(scales.shape), SINGLE, 0, scales.numel()),
    }
    weight = mxfp4("x", parts)
    stored = {"blocks": blocks, "scales": scales}
    found = torch.cat([weight.numbers(lambda part, rows: stored[part][rows], n, n + 1) for n in range(3)])
    expected = convert_moe_packed_tensors(blocks, scales)
    assert weight.shape == tuple(expected.shape)
    assert torch.equal(found.to(torch.bfloat16), expected)
    assert torch.equal(found.to(torch.bfloat16).float(), found)  # bf16 holds every value
