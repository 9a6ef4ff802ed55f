"""Proof from saved headers that a checkpoint is what was planned: quantized where it should be, untouched elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantool.errors import QuantizationError
from quantool.formats.safetensors import check_index, some
from quantool.formats.safetensors_layout import Stored, as_stored
from quantool.methods._compressed.schemes import Selection

BUFFERS = ("rotary_emb.inv_freq", "lm_head.weight")
"""Ends of names that transformers rightly drops when it saves: a buffer of old Llamas, a head tied to the embeddings."""
SHOWN = 4


def verify(folder: Path, expected: Sequence[Stored], selection: Selection, *, streamed: bool) -> None:
    """Compare the headers in ``folder`` with the planned tensors, name by name, dtype and shape included.

    Raises QuantizationError naming the layers that are not quantized, those that should not be and are, and tensors
    that were lost or came from nowhere.
    """
    found = check_index(folder)
    wanted = {tensor.name: tensor for tensor in expected}
    wrong = [name for name, tensor in wanted.items() if name not in found or as_stored(found[name]) != tensor]
    extra = [name for name in found if name not in wanted]
    if not streamed:
        layers = {layer.name for layer in selection.layers}
        wrong = [name for name in wrong if name in found or not name.endswith(BUFFERS) or name in layers]
    if not wrong and not extra:
        return
    chosen = [layer.name.removesuffix(".weight") for layer in selection.layers]
    bare = [module for module in chosen if any(_belongs(name, module) for name in wrong)]
    spoilt = [module for module in selection.left if any(_belongs(name, module) for name in (*wrong, *extra))]
    parts = []
    if bare:
        parts.append(f"{len(bare)} layers are not quantized as planned: {some(bare, SHOWN)}")
    if spoilt:
        parts.append(f"{len(spoilt)} ignored layers are not what the source has: {some(spoilt, SHOWN)}")
    if not parts:
        parts.append(
            f"missing or changed: {some(wrong, SHOWN) or 'nothing'}; unexpected: {some(extra, SHOWN) or 'nothing'}"
        )
    raise QuantizationError(
        "the saved checkpoint is not what was planned: " + "; ".join(parts),
        hint="llmcompressor may name or place this architecture's layers otherwise; see the log",
    )


def _belongs(name: str, module: str) -> bool:
    return name.rpartition(".")[0] == module
