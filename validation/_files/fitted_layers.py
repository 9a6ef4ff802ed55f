"""What a folder whose layers were chosen by measuring must hold: the plan's ledger with the choice that config.json records.

A plan is made before the layers are measured, so its ledger has every layer in the level's own scheme. The choice is read back
from ``config_groups`` and ``ignore``, by the rules of compressed-tensors; what is then stored is compared with it like any other.
"""

from __future__ import annotations

from quantool.ledger import ArtifactTensor, Fate, Ledger, TensorLine, names
from quantool.validation._files.folder import Folder
from quantool.validation._files.modules import Promise, expected_parts


def with_choice(ledger: Ledger, promised: Promise | None) -> Ledger:
    """The ledger with each quantized layer as ``promised``: in its own scheme, or whole where that leaves it alone."""
    folder = Folder({}, {}, promised)
    lines: list[TensorLine] = []
    for line in ledger.tensors:
        if line.fate is Fate.QUANTIZED and line.name:
            lines += (_single(line, name, folder) for name in names(line.name))
        else:
            lines.append(line)
    return ledger.model_copy(update={"tensors": tuple(lines)})


def _single(line: TensorLine, name: str, folder: Folder) -> TensorLine:
    """The line of one of its tensors."""
    module = name.removesuffix(".weight")
    scheme = folder.scheme_of(module)
    if scheme is None:
        whole = ArtifactTensor(name=name, dtype=line.dtype, shape=line.shape)
        return line.model_copy(update={"name": name, "fate": Fate.CONVERTED, "to": (whole,)})
    outputs, inputs = line.shape
    parts = tuple(
        ArtifactTensor(
            name=f"{module}.{part}", dtype=line.dtype if line.dtype in dtypes else dtypes[0], shape=shape
        )
        for part, dtypes, shape in expected_parts(scheme, outputs, inputs)
    )
    return line.model_copy(update={"name": name, "to": parts})
