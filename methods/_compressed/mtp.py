"""What becomes of a multi-token-prediction head: carried byte for byte, or (its decoder layer) quantized with the rest.

llmcompressor never sees it: transformers leaves it out of the model. So it is brought from the source's files after a level
was calibrated, and named in ``ignore``, by which vLLM knows that it is not quantized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from quantool.errors import ConfigError
from quantool.formats.safetensors import TensorHeader, check_index
from quantool.formats.safetensors_layout import Stored, as_stored, copy_tensors, write_index
from quantool.methods._compressed.torch_setup import QUANTIZATION_CONFIG
from quantool.records import Source
from quantool.source.mtp import head_patterns, head_tensors, layout_of

Treatment = Literal["keep", "quantize"]
HEAD_FILE = "mtp.safetensors"


def kept_patterns(
    source: Source, located: Mapping[str, TensorHeader], wanted: Treatment, *, calibrated: bool
) -> tuple[str, ...]:
    """Patterns of the head's modules that are not quantized.

    The projection and an output head of its own are none of vLLM's quantized layers, so ``quantize`` leaves them alone
    too. Raises ConfigError for ``quantize`` where the level is calibrated: no calibration text goes through a head.
    """
    layers = source.facts.layers
    if wanted == "keep" or not head_tensors(located, layers):
        return head_patterns(located, layers)
    if calibrated:
        raise ConfigError(
            "quantization_config.mtp: quantize, but no calibration text goes through a multi-token-prediction head",
            hint="leave it out (the head is kept as it is), or choose FP8_DYNAMIC or FP8_BLOCK",
        )
    layout = layout_of(located, layers)
    if layout is None:
        raise ConfigError(
            "quantization_config.mtp: quantize, but the layout of this multi-token-prediction head is not known",
            hint="leave it out: the head is kept as it is",
        )
    own_output = f"{layout.block}shared_head.head"
    return (layout.projection, *([own_output] if f"{own_output}.weight" in located else []))


def carry(source: Path, folder: Path, names: Sequence[str], patterns: Sequence[str]) -> None:
    """Bring the tensors ``names`` of ``source`` into the checkpoint in ``folder``, and ``patterns`` into its ``ignore``."""
    given, found = check_index(source), check_index(folder)
    shards: dict[str, list[Stored]] = {}
    for tensor in found.values():
        shards.setdefault(tensor.file, []).append(as_stored(tensor))
    copy_tensors(source, [given[name] for name in names], folder / HEAD_FILE)
    shards[HEAD_FILE] = [as_stored(given[name]) for name in names]
    write_index(folder, shards)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    ignore = config[QUANTIZATION_CONFIG].setdefault("ignore", [])
    ignore += [pattern for pattern in patterns if pattern not in ignore]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
