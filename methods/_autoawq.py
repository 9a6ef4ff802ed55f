"""The AutoAWQ (GEMM) layout, written from a compressed-tensors W4A16 checkpoint without loss.

Layout, as ``awq/modules/linear/gemm.py`` of AutoAWQ 0.2.9 reads it: weights and zero points are unsigned 4-bit numbers,
the weight is transposed to [in, out], and eight neighbours along ``out`` share an int32, the one at position
``ORDER[k]`` in bits ``4 k``. ``qweight`` [in, out / 8], ``qzeros`` [in / group, out / 8], ``scales`` [in / group, out]
in float16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import QuantizationError
from quantool.methods._layout import Stored
from quantool.weights import INDEX, TensorHeader, read_headers
from quantool.worker import Report

if TYPE_CHECKING:
    import torch

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
PER_WORD = 8
NEW = ".converted"


def tensors(layer: TensorHeader, group: int) -> list[Stored]:
    """What stands for the weight [out, in] of ``layer``."""
    name, (rows, columns) = layer.name.removesuffix(".weight"), layer.shape
    groups, words = columns // group, rows // PER_WORD
    return [
        Stored(f"{name}.qweight", "I32", (columns, words)),
        Stored(f"{name}.qzeros", "I32", (groups, words)),
        Stored(f"{name}.scales", "F16", (groups, rows)),
    ]


def convert(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker that rewrites the compressed-tensors checkpoint in ``folder`` in place.

    Request: ``folder``, ``layers`` (module names), ``ignore`` (module names left alone), ``group``. Each file is read back and dequantized; it must give the very numbers of the compressed-tensors one. Raises
    QuantizationError where it does not, or where a scale has no float16. Result: ``layers`` compared.
    """
    folder, layers = Path(request["folder"]), set(request["layers"])
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    located = read_headers([folder / shard for shard in shards])
    compared = 0
    for shard in shards:
        _write_shard(folder, shard, located, layers)
        for module in _packed(located, shard):
            _prove(
                module, _converted_parts(folder / f"{shard}{NEW}", module), _parts(folder, located, module)
            )
            compared += 1
            report(compared, len(layers))
    if compared != len(layers):
        raise QuantizationError(
            f"{compared} of {len(layers)} quantized layers were found for the AutoAWQ layout"
        )
    for shard in shards:
        (folder / f"{shard}{NEW}").replace(folder / shard)
    _describe(folder, shards, request["ignore"], request["group"])
    return {"layers": compared}


def pack(values: torch.Tensor) -> torch.Tensor:
    """Numbers 0..15 [n, out] to int32 [n, out / 8]."""
    import torch

    ordered = values.to(torch.int64).view(len(values), -1, PER_WORD)[:, :, list(ORDER)]
    words = (ordered << (4 * torch.arange(PER_WORD))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack``, as int32."""
    import torch

    shifts = 4 * torch.arange(PER_WORD)
    ordered = (words.to(torch.int64).unsqueeze(-1) >> shifts) & 15
    inverse = torch.tensor(ORDER).argsort()
    return ordered[:, :, inverse].reshape(len(words), -1).to(torch.int32)


def dequantize(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [out, in] in float32 that ``qweight``, ``qzeros`` and ``scales`` stand for."""
    weight, zeros, scales = unpack(parts["qweight"]), unpack(parts["qzeros"]), parts["scales"].float()
    group = len(weight) // len(zeros)
    return ((weight - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).T


def _numbers(parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] and zero points [out, groups] of a compressed-tensors layer as numbers 0..15."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
        unpack_from_int32,
    )

    scale, shape = parts["weight_scale"], torch.Size(parts["weight_shape"].tolist())
    weight = unpack_from_int32(parts["weight_packed"], 4, shape).to(torch.int32) + 8
    if "weight_zero_point" not in parts:
        return weight, torch.full(scale.shape, 8, dtype=torch.int32)
    zeros = unpack_from_int32(parts["weight_zero_point"], 4, scale.shape, packed_dim=0)
    return weight, zeros.to(torch.int32) + 8


def _convert_layer(module: str, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    weight, zeros = _numbers(parts)
    scales = parts["weight_scale"].to(torch.float16)
    if not torch.equal(scales.double(), parts["weight_scale"].double()):
        raise QuantizationError(
            f"{module}: a scale has no equal in float16, so the AutoAWQ layout would lose precision",
            hint="quantization_config.format: compressed-tensors",
        )
    return {
        f"{module}.qweight": pack(weight.T),
        f"{module}.qzeros": pack(zeros.T),
        f"{module}.scales": scales.T.contiguous(),
    }


def _prove(module: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    import torch

    weight, zeros = _numbers(theirs)
    scales = theirs["weight_scale"].float()
    group = weight.shape[1] // scales.shape[1]
    expected = (weight - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
    if not torch.equal(dequantize(ours), expected):
        raise QuantizationError(f"{module}: the AutoAWQ layout does not give the numbers it was made from")


def _packed(located: Mapping[str, TensorHeader], shard: str) -> list[str]:
    """Modules whose packed weight is in ``shard``."""
    end = ".weight_packed"
    return [n.removesuffix(end) for n, tensor in located.items() if tensor.file == shard and n.endswith(end)]


def _parts(folder: Path, located: Mapping[str, TensorHeader], module: str) -> dict[str, torch.Tensor]:
    """A layer's tensors; they can lie in several shards."""
    from safetensors import safe_open

    found = {}
    for part in PARTS:
        tensor = located.get(f"{module}.{part}")
        if tensor is not None:
            with safe_open(folder / tensor.file, framework="pt") as file:
                found[part] = file.get_tensor(tensor.name)
    return found


def _converted_parts(path: Path, module: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {part: file.get_tensor(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")}


def _write_shard(folder: Path, shard: str, located: Mapping[str, TensorHeader], layers: set[str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    written: dict[str, torch.Tensor] = {}
    with safe_open(folder / shard, framework="pt") as file:
        for name, tensor in located.items():
            if tensor.file == shard and name.rpartition(".")[0] not in layers:
                written[name] = file.get_tensor(name)
    for module in _packed(located, shard):
        written |= _convert_layer(module, _parts(folder, located, module))
    save_file(written, folder / f"{shard}{NEW}", metadata={"format": "pt"})


def _describe(folder: Path, shards: list[str], ignore: list[str], group: int) -> None:
    """config.json and index for the new layout."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "modules_to_not_convert": ignore,
    }
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (folder / INDEX).exists():
        located = read_headers([folder / shard for shard in shards])
        weight_map = {name: tensor.file for name, tensor in sorted(located.items())}
        total = sum(tensor.bytes for tensor in located.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
