"""FP8 without calibration, streamed: a few rows at a time from the source's shards to shards of the same names.

The numbers come from llmcompressor's ``model_free_ptq`` machinery (``entrypoints/model_free/converter.py``), which
takes a whole shard at once. FP8_DYNAMIC and FP8_BLOCK never look beyond a row or 128 rows, so giving it slices yields
the same bytes while the memory depends neither on the shard nor on the tensor. Where every byte goes is known before
the first is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import DependencyError, SourceError
from quantool.formats.fused_experts import split_experts
from quantool.formats.safetensors import TensorHeader, read_headers
from quantool.formats.safetensors_layout import Stored, as_stored, encode, write_index
from quantool.methods._compressed.schemes import BLOCK, WeightScheme
from quantool.methods._compressed.torch_setup import choose_device, peak_memory, write_config
from quantool.runtime.worker import Report, preloaded

if TYPE_CHECKING:
    from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter

SLICE = 1 << 23
"""Source bytes that one worker takes at a time; quantizing them takes about thirty times as much."""


@preloaded("llmcompressor")
def quantize(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker that writes a whole checkpoint.

    Request: ``source`` and ``output`` (folders), ``shards`` (names), ``scheme`` (fields of ``WeightScheme``), ``layers``
    (tensor names), ``head`` (tensors of a multi-token-prediction head), ``targets``, ``ignore``, ``workers``, ``device``. Writes shards, index (if the source has several shards) and config.json. Result: ``device``, ``peak_rss``,
    ``peak_cuda`` (bytes).
    """
    device = choose_device(request["device"])
    import torch
    from compressed_tensors.quantization import (  # type: ignore[import-untyped]
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )
    from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter
    from llmcompressor.entrypoints.model_free.save_utils import update_config
    from llmcompressor.entrypoints.model_free.validate import validate_config

    source, output = Path(request["source"]), Path(request["output"])
    scheme = WeightScheme(**request["scheme"])
    config = validate_config(
        QuantizationConfig(
            config_groups={"group_0": preset_name_to_scheme(scheme.preset, list(request["targets"]))},
            quantization_status=QuantizationStatus.INITIALIZED,
            ignore=list(request["ignore"]),
        ),
        None,
        (),
    )
    headers = split_experts(read_headers([source / name for name in request["shards"]]), request["head"])
    writer = _CheckpointWriter(
        source, output, headers, frozenset(request["layers"]), scheme, ModelFreePtqConverter(config), device
    )
    meter = _BytesRead(sum(tensor.bytes for tensor in headers.values()), report)
    try:
        with ThreadPoolExecutor(request["workers"]) as pool:
            written = list(pool.map(lambda shard: writer.convert(shard, meter), request["shards"]))
    except torch.OutOfMemoryError as error:
        raise DependencyError(
            f"CUDA ran out of memory: {str(error).splitlines()[0]}",
            hint=f"lower quantization_config.workers (now {request['workers']}), free the GPU of other work, or set "
            "device: cpu",
        ) from error
    write_index(output, dict(written))
    (output / "config.json").write_bytes((source / "config.json").read_bytes())
    update_config(output, config)
    write_config(source, output)
    return {"device": device, **peak_memory()}


@dataclass(frozen=True)
class _CheckpointWriter:
    """What all shards share."""

    source: Path
    output: Path
    headers: Mapping[str, TensorHeader]
    layers: frozenset[str]
    scheme: WeightScheme
    converter: ModelFreePtqConverter
    device: str

    def convert(self, shard: str, meter: _BytesRead) -> tuple[str, list[Stored]]:
        """Write one shard; returns its name and tensors."""
        tensors = [tensor for tensor in self.headers.values() if tensor.file == shard]
        stored: list[Stored] = []
        for tensor in tensors:
            stored += self.represent(tensor)
        head, starts = encode(stored)
        with (
            (self.source / shard).open("rb", buffering=0) as reading,
            (self.output / shard).open("wb") as writing,
        ):
            out = writing.fileno()
            os.pwrite(out, head, 0)
            for tensor in tensors:
                pieces = self._quantized if tensor.name in self.layers else self._copied
                offsets = dict(starts)
                for name, data in pieces(reading.fileno(), tensor, meter):
                    _write(out, data, offsets[name])
                    offsets[name] += len(data)
        return shard, stored

    def represent(self, tensor: TensorHeader) -> list[Stored]:
        """What is written for ``tensor``."""
        if tensor.name in self.layers:
            return self.scheme.tensors(tensor)
        return [as_stored(tensor)]

    def _copied(self, file: int, tensor: TensorHeader, meter: _BytesRead) -> Iterator[tuple[str, bytes]]:
        for start in range(tensor.start, tensor.end, SLICE):
            data = _read(file, min(SLICE, tensor.end - start), start)
            yield tensor.name, data
            meter.add(len(data))

    def _quantized(self, file: int, tensor: TensorHeader, meter: _BytesRead) -> Iterator[tuple[str, bytes]]:
        """Slices of the quantized weight and of its scales, in the order of the rows."""
        import torch

        rows, columns = tensor.shape
        row = tensor.bytes // rows
        step = max(SLICE // row // BLOCK, 1) * BLOCK
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[tensor.dtype]
        for first in range(0, rows, step):
            count = min(step, rows - first)
            data = bytearray(_read(file, count * row, tensor.start + first * row))
            weight = torch.frombuffer(data, dtype=dtype).view(count, columns).to(self.device)
            for name, value in self.converter.process({tensor.name: weight}).items():
                yield name, value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            meter.add(len(data))


class _BytesRead:
    """Bytes read by all workers."""

    def __init__(self, total: int, report: Report) -> None:
        self._total, self._report = total, report
        self._lock, self._done = threading.Lock(), 0

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._report(self._done, self._total)


def _read(file: int, size: int, position: int) -> bytes:
    data = os.pread(file, size, position)
    if len(data) != size:
        raise SourceError("a weight file shrank while it was read")
    return data


def _write(file: int, data: bytes, position: int) -> None:
    """``pwrite`` all of ``data``; one call writes at most 2 GiB."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count
