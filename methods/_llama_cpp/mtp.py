"""The type of a multi-token-prediction head in a GGUF, which llama.cpp keeps in the blocks behind the model's last layer.

No calibration text goes through these blocks (llama.cpp PR #23575), so there is nothing about them in an importance matrix, and
few bits ruin them: published heads in 4 bits draft 0 to 4 % right, in 8 bits as many as unquantized ones. So they get a
type of their own, as an entry of ``tensor_types``, where the plan and every check read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantool.errors import ConfigError
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import TensorHeader
from quantool.records import Source
from quantool.source.mtp import head_tensors, promised_layers

UNQUANTIZED = frozenset({"F32", "F16", "BF16", "COPY"})
"""Levels that change no type."""


def head_pattern(source: Source, tensors: Mapping[str, TensorHeader]) -> str | None:
    """A regular expression for the head's tensors in a GGUF; None for a checkpoint without one."""
    first = source.facts.layers
    if not head_tensors(tensors, first):
        return None
    count = max(1, promised_layers(read_json(source.folder / "config.json")))
    blocks = "|".join(str(number) for number in range(first, first + count))
    return rf"^blk\.({blocks})\."


def with_head(types: Mapping[str, str], pattern: str | None, kind: str | None, level: str) -> dict[str, str]:
    """``tensor_types`` of a level, in which the head (``pattern``) has the type ``kind`` unless the user names another."""
    if pattern is None or kind is None or level in UNQUANTIZED:
        return dict(types)
    return {**types, pattern: kind}


def require_types(level: str, names: Sequence[str], *, needs_matrix: bool) -> None:
    """ConfigError when ``level`` is one for which llama.cpp wants an importance matrix, and a head (``names``) has its type."""
    if needs_matrix and names:
        raise ConfigError(
            f"{level} cannot be made: it needs an importance matrix of {names[0]} and {len(names) - 1} more, and no "
            "calibration text goes through a multi-token-prediction head",
            hint="set quantization_config.mtp_type: q8_0",
        )
