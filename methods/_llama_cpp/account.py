"""What becomes of every tensor of a checkpoint in a GGUF, by the converter's rehearsal and the quantizer's dry run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantool.formats.safetensors import TensorHeader
from quantool.ledger import MTP, ArtifactTensor, Fate, TensorLine
from quantool.methods._llama_cpp import lora
from quantool.methods._llama_cpp.dry_run import Rehearsal
from quantool.records import Source
from quantool.source.parts import BESIDE_VECTORS, Parts
from quantool.source.tensor_headers import headers
from quantool.tasks import TaskKind

BUFFERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq", "embeddings.position_ids")
"""Ends of names that the converter passes over (0c1e570, conversion/base.py, ``prepare_tensors``; conversion/bert.py)."""
BUFFER = "a buffer that engines compute from config.json"
NO_HEAD = "llama.cpp's converter writes no head for further tokens of this architecture"
FLOATS = frozenset({"F32", "F16", "BF16", "F64"})


def lines(source: Source, rehearsal: Rehearsal, types: Mapping[str, str]) -> tuple[TensorLine, ...]:
    """A line for each tensor of the source and each that the converter adds; ``types`` are those of the level."""
    made_of = rehearsal.sources
    made: dict[str, list[str]] = {}
    for name, origins in made_of.items():
        for origin in origins:
            made.setdefault(origin, []).append(name)
    stored = {
        name: ArtifactTensor(name=name, dtype=types[name].upper(), shape=tensor.shape)
        for name, tensor in rehearsal.tensors.items()
    }
    parts = Parts.of(source)
    found = [
        _line(source, parts, tensor, [stored[name] for name in made.get(tensor.name, ())], made_of)
        for tensor in headers(source).values()
    ]
    shapes = {name: tensor.shape for name, tensor in rehearsal.tensors.items()}
    return (*found, *_added(stored, made_of), *lora.lines(source, made_of, shapes))


def _line(
    source: Source,
    parts: Parts,
    tensor: TensorHeader,
    to: list[ArtifactTensor],
    made_of: Mapping[str, list[str]],
) -> TensorLine:
    reason = ""
    if any(len(made_of[entry.name]) > 1 for entry in to):
        fate = Fate.MERGED
    elif any(entry.dtype not in FLOATS for entry in to):
        fate = Fate.QUANTIZED
    elif to:
        fate = Fate.CONVERTED
    elif source.facts.tied_embeddings and tensor.name.endswith("lm_head.weight"):
        fate = Fate.TIED
    else:
        fate, reason = Fate.DROPPED, _reason(source, parts, tensor.name)
    return TensorLine(
        name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, fate=fate, to=tuple(to), reason=reason
    )


def _reason(source: Source, parts: Parts, name: str) -> str:
    """Why the converter passes over a tensor; empty where nothing explains it."""
    if name.endswith(BUFFERS):
        return BUFFER
    if parts.part_of(name) == MTP:
        return NO_HEAD
    if source.facts.task.kind is TaskKind.EMBEDDING and name.removeprefix("bert.").startswith(BESIDE_VECTORS):
        return "no pooled vector reads it"
    return ""


def _added(stored: Mapping[str, ArtifactTensor], made_of: Mapping[str, list[str]]) -> Iterator[TensorLine]:
    for name, entry in stored.items():
        if not made_of[name]:
            reason = "the converter computes it from config.json"
            yield TensorLine(name="", fate=Fate.ADDED, to=(entry,), reason=reason)
