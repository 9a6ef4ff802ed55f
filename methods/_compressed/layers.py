"""The tensors that a level is made from, by the headers of the checkpoint."""

from __future__ import annotations

from quantool.formats.fused_experts import split_experts
from quantool.formats.safetensors import TensorHeader
from quantool.records import Source
from quantool.source.mtp import head_tensors
from quantool.source.tensor_headers import headers


def layers_of(source: Source) -> dict[str, TensorHeader]:
    """Name to header: fused experts one by one (``split_experts``), a multi-token-prediction head as it is stored."""
    located = headers(source)
    return split_experts(located, head_tensors(located, source.facts.layers))
