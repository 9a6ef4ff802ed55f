"""The child that writes a checkpoint's tensors in another floating type, one tensor at a time.

The output has the source's shards and their order, so memory stays at two tensors however large the checkpoint is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantool.errors import QuantizationError
from quantool.formats.safetensors import read_header
from quantool.formats.safetensors_layout import Stored, as_stored, encode_in_order
from quantool.runtime.worker import Report, preloaded

FLOATS = {"F64", "F32", "F16", "BF16"}


@preloaded("torch")
def cast(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Write ``files`` (shard names) of ``source`` below ``target`` with floating tensors as ``dtype`` (F16, BF16, F32).

    Integer and boolean tensors stay as they are. Raises QuantizationError naming a tensor that becomes infinite.
    Result: ``elements`` and ``data_bytes`` written.
    """
    source, target, dtype = Path(request["source"]), Path(request["target"]), request["dtype"]
    total = sum((source / name).stat().st_size for name in request["files"])
    done = elements = data = 0
    for name in request["files"]:
        counted = _shard(source / name, target / name, dtype)
        elements, data = elements + counted[0], data + counted[1]
        done += (source / name).stat().st_size
        report(done, total)
    return {"elements": elements, "data_bytes": data}


def cast_tensors(tensors: Iterable[Stored], dtype: str) -> list[Stored]:
    """What stands for ``tensors`` when those that are floats become ``dtype``."""
    return [
        Stored(tensor.name, dtype if tensor.dtype in FLOATS else tensor.dtype, tensor.shape)
        for tensor in tensors
    ]


def _shard(source: Path, target: Path, dtype: str) -> tuple[int, int]:
    """Write one file; elements and bytes of data."""
    import torch
    from safetensors import safe_open

    wanted = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    tensors = cast_tensors(map(as_stored, read_header(source)), dtype)
    with safe_open(source, framework="pt") as shard, target.open("wb") as file:
        file.write(encode_in_order(tensors)[0])
        for stored in tensors:
            tensor = shard.get_tensor(stored.name)
            if stored.dtype == dtype and tensor.dtype != wanted:
                tensor = _narrow(tensor, wanted, stored.name)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sum(math.prod(stored.shape) for stored in tensors), sum(stored.bytes for stored in tensors)


def _narrow(tensor: Any, wanted: Any, name: str) -> Any:
    import torch

    result = tensor.to(wanted)
    if torch.isinf(result).any() and not torch.isinf(tensor).any():
        raise QuantizationError(f"{name} overflows {wanted}", hint="use BF16")
    return result
