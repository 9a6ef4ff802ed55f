"""Vectors beside those of the reference: direction, neighbours, labels, order; each number with one standard error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantool.validation._findings.statistics import Estimate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

NEIGHBOURS = 10


def mean(values: NDArray[np.float64]) -> Estimate:
    """The mean and its standard error; not a number where a value is none."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), error)


def cosines(reference: Vectors, artifact: Vectors) -> NDArray[np.float64]:
    """The cosine of each pair of vectors [texts, width]; 0 where one has no length."""
    found: NDArray[np.float64] = (_unit(reference) * _unit(artifact)).sum(1)
    return found


def _unit(vectors: Vectors) -> NDArray[np.float64]:
    import numpy as np

    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    found: NDArray[np.float64] = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
    return found


def recall(reference: Vectors, artifact: Vectors) -> NDArray[np.float64]:
    """For each text the share of its nearest others by the reference that are among its nearest by the artifact."""
    import numpy as np

    nearest = [_nearest(vectors) for vectors in (reference, artifact)]
    return np.array([len({*a} & {*b}) / len(a) for a, b in zip(*nearest, strict=True)], np.float64)


def _nearest(vectors: Vectors) -> NDArray[np.int64]:
    import numpy as np

    unit = _unit(np.nan_to_num(vectors))
    alike = unit @ unit.T
    np.fill_diagonal(alike, -2.0)
    return np.argsort(-alike, axis=1, kind="stable")[:, :NEIGHBOURS]


def logit_error(reference: Vectors, artifact: Vectors) -> Estimate:
    """Mean squared difference of logits [texts, labels] over the variance of the reference's: 1 for a constant answer."""
    import numpy as np

    wide = reference.astype(np.float64)
    variance = float(((wide - wide.mean(0)) ** 2).sum(1).mean())
    squares = ((artifact.astype(np.float64) - wide) ** 2).sum(1)
    return mean(squares / variance) if variance > 0 else Estimate(math.nan, 0.0)


def permutation(reference: Vectors, artifact: Vectors) -> list[int] | None:
    """Which of the reference's logits stands at each place of the artifact's, if they are the same in another order."""
    import numpy as np

    labels = reference.shape[1]
    if labels < 2:
        return None
    apart = np.abs(artifact[:, :, None] - reference[:, None, :]).mean(0)
    order = [int(number) for number in apart.argmin(1)]
    if order == [*range(labels)] or sorted(order) != [*range(labels)]:
        return None
    straight, permuted = (logit_error(part, artifact).value for part in (reference, reference[:, order]))
    return order if permuted < straight / 2 else None


def same_label(reference: Vectors, artifact: Vectors) -> NDArray[np.float64]:
    """1 for each text whose largest logit is of the same label, else 0."""
    import numpy as np

    found: NDArray[np.float64] = (reference.argmax(1) == artifact.argmax(1)).astype(np.float64)
    return found


def kendall(reference: Vectors, artifact: Vectors, group: int) -> NDArray[np.float64]:
    """Kendall's tau-a (Kendall, "A new measure of rank correlation", Biometrika 30, 1938) of each query's ``group`` scores.

    Scores are [pairs, labels], of which the first counts; pairs of documents that either puts level count as nothing.
    """
    import numpy as np

    first, second = ((scores[:, 0].astype(np.float64)).reshape(-1, group) for scores in (reference, artifact))
    upper = np.triu_indices(group, 1)
    signs = [np.sign(part[:, :, None] - part[:, None, :])[:, *upper] for part in (first, second)]
    return np.asarray((signs[0] * signs[1]).mean(1), np.float64)
