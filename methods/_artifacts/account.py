"""What becomes of every tensor of a checkpoint in a folder of safetensors, by the headers of both."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from quantool.formats.safetensors import TensorHeader
from quantool.formats.safetensors_layout import Stored
from quantool.ledger import ArtifactTensor, Fate, TensorLine

WEIGHT = ".weight"
BUFFER = "a buffer that engines compute from config.json"


def lines(
    located: Mapping[str, TensorHeader],
    stored: Sequence[Stored],
    quantized: Iterable[str] = (),
    absent: Mapping[str, Fate] | None = None,
    *,
    scaled: bool = False,
    carried: Collection[str] = (),
) -> tuple[TensorLine, ...]:
    """A line for each tensor of the source (``located``) and each that the method adds.

    ``stored`` is what the checkpoint will hold, ``quantized`` names the weights that several tensors of one module stand
    for, ``absent`` those that transformers does not save again though ``stored`` lists them. ``scaled`` says that the
    method scales other weights to make those easier, so that no value need be the source's but that of the ``carried``.
    """
    chosen = {name.removesuffix(WEIGHT) for name in quantized}
    packed: dict[str, list[ArtifactTensor]] = {}
    plain: dict[str, ArtifactTensor] = {}
    for tensor in stored:
        entry = ArtifactTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)
        module, _, last = tensor.name.rpartition(".")
        if module in chosen and (f".{last}" == WEIGHT or tensor.name not in located):
            packed.setdefault(module, []).append(entry)
        else:
            plain[tensor.name] = entry
    missing = absent or {}
    found = []
    for name, header in located.items():
        module = name.removesuffix(WEIGHT)
        if module in packed and name.endswith(WEIGHT):
            fate, to = Fate.QUANTIZED, tuple(packed.pop(module))
        elif name in missing:
            plain.pop(name, None)
            fate, to = missing[name], ()
        elif (kept := plain.pop(name, None)) is not None:
            same = (not scaled or name in carried) and (kept.dtype, kept.shape) == (
                header.dtype,
                header.shape,
            )
            fate, to = Fate.COPIED if same else Fate.CONVERTED, (kept,)
        else:
            fate, to = Fate.DROPPED, ()
        reason = BUFFER if fate is Fate.DROPPED and name in missing else ""
        found.append(
            TensorLine(name=name, dtype=header.dtype, shape=header.shape, fate=fate, to=to, reason=reason)
        )
    added = [*plain.values(), *(entry for entries in packed.values() for entry in entries)]
    reason = "computed from the weights and the calibration text"
    return (*found, *(TensorLine(name="", fate=Fate.ADDED, to=(entry,), reason=reason) for entry in added))


def not_saved(
    located: Mapping[str, TensorHeader], quantized: Iterable[str], *, tied: bool
) -> dict[str, Fate]:
    """What transformers leaves out when it saves a model: a head tied to the embeddings, buffers of old Llamas."""
    chosen = set(quantized)
    found = {name: Fate.DROPPED for name in located if name.endswith("rotary_emb.inv_freq")}
    if tied:
        found |= {name: Fate.TIED for name in located if name.endswith("lm_head.weight")}
    return {name: fate for name, fate in found.items() if name not in chosen}
