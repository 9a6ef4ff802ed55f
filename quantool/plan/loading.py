"""Whether transformers can load the checkpoint as a reference, from headers: found by the plan, not after hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantool.config.schema import Config
from quantool.errors import SourceError
from quantool.formats.safetensors import TensorHeader, some
from quantool.ledger import HEAD, TEXT, Fate, TensorLine, grouped
from quantool.plugins import find
from quantool.records import Source
from quantool.source.parts import BESIDE_VECTORS, Parts
from quantool.source.reference_names import ReferenceNames, reference_names
from quantool.tasks import TaskKind

BUFFERS = (
    "rotary_emb.inv_freq",
    ".masked_bias",
    ".attn.bias",
    ".attention.bias",
    "position_ids",
    "num_batches_tracked",
)
"""Ends of names of what old checkpoints hold and every model computes anew."""
UNUSED = ("pooler.", "embeddings.position_ids")
"""Beginnings of names of what a model for vectors has, and pooled states do not need."""
HINT = "config.json and the weights are of different models, or the checkpoint is not whole"


def refuse_unloadable(
    config: Config, source: Source, parts: Parts, tensors: Mapping[str, TensorHeader]
) -> None:
    """SourceError where a check would load the reference and transformers would fill in, or pass over, weights of it.

    What lies in a tower or drafts further tokens has reasons of its own to be passed over.
    """
    if source.trust_remote_code or not _needs_reference(config, source):
        return
    found = reference_names(source, tensors)
    if found.failure:
        raise SourceError(f"transformers cannot load {source.name}: {found.failure}", hint=HINT)
    vectors = source.facts.task.kind is TaskKind.EMBEDDING
    absent = [name for name in found.missing if not (vectors and name.startswith(UNUSED))]
    _refuse(found, absent, "the weights lack")
    _refuse(found, found.mismatched, "other shapes have")
    strange = [
        name
        for name in found.unexpected
        if parts.part_of(name) in (TEXT, HEAD)
        and not name.endswith(BUFFERS)
        and not (vectors and name.startswith(BESIDE_VECTORS))
    ]
    if strange:
        raise SourceError(
            f"{len(strange)} tensors are nothing that {found.model} has, so nothing would judge them: "
            f"{some(_patterns(strange))}",
            hint="a newer transformers may know them; else they do not belong to this model",
        )


def _refuse(found: ReferenceNames, names: Sequence[str], what: str) -> None:
    if names:
        raise SourceError(
            f"{what} {len(names)} tensors of {found.model}: {some(_patterns(names))}", hint=HINT
        )


def _patterns(names: Sequence[str]) -> list[str]:
    return [line.name for line in grouped(TensorLine(name=name, fate=Fate.DROPPED) for name in names)]


def _needs_reference(config: Config, source: Source) -> bool:
    """Whether a check that will run loads the checkpoint."""
    return any(check.loads_reference for check in find.active_checks(config, source.facts.task).values())
