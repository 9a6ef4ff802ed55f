"""Checkpoints that are quantized already, as their makers' own libraries write them, and what those libraries make of them.

``write(form, plain, folder)`` quantizes the linear layers of the plain checkpoint and returns what each weight must be read as.
compressed-tensors compresses and decompresses by itself; transformers' formulas stand for FP8 blocks and MXFP4; AutoAWQ's and
AutoGPTQ's layouts are packed here number by number, as their kernels read them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
Layer = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
"""A weight to what is stored for it (by the end of the name) and what that must be read as."""
BLOCK = 128
GROUP = 32


def write_plain(like: Path, folder: Path) -> Path:
    """Two layers of odd sizes in ``folder``, with the config.json of the checkpoint ``like``: nothing that would run."""
    folder.mkdir()
    shutil.copyfile(like / "config.json", folder / "config.json")
    generator = torch.Generator().manual_seed(0)
    sizes = {"self_attn.q_proj": (160, 192), "mlp.down_proj": (96, 320)}
    tensors = {"model.norm.weight": torch.ones(192)} | {
        f"model.layers.{layer}.{name}.weight": 0.02 * torch.randn(size, generator=generator)
        for layer in range(2)
        for name, size in sizes.items()
    }
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(form: str, plain: Path, folder: Path) -> Parts:
    """Quantize ``plain`` into ``folder``; the weights that must come out, by name."""
    layer, settings = FORMS[form]
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": settings}), encoding="utf-8"
    )
    tensors, stored, expected = load_file(plain / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        if not is_layer(name):
            stored[name] = expected[name] = tensor
            continue
        parts, read = layer(tensor)
        module = name.removesuffix("weight")
        stored |= {f"{module}{end}": part.contiguous() for end, part in parts.items()}
        expected[name] = read.to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return expected


def is_layer(name: str) -> bool:
    """Whether a weight of the plain checkpoint is quantized."""
    return name.startswith("model.layers.") and name.endswith("proj.weight")


def _compressed(settings: dict[str, Any], grid: str) -> Layer:
    """A layer by compressed-tensors' own compressor; ``grid`` is the sharing of scales."""

    def layer(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor  # type: ignore[import-untyped]
        from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor  # type: ignore[import-untyped]
        from compressed_tensors.quantization import QuantizationScheme  # type: ignore[import-untyped]

        scheme = QuantizationScheme.model_validate({"targets": ["Linear"], **settings})
        maker = (
            PackedQuantizationCompressor
            if settings["format"] == "pack-quantized"
            else NaiveQuantizationCompressor
        )
        limit = (
            448.0
            if settings["weights"]["type"] == "float"
            else 2.0 ** (settings["weights"]["num_bits"] - 1) - 1
        )
        peak = _peaks(weight.float(), grid)
        state = {"weight": weight, "weight_scale": (peak / limit).to(torch.bfloat16)}
        if not settings["weights"]["symmetric"]:
            generator = torch.Generator().manual_seed(int(weight.numel()))
            state["weight_zero_point"] = torch.randint(-5, 6, peak.shape, generator=generator).to(torch.int8)
        stored = maker.compress(state, scheme)
        read = maker.decompress(stored, scheme)["weight"]
        return {"input_scale": torch.ones(1), **stored}, read

    return layer


def _peaks(weight: torch.Tensor, grid: str) -> torch.Tensor:
    rows, columns = weight.shape
    if grid == "tensor":
        return weight.abs().max().reshape(1)
    if grid == "channel":
        return weight.abs().amax(1, keepdim=True)
    if grid == "group":
        return weight.abs().reshape(rows, -1, GROUP).amax(2)
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = weight.abs()
    return padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK).amax((1, 3))


def _fp8_blocks(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """As DeepSeek-V3's ``fp8_cast_bf16.py`` reads it: element times the scale of its block, in float32."""
    scale = _peaks(weight.float(), "block") / 448
    spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: len(weight), : weight.shape[1]]
    stored = (weight.float() / spread).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * spread


def _fp8(grid: str) -> Layer:
    """One scale a tensor or row: ModelOpt's ``weight_scale``, FBGEMM's ``[rows, 1]``."""

    def layer(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        peak = _peaks(weight.float(), grid)
        scale = (peak if grid == "channel" else peak.reshape(())) / 448
        stored = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {
            "weight": stored,
            "weight_scale": scale,
            "input_scale": torch.ones(()),
        }, stored.float() * scale

    return layer


def _nvfp4(*, modelopt: bool) -> Layer:
    """E2M1 in groups of 16 by compressed-tensors' own compressor; ModelOpt stores the same numbers, and the inverse second scale."""

    def layer(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor  # type: ignore[import-untyped]
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.quant_scheme import NVFP4A16  # type: ignore[import-untyped]

        scheme = QuantizationScheme(targets=["Linear"], **NVFP4A16)
        whole = (448 * 6 / weight.float().abs().max()).reshape(1)
        peak = weight.float().abs().reshape(len(weight), -1, 16).amax(2)
        scale = (peak / 6 * whole).to(torch.float8_e4m3fn)
        state = {"weight": weight.float(), "weight_scale": scale.float(), "weight_global_scale": whole}
        stored = NVFP4PackedCompressor.compress(state, scheme)
        if not modelopt:
            read = NVFP4PackedCompressor.decompress(stored, scheme)["weight"]
            return {**stored, "input_global_scale": torch.ones(1)}, read
        second = (1 / whole).reshape(())
        halves = torch.stack([stored["weight_packed"] & 15, stored["weight_packed"] >> 4], -1).flatten(1)
        values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])[(halves & 7).long()] * (
            1 - 2 * (halves >> 3).float()
        )
        read = values * (scale.float() * second).repeat_interleave(16, 1)
        parts = {"weight": stored["weight_packed"], "weight_scale": scale, "weight_scale_2": second}
        return {**parts, "input_scale": torch.ones(())}, read

    return layer


