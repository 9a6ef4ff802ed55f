"""Limits that an artifact must keep, by level.

A published figure times 1.5 (ln of the perplexity ratio) or 1.7 (mean KLD), the share of equal first choices from
the KLD: both of llama.cpp's tables follow 1 - 0.43 sqrt(KLD) within 0.01. The figures are those of LLaMA-3-8B on
wikitext-2 in llama.cpp's ``tools/perplexity/README.md`` (table "LLaMA 3 8b Scoreboard"; without importance matrix
where it lists both, so that a level passes either way). Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M, FP8 and W4A16 are set by
hand near these. For FP8 and integer formats of served models see arXiv 2411.02355.

Embeddings, scores and logits of classifiers move with the states that the last layer gives, as its prediction does: their
limits follow from the one of the mean KLD (``task_limits``), fixed at a cosine of 0.999 at Q8_0.

They hold for models of 1 B parameters and more: smaller ones lose more at every level and need wider gates, given as
``validation.gates`` in the configuration. They tell a broken file from a sound one; they do not rank sound ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from quantool.errors import ConfigError, nearest
from quantool.records import Gates
from quantool.tasks import TaskKind

ALL_LEVELS = "*"
"""The entry of ``validation.gates`` that stands for every level."""

FITTED = re.compile(r"_FIT[A-Z]?$", re.IGNORECASE)
"""How the level of a file ends whose types were chosen for it: the stock level nearest to it stands before."""

MIN_EXPERT_TOKENS = 32
"""Calibration tokens below which an expert is named in a warning; a limit only where ``min_expert_tokens`` is set."""

_EXACT = (
    0.001,
    0.002,
    0.98,
)  # bf16 arithmetic alone reaches a KLD of 1e-3: f16 against f16 on a GPU is at 5.5e-4
_FP8 = (0.01, 0.01, 0.95)
_INT4 = (0.06, 0.08, 0.88)
_LOWEST = (
    3.0,
    3.2,
    0.20,
)  # an output of equal odds is at ln ratio 9.9 and KLD 9.9 with a vocabulary of 128,256

_TABLE: dict[str, tuple[float, float, float]] = {
    # level: (ln(PPL / PPL of the reference), mean KLD, same-top-p)
    "F32": _EXACT,
    "F16": _EXACT,
    "BF16": _EXACT,
    "COPY": _EXACT,
    "Q8_0": (0.002, 0.004, 0.97),  # published 0.0004, 0.0014, 0.977
    "Q6_K": (0.006, 0.010, 0.95),  # 0.0035, 0.0055, 0.960
    "Q5_K_M": (0.012, 0.020, 0.935),  # 0.0091, 0.0108
    "Q5_K_S": (0.025, 0.028, 0.925),  # 0.0167, 0.0166
    "Q5_1": (0.025, 0.031, 0.920),  # 0.0169, 0.0180
    "Q5_0": (0.031, 0.038, 0.915),  # 0.0209, 0.0222
    "Q4_K_M": (0.045, 0.055, 0.90),  # 0.0278, 0.0313, 0.919
    "Q4_K_S": (0.063, 0.073, 0.885),  # 0.0422, 0.0431
    "IQ4_NL": (0.060, 0.070, 0.885),  # with matrix 0.0353, 0.0357
    "IQ4_XS": (0.062, 0.072, 0.885),  # with matrix 0.0359, 0.0363
    "Q4_1": (0.105, 0.122, 0.85),  # 0.0699, 0.0717
    "Q4_0": (0.110, 0.123, 0.85),  # 0.0725, 0.0719
    "MXFP4_MOE": (0.120, 0.140, 0.84),  # none published: four bits, blocks of 32 as Q4_0, power-of-two scales
    "Q3_K_L": (0.128, 0.148, 0.84),  # 0.0855, 0.0872
    "Q3_K_M": (0.13, 0.15, 0.84),  # 0.1002, 0.1019; with matrix 0.0776, 0.0844
    "IQ3_M": (0.153, 0.175, 0.82),  # with matrix 0.1016, 0.1025
    "IQ3_S": (0.167, 0.190, 0.81),  # with matrix 0.1113, 0.1113
    "IQ3_XS": (0.21, 0.236, 0.79),  # with matrix 0.1393, 0.1387
    "IQ3_XXS": (0.27, 0.312, 0.76),  # with matrix 0.1797, 0.1836
    "Q3_K_S": (0.35, 0.39, 0.73),  # 0.2326, 0.2282
    "IQ2_M": (0.50, 0.56, 0.68),  # with matrix 0.3222, 0.3260; robbiemu's salamandra-2b-instruct 0.3428
    "IQ2_S": (0.66, 0.75, 0.63),  # with matrix 0.4374, 0.4392
    "Q2_K": (0.68, 0.76, 0.625),  # 0.4478, 0.4451, 0.711
    "Q2_K_S": (0.75, 0.85, 0.60),  # with matrix 0.4029, 0.4034
    "IQ2_XS": (0.82, 0.93, 0.58),  # with matrix 0.5463, 0.5463
    "IQ2_XXS": (1.25, 1.4, 0.49),  # with matrix 0.8160, 0.8120
    "IQ1_M": (2.2, 2.4, 0.33),  # with matrix 1.4088, 1.3931
    "IQ1_S": _LOWEST,  # with matrix 2.2325 to 2.3170, 2.2113 to 2.2935
    "TQ1_0": _LOWEST,  # made for weights that were trained ternary or binary, as the next three; none published
    "TQ2_0": _LOWEST,
    "Q1_0": _LOWEST,
    "Q2_0": _LOWEST,
    "FP8_DYNAMIC": _FP8,
    "FP8": _FP8,
    "FP8_BLOCK": _FP8,
    "W8A16": (0.005, 0.008, 0.96),  # eight-bit weights with coarser scales than Q8_0's
    "W8A8": (0.03, 0.04, 0.91),  # activations in integers too
    "W4A16": _INT4,
    "W4A16_ASYM": _INT4,
}

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize has them


LIMITS: dict[TaskKind, tuple[str, ...]] = {
    TaskKind.GENERATION: ("max_ln_ppl_ratio", "max_mean_kld", "min_same_top_p"),
    TaskKind.EMBEDDING: ("min_cosine", "min_recall_at_10"),
    TaskKind.RERANKING: ("max_logit_error", "min_rank_correlation"),
    TaskKind.CLASSIFICATION: ("max_logit_error", "min_same_label"),
}
"""The gates of a model that is for a task."""


def default_gates(level: str, kind: TaskKind | None = TaskKind.GENERATION) -> Gates:
    """Give the limits of ``level`` (any case) for a model of 1 B parameters and more; see the module for the sources.

    ``kind`` is what the model is for, None for the limits of all tasks. Raises ConfigError for a level without known
    figures.
    """
    name = _canonical(level)
    wanted = _limits(kind)
    if name not in _TABLE:
        raise ConfigError(
            f"there are no default gates for level {level!r}",
            hint=f"give validation.gates.{level} in the configuration, with all of {', '.join(wanted)}"
            + (f"; {near}" if (near := nearest(level, list(_TABLE))) else ""),
        )
    ratio, divergence, agreement = _TABLE[name]
    known = {
        "max_ln_ppl_ratio": ratio,
        "max_mean_kld": divergence,
        "min_same_top_p": agreement,
        **task_limits(divergence),
    }
    return Gates.model_validate({limit: known[limit] for limit in wanted})


def task_limits(divergence: float) -> dict[str, float]:
    """Limits of what is no prediction of a token, of a level whose mean KLD may be ``divergence``.

    With small errors, both the KLD and 1 - cosine grow with the square of the error of the states, and orders with its
    root: so do the shares of equal neighbours, equal labels and pairs in the same order.
    """
    lost = divergence / 4
    return {
        "min_cosine": max(0.1, 1 - lost),
        "min_recall_at_10": max(0.1, 1 - 2.5 * math.sqrt(lost)),
        "max_logit_error": 2 * divergence,
        "min_same_label": max(0.1, 1 - math.sqrt(lost)),
        "min_rank_correlation": max(0.1, 1 - 2.5 * math.sqrt(lost)),
    }


def _limits(kind: TaskKind | None) -> tuple[str, ...]:
    return LIMITS[kind] if kind else tuple(dict.fromkeys(limit for own in LIMITS.values() for limit in own))


def resolve(
    level: str, configured: Mapping[str, Gates], kind: TaskKind | None = TaskKind.GENERATION
) -> Gates:
    """Merge, field by field, what is configured for ``level`` over what is for ``"*"`` over the defaults of ``kind``.

    A field set to None switches that gate off; a field that is left out does not. Raises ConfigError when a level
    without defaults is not given all limits.
    """
    named = {_canonical(name): gates for name, gates in configured.items()}
    chosen = over(named.get(ALL_LEVELS, Gates()), named.get(_canonical(level), Gates()))
    if chosen.model_fields_set >= {*_limits(kind)}:
        return chosen
    return over(default_gates(level, kind), chosen)


def over(lower: Gates, upper: Gates) -> Gates:
    """Take the fields that ``upper`` sets (None included), and those of ``lower`` for the rest."""
    return lower.model_copy(update={name: getattr(upper, name) for name in upper.model_fields_set})


def stock_level(level: str) -> str:
    """The level that a fitted file is named after; of any other level, itself."""
    return FITTED.sub("", level)


def _canonical(level: str) -> str:
    level = stock_level(level)
    return _ALIASES.get(level.upper(), level.upper())
