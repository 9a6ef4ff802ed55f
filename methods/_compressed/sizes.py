"""How the work on a level is cut: shards of a checkpoint, shards side by side, tokens of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantool.config.schema import Config
from quantool.formats.safetensors import SINGLE, TensorHeader
from quantool.formats.safetensors_layout import Stored

SHARD_BYTES = 5_000_000_000
"""Where calibrated checkpoints are cut; streamed ones keep the source's shards."""
MAX_SEQ_LENGTH = 512
WORKERS = 4


def split(tensors: Sequence[Stored]) -> dict[str, list[Stored]]:
    """Shards of at most 5 GB, filled in order: how calibrated levels are cut."""
    groups: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    names = (f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1))
    return dict(zip(names, groups, strict=True))


def workers(options: Any, located: Mapping[str, TensorHeader]) -> int:
    """How many shards are streamed side by side."""
    shards = len({tensor.file for tensor in located.values()})
    return min(options.workers or WORKERS, shards)


def max_seq_length(config: Config) -> int:
    """Tokens of a calibration sample."""
    value = (config.calibration_config or {}).get("max_seq_length")
    return value if isinstance(value, int) else MAX_SEQ_LENGTH