def _autoawq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """``WQLinear_GEMM`` of AutoAWQ 0.2.9: eight neighbours along the output share a word, in the order 0 2 4 6 1 3 5 7."""
    rows, columns = weight.shape
    scale = (_peaks(weight.float(), "group") / 7).half()
    numbers = _levels(weight, scale, 8, 15)
    zeros = torch.full((rows, columns // GROUP), 8)
    read = (numbers - 8).float() * scale.float().repeat_interleave(GROUP, 1)
    parts = {"qweight": _awq_words(numbers.T), "qzeros": _awq_words(zeros.T), "scales": scale.T}
    return parts, read


def _levels(weight: torch.Tensor, scale: torch.Tensor, zero: int, top: int) -> torch.Tensor:
    return (weight.float() / scale.float().repeat_interleave(GROUP, 1)).round().add(zero).clamp(0, top).long()


def _awq_words(numbers: torch.Tensor) -> torch.Tensor:
    words = torch.zeros(len(numbers), numbers.shape[1] // 8, dtype=torch.int64)
    for place, neighbour in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= numbers[:, neighbour::8] << (4 * place)
    return _int32(words)


def _gptq(bits: int, offset: int, *, ordered: bool) -> Layer:
    """``QuantLinear`` of AutoGPTQ 0.7.1: words along the input, zero points less one in the first version of the layout."""

    def layer(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        rows, columns = weight.shape
        middle, top = 1 << (bits - 1), (1 << bits) - 1
        order = (
            torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
            if ordered
            else torch.arange(columns)
        )
        groups = torch.empty(columns, dtype=torch.int32)
        groups[order] = (torch.arange(columns) // GROUP).int()
        peak = torch.stack([weight.float()[:, groups == g].abs().amax(1) for g in range(columns // GROUP)], 1)
        scale = (peak / (middle - 1 if bits > 2 else 1)).half()
        spread = scale.float()[:, groups.long()]
        numbers = (weight.float() / spread).round().add(middle).clamp(0, top).long()
        zeros = torch.full((columns // GROUP, rows), middle - offset)
        parts = {
            "qweight": _words(numbers.T, bits, 0), "qzeros": _words(zeros, bits, 1), "scales": scale.T, "g_idx": groups,
        }  # fmt: skip
        return parts, (numbers - middle).float() * spread

    return layer


def _words(numbers: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    per_word = 32 // bits
    moved = numbers.movedim(axis, 0)
    words = sum(moved[place::per_word] << (bits * place) for place in range(per_word))
    return _int32(torch.as_tensor(words)).movedim(0, axis)


def _int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _scheme(kind: str, bits: int, strategy: str, form: str, *, symmetric: bool = True) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric}
    if strategy == "group":
        weights["group_size"] = GROUP
    if strategy == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
    return {"weights": weights, "format": form}


def _of_compressed(settings: dict[str, Any]) -> tuple[Layer, dict[str, Any]]:
    written = {
        "quant_method": "compressed-tensors",
        "format": settings["format"],
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], **settings}},
    }
    return _compressed(settings, settings["weights"]["strategy"]), written


GPTQ_4 = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
FORMS: dict[str, tuple[Layer, dict[str, Any]]] = {
    "FP8 tensor": _of_compressed(_scheme("float", 8, "tensor", "float-quantized")),
    "FP8 channel": _of_compressed(_scheme("float", 8, "channel", "float-quantized")),
    "FP8 block": _of_compressed(_scheme("float", 8, "block", "float-quantized")),
    "INT8 channel": _of_compressed(_scheme("int", 8, "channel", "int-quantized")),
    "INT8 asymmetric": _of_compressed(_scheme("int", 8, "channel", "int-quantized", symmetric=False)),
    "INT4 group": _of_compressed(_scheme("int", 4, "group", "pack-quantized")),
    "INT4 asymmetric": _of_compressed(_scheme("int", 4, "group", "pack-quantized", symmetric=False)),
    "INT8 packed": _of_compressed(_scheme("int", 8, "channel", "pack-quantized")),
    "DeepSeek FP8": (_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}),
    "ModelOpt FP8": (_fp8("tensor"), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "ModelOpt NVFP4": (_nvfp4(modelopt=True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "NVFP4": (
        _nvfp4(modelopt=False),
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}},
    ),
    "FBGEMM FP8": (_fp8("channel"), {"quant_method": "fbgemm_fp8"}),
    "AutoAWQ": (_autoawq, {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP}),
    "GPTQ": (_gptq(4, 1, ordered=False), GPTQ_4),
    "GPTQ act-order": (_gptq(4, 1, ordered=True), GPTQ_4 | {"desc_act": True}),
    "GPTQ v2 INT8": (_gptq(8, 0, ordered=False), GPTQ_4 | {"bits": 8, "checkpoint_format": "gptq_v2"}),
    "GPTQ INT2": (_gptq(2, 1, ordered=False), GPTQ_4 | {"bits": 2}),
}
"""Name to what is stored for a layer, and ``quantization_config``."""
