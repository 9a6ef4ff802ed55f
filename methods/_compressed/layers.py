"""The tensors that a level is made from, by the headers of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantool.formats.fused_experts import origin_of, split_experts
from quantool.formats.safetensors import TensorHeader
from quantool.ledger import ArtifactTensor, Fate, TensorLine
from quantool.records import Source
from quantool.source.mtp import head_tensors
from quantool.source.tensor_headers import headers


def layers_of(source: Source) -> dict[str, TensorHeader]:
    """Name to header: fused experts one by one (``split_experts``), a multi-token-prediction head as it is stored."""
    located = headers(source)
    return split_experts(located, head_tensors(located, source.facts.layers))


def joined_lines(lines: Sequence[TensorLine], located: Mapping[str, TensorHeader]) -> tuple[TensorLine, ...]:
    """The lines of single experts as one line for each tensor that holds them all; ``located`` is what the source has."""
    found: list[TensorLine] = []
    made: dict[str, list[ArtifactTensor]] = {}
    fates: dict[str, set[Fate]] = {}
    for line in lines:
        if not line.name or line.name in located:
            found.append(line)
        else:
            made.setdefault(origin_of(line.name), []).extend(line.to)
            fates.setdefault(origin_of(line.name), set()).add(line.fate)
    for name, to in made.items():
        fate = Fate.QUANTIZED if Fate.QUANTIZED in fates[name] else Fate.CONVERTED
        header = located[name]
        found.append(TensorLine(name=name, dtype=header.dtype, shape=header.shape, fate=fate, to=tuple(to)))
    return tuple(found)
