"""What each matrix costs in divergence at each type: measured at two types, and by its squared error at the others.

A matrix alone is quantized, all else is as in the base, and the model reads the calibration windows: KL(base, changed). To second
order that is proportional to the squared error of the matrix, weighted by importance; what does not shrink with it is the
rounding of activations that comes with any quantized type. So two measured types, a coarse and a fine one, give both terms.
Every measurement is a line of a file, written at once: a search that was killed goes on behind the last whole line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from quantool.errors import QuantizationError
from quantool.methods._fit.allocation import Choice
from quantool.methods._llama_cpp.fit import candidates
from quantool.methods._llama_cpp.fit.live_model import Importance, LiveModel, live_model
from quantool.methods._llama_cpp.fit.yardstick import Yardstick, single_windows, yardstick
from quantool.methods._llama_cpp.importance.imatrix_file import read_matrix
from quantool.runtime.worker import Report, preloaded

SAMPLED_ROWS = 128
"""Rows of a matrix on which the squared errors are computed."""
BASE_TYPES = ("f16", "bf16", "f32")


@dataclass
class MatrixCost:
    """What was measured of one matrix, by type: mean KL divergence (nats), and squared error over squared values."""

    divergence: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def of(self, kind: str) -> float:
        """The divergence that the type ``kind`` costs."""
        if kind in BASE_TYPES:
            return 0.0
        if kind in self.divergence:
            return max(0.0, self.divergence[kind])
        coarse, fine = sorted(self.divergence, key=lambda name: -self.error[name])
        if self.error[coarse] == self.error[fine]:  # of a matrix of zeros no type loses anything
            return max(0.0, *self.divergence.values())
        steep = (self.divergence[coarse] - self.divergence[fine]) / (self.error[coarse] - self.error[fine])
        slope = max(steep, 0.0) or max(self.divergence[coarse], 0.0) / self.error[coarse]
        return slope * self.error[kind] + max(0.0, self.divergence[fine] - slope * self.error[fine])


def choices(cost: MatrixCost, sizes: Mapping[str, int]) -> list[Choice]:
    """The choices of a matrix whose bytes by type are ``sizes``."""
    return [Choice(kind, size, cost.of(kind)) for kind, size in sizes.items()]


@preloaded("torch")
def measure(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Measure every matrix; what ``costs`` holds already is not measured again.

    Request: ``base`` (GGUF), ``imatrix`` (path or null), ``ids`` (.npy [windows, context]), ``folder`` (for temporary files),
    ``costs`` (the file of measurements, appended to), ``tensors`` (name to types). Result: ``measured`` (how many were new),
    ``unread`` (names of matrices that no product of the model's graph reads directly, which cannot be measured).
    """
    path, wanted = Path(request["costs"]), request["tensors"]
    known = read_costs(path)
    ids = single_windows(np.load(request["ids"]))
    with (
        live_model(Path(request["base"]), importance(request["imatrix"])) as model,
        path.open("a", encoding="utf-8") as file,
    ):
        unread = [name for name in wanted if name not in model.pointers]
        waiting = list(_waiting(wanted, known, unread))
        if waiting:
            with yardstick(model, ids, Path(request["folder"]), whole=False) as judged:
                for number, (name, kinds, anchors) in enumerate(waiting):
                    _measure(model, judged, name, kinds, anchors, file)
                    report(number + 1, len(waiting))
    return {"measured": len(waiting), "unread": unread}


def _waiting(
    wanted: Mapping[str, list[str]], known: Mapping[str, MatrixCost], unread: list[str]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Matrices with types whose error, and types whose divergence, is still to be measured."""
    for name, kinds in wanted.items():
        if name in unread:
            continue
        quantized = [kind for kind in kinds if kind not in BASE_TYPES]
        own = known.get(name, MatrixCost())
        errors = [kind for kind in quantized if kind not in own.error]
        anchors = [kind for kind in anchors_of(quantized) if kind not in own.divergence]
        if errors or anchors:
            yield name, errors, anchors


def anchors_of(kinds: list[str]) -> tuple[str, str]:
    """The coarse and the fine type at which a matrix of these candidate types is measured."""
    return next(
        (candidates.COARSE[block], candidates.FINE[block])
        for block in (256, 32)
        if {candidates.COARSE[block], candidates.FINE[block]} <= {*kinds}
    )


def _measure(
    model: LiveModel, judged: Yardstick, name: str, kinds: list[str], anchors: list[str], file: IO[str]
) -> None:
    count = model.places[name].elements // model.places[name].shape[-1]
    rows = np.unique(np.linspace(0, count - 1, min(count, SAMPLED_ROWS)).round().astype(np.int64))
    if kinds:
        errors = {kind: model.error(name, kind, rows) for kind in kinds}
        _note(file, {"tensor": name, "error": errors})
    for kind in anchors:
        model.quantize(name, kind)
        _note(file, {"tensor": name, "divergence": {kind: judged.divergence()}})
    model.restore(name)


def _note(file: IO[str], entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()
    os.fsync(file.fileno())


def read_costs(path: Path) -> dict[str, MatrixCost]:
    """By tensor what was measured; a line that a killed process did not finish is cut off the file.

    Raises QuantizationError for a file that holds something else.
    """
    if not path.is_file():
        return {}
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole != len(raw):
        os.truncate(path, whole)
    found: dict[str, MatrixCost] = {}
    try:
        for line in raw[:whole].splitlines():
            entry = json.loads(line)
            own = found.setdefault(entry["tensor"], MatrixCost())
            own.error.update(entry.get("error", {}))
            own.divergence.update(entry.get("divergence", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantizationError(
            f"{path} is damaged: {error}", hint="delete it: it is measured anew"
        ) from error
    return found


def importance(path: str | None) -> Importance:
    """The mean squares of an importance matrix as llama-quantize takes them: 1 throughout for an expert that saw no token."""
    if path is None:
        return {}
    means = {}
    for name, (sums, counts) in read_matrix(Path(path)).entries.items():
        mean = np.ones_like(sums)
        np.divide(sums, counts, out=mean, where=counts > 0)
        means[name] = np.ascontiguousarray(mean, np.float32)
    return means
