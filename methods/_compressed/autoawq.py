"""The AutoAWQ layout (``quantool.formats.int4_layouts``), written from a compressed-tensors W4A16 checkpoint without loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import ConfigError, QuantizationError
from quantool.formats.int4_layouts import (
    BITS,
    COMPRESSED_PARTS,
    PARTS,
    PER_WORD,
    dequantize,
    dequantize_compressed,
    numbers,
    pack,
)
from quantool.formats.safetensors import TensorHeader, read_headers
from quantool.formats.safetensors_layout import Stored, as_stored, by_shard, write_index
from quantool.methods._compressed.schemes import HEAD, Selection, WeightScheme
from quantool.records import Source
from quantool.runtime.worker import Report, preloaded

if TYPE_CHECKING:
    import torch

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


def refuse(level: str, scheme: WeightScheme, selection: Selection, source: Source) -> None:
    """ConfigError for what this layout cannot hold."""
    if not source.facts.task.generates:
        raise ConfigError(
            f"format: autoawq is for models that write text; {source.name} is for {source.facts.task.kind}",
            hint="leave format out: transformers and vLLM read compressed-tensors",
        )
    if scheme.bits != 4:
        raise ConfigError(f"format: autoawq holds 4-bit weights, not {level}", hint="W4A16 or W4A16_ASYM")
    if any(layer.name == f"{HEAD}.weight" for layer in selection.layers):
        raise ConfigError(
            "format: autoawq keeps the output head in full precision",
            hint="put lm_head into quantization_config.ignore",
        )
    odd = [layer.name for layer in selection.layers if layer.shape[0] % PER_WORD]
    if odd:
        raise ConfigError(
            f"format: autoawq packs eight outputs a word, which {', '.join(odd[:3])} cannot",
            hint="put them into quantization_config.ignore",
        )


@preloaded("torch")
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


def _convert_layer(module: str, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    weight, zeros = numbers(parts)
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

    if not torch.equal(dequantize(ours), dequantize_compressed(theirs)):
        raise QuantizationError(f"{module}: the AutoAWQ layout does not give the numbers it was made from")


def _packed(located: Mapping[str, TensorHeader], shard: str) -> list[str]:
    """Modules whose packed weight is in ``shard``."""
    end = ".weight_packed"
    return [n.removesuffix(end) for n, tensor in located.items() if tensor.file == shard and n.endswith(end)]


def _parts(folder: Path, located: Mapping[str, TensorHeader], module: str) -> dict[str, torch.Tensor]:
    """A layer's tensors; they can lie in several shards."""
    from safetensors import safe_open

    found = {}
    for part in COMPRESSED_PARTS:
        tensor = located.get(f"{module}.{part}")
        if tensor is not None:
            with safe_open(folder / tensor.file, framework="pt") as file:
                found[part] = file.get_tensor(tensor.name)
    return found


def _converted_parts(path: Path, module: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {part: file.get_tensor(f"{module}.{part}") for part in PARTS}


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
        "bits": BITS,
        "group_size": group,
        "zero_point": True,
        "modules_to_not_convert": ignore,
    }
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    located = read_headers([folder / shard for shard in shards])
    write_index(folder, {name: [*map(as_stored, tensors)] for name, tensors in by_shard(located).items()})
