"""The child that writes a checkpoint's tensors in another floating type, one tensor at a time.

The output is safetensors (header: 8 bytes little-endian length, JSON; https://github.com/huggingface/safetensors) with
the source's shard names, so memory stays at two tensors however large the checkpoint is.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from quantool.errors import QuantizationError
from quantool.runtime.worker import Report, preloaded

FLOATS = {"F64", "F32", "F16", "BF16"}
BYTES = {"F32": 4, "F16": 2, "BF16": 2}


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


def plan_header(tensors: dict[str, tuple[str, tuple[int, ...], int]], dtype: str) -> tuple[bytes, int]:
    """The header of a shard whose ``tensors`` (name to dtype, shape, bytes) are cast, and the bytes of its data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, shape, size) in tensors.items():
        written = dtype if kind in FLOATS else kind
        count = 1
        for length in shape:
            count *= length
        length = count * BYTES[written] if kind in FLOATS else size
        entries[name] = {"dtype": written, "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, at


def _shard(source: Path, target: Path, dtype: str) -> tuple[int, int]:
    import torch
    from safetensors import safe_open

    wanted = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    elements = 0
    with safe_open(source, framework="pt") as shard, target.open("wb") as file:
        tensors = {}
        for name in shard.offset_keys():  # as plan_header had them: the order decides the header's length
            part = shard.get_slice(name)
            tensors[name] = (part.get_dtype(), tuple(part.get_shape()), 0)
        for name, (kind, shape, _) in tensors.items():
            if kind not in FLOATS:
                tensors[name] = (kind, shape, shard.get_tensor(name).nbytes)
        header, data = plan_header(tensors, dtype)
        file.write(header)
        for name, (kind, _, _) in tensors.items():
            tensor = shard.get_tensor(name)
            elements += tensor.numel()
            if kind in FLOATS and tensor.dtype != wanted:
                tensor = _narrow(tensor, wanted, name)
            file.write(
                memoryview(tensor.contiguous().view(torch.uint8).reshape(-1).numpy())
                if tensor.dim()
                else tensor.reshape(1).view(torch.uint8).numpy().tobytes()
            )
    return elements, data


def _narrow(tensor: Any, wanted: Any, name: str) -> Any:
    import torch

    result = tensor.to(wanted)
    if torch.isinf(result).any() and not torch.isinf(tensor).any():
        raise QuantizationError(f"{name} overflows {wanted}", hint="use BF16")
    return result
