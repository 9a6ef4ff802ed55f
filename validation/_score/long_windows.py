"""Long windows of the held-out texts: the same texts, cut longer, scored by the same workers under names of their own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantool.errors import ConfigError
from quantool.plugins.contract import Case
from quantool.runtime.progress import Progress
from quantool.texts.corpus import corpora
from quantool.validation._engines.reference import Reference, references
from quantool.validation._engines.windows import scored
from quantool.validation._findings.statistics import Estimate, Tokens, mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUARTERS = 4
"""Parts of a window's scored half that are looked at apart: damage that grows with the position shows in the last."""


@dataclass(frozen=True)
class Bucket:
    """The mean of a score over some positions of every window."""

    positions: range
    mean: Estimate


def at_length(case: Case, length: int, windows: int) -> Case:
    """The case with windows of ``length`` tokens, ``windows`` of each text; kept apart from all that has other windows.

    Without a base: what the conversion loses does not depend on the length, and is measured on short windows.
    """
    texts = tuple(text.model_copy(update={"name": f"{text.name}.{length}"}) for text in corpora(case.config))
    changes = {"context": length, "max_tokens": length * windows, "corpora": texts}
    validation = case.settings.model_copy(update=changes)
    return replace(case, base=None, config=case.config.model_copy(update={"validation": validation}))


def long_references(case: Case, progress: Progress) -> tuple[list[Reference], dict[str, str]]:
    """The references of a case of ``at_length``, and by the name of a text why it has none: it may be too short."""
    texts = case.settings.corpora
    try:
        return [*references(case, texts, progress)], {}
    except ConfigError as error:
        if len(texts) == 1:
            return [], {texts[0].name: error.message}
    known: list[Reference] = []
    failed: dict[str, str] = {}
    for text in texts:
        try:
            known += references(case, (text,), progress)
        except ConfigError as error:
            failed[text.name] = error.message
    return known, failed


def by_position(values: NDArray[np.float32], length: int) -> list[Bucket]:
    """The mean of ``values`` [windows * scored positions] in each quarter of the scored half."""
    positions = scored(length)
    table = values.astype(np.float64).reshape(-1, len(positions))
    ends = [len(positions) * number // QUARTERS for number in range(QUARTERS + 1)]
    return [
        Bucket(positions[first:last], mean(table[:, first:last].ravel()))
        for first, last in itertools.pairwise(ends)
    ]


def rise(tokens: Tokens, beside: Tokens) -> NDArray[np.float32]:
    """By how much the divergence of each token is larger than that of the same token ``beside``."""
    difference: NDArray[np.float32] = tokens.kld - beside.kld
    return difference


def listed(buckets: Sequence[Bucket]) -> str:
    """``positions 2048 to 2559: 0.0123 ± 0.0004; …``."""
    return "; ".join(
        f"positions {bucket.positions.start} to {bucket.positions.stop - 1}: "
        f"{bucket.mean.value:.4g} ± {bucket.mean.error:.2g}"
        for bucket in buckets
    )
