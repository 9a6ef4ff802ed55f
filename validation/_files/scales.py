"""Numbers of a safetensors folder that make or break a layer: scales, and eight-bit floats that are no number.

Scales are read whole while they have at most ``WHOLE`` bytes together, else ``RUNS`` runs of each tensor; of eight-bit
weights only runs are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantool.formats.safetensors import BITS, TensorHeader, some
from quantool.records import Finding
from quantool.source.mtp import part_of
from quantool.validation._files.modules import Numbers
from quantool.validation._findings.builder import FindingBuilder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WHOLE = 64 << 20
RUNS = 16
RUN = 4096
"""Bytes."""
SCALES = ("weight_scale", "input_scale", "scales", "k_scale", "v_scale")
READ = {"F16": "<f2", "F32": "<f4", "BF16": "<u2"}
E4M3_NAN = 0x7F
"""Without its sign bit: the one pattern of F8_E4M3 that is no number (OCP 8-bit floating point, table 1)."""


def judge_scales(folder: Path, stored: Mapping[str, TensorHeader], build: FindingBuilder) -> list[Finding]:
    """Scales are finite and above 0, eight-bit weights are numbers; nothing to say of a folder without them."""
    scales = [
        tensor
        for tensor in stored.values()
        if tensor.name.rpartition(".")[2] in SCALES and tensor.dtype in READ
    ]
    weights = [tensor for tensor in stored.values() if tensor.dtype == "F8_E4M3"]
    if not scales and not weights:
        return []
    whole = sum(tensor.bytes for tensor in scales) <= WHOLE
    problems, read = [], 0
    for tensor in scales:
        raw = _read(folder, tensor, whole=whole)
        read += len(raw) * 8 // BITS[tensor.dtype]
        problems += _bad_scale(tensor, raw)
    for tensor in weights:
        raw = _read(folder, tensor, whole=False)
        if broken := int(((raw & E4M3_NAN) == E4M3_NAN).sum()):
            problems.append(f"{tensor.name}: {broken} of {len(raw)} weights read are NaN")
    total = sum(tensor.elements for tensor in scales)
    measured = f"{read} of {total} scales of {len(scales)} tensors read"
    return [build.fact("scales", measured, "; ".join(problems[:4]))]


def _bad_scale(tensor: TensorHeader, raw: NDArray[np.uint8]) -> list[str]:
    import numpy as np

    values = raw.view(READ[tensor.dtype])
    if tensor.dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    broken = int(np.count_nonzero(~np.isfinite(values)))
    low = int(np.count_nonzero(values <= 0))
    if broken:
        return [f"{tensor.name}: {broken} of {len(values)} scales are NaN or infinite"]
    return [f"{tensor.name}: {low} of {len(values)} scales are not above 0"] if low else []


def _read(folder: Path, tensor: TensorHeader, *, whole: bool) -> NDArray[np.uint8]:
    """The bytes of a tensor, or runs spread over it."""
    import numpy as np

    with (folder / tensor.file).open("rb") as file:
        if whole or tensor.bytes <= RUNS * RUN:
            file.seek(tensor.start)
            return np.frombuffer(file.read(tensor.bytes), np.uint8)
        step = (tensor.bytes - RUN) // (RUNS - 1) // 8 * 8
        parts = []
        for number in range(RUNS):
            file.seek(tensor.start + number * step)
            parts.append(np.frombuffer(file.read(RUN), np.uint8))
        return np.concatenate(parts)


def judge_cache(
    stored: Mapping[str, TensorHeader],
    promised: Numbers | None,
    wanted: object,
    layers: int,
    build: FindingBuilder,
) -> list[Finding]:
    """Every attention layer has scales for its cache where config.json, or the plan (``wanted``), says so.

    No text is run through a multi-token-prediction head behind the ``layers``, which has none.
    """
    scales = [name for name in stored if name.endswith((".k_scale", ".v_scale"))]
    if promised is None and not wanted and not scales:
        return []
    problems = []
    if wanted and promised is None:
        problems.append(f"the plan asks for kv_cache: {wanted}, config.json has no kv_cache_scheme")
    if promised is None and scales:
        problems.append(f"config.json has no kv_cache_scheme, but there are scales: {some(scales)}")
    if promised is not None and not promised.dynamic:
        problems += _without_scales([name for name in stored if part_of(name, layers) is None])
    return [build.fact("kv_cache", f"{len(scales)} scales", "; ".join(problems))]


def _without_scales(stored: Sequence[str]) -> list[str]:
    layers = {name.rpartition(".k_proj.")[0] for name in stored if ".k_proj." in name}
    missing: Sequence[str] = sorted(
        f"{layer}.{part}_scale" for layer in layers for part in "kv" if f"{layer}.{part}_scale" not in stored
    )
    return [f"kv_cache_scheme is static, but there is no {some(missing)}"] if missing else []
