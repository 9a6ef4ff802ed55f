"""Statistics of scored tokens, each with one standard error. Definitions as llama-perplexity's.

llama.cpp, tools/perplexity/perplexity.cpp, ``kl_divergence``: the error of a mean is sqrt(variance / (n - 1)), that of
ln(PPL_Q / PPL_ref) is paired (both variances minus twice the covariance), that of an RMS is propagated from the mean
square, and percentiles interpolate linearly between order statistics. What llama-perplexity gives no error for, has one
here: percentiles by the order statistics one binomial standard deviation of the rank away (David and Nagaraja, Order
Statistics, 3rd ed., 7.1), the maximum by the delete-one jackknife.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantool.runtime.workspace import written

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Tokens:
    """Per-token scores of an artifact beside its reference, all float32 [tokens], logarithms natural."""

    nll_reference: NDArray[np.float32]
    """-ln p of the token that came, by the reference."""
    nll: NDArray[np.float32]
    """The same by the artifact."""
    kld: NDArray[np.float32]
    """Kullback-Leibler divergence of the artifact's prediction from the reference's."""
    same_top: NDArray[np.float32]
    """1 where both prefer the same token, else 0."""

    def save(self, path: Path) -> None:
        """Write as .npz."""
        with written(path) as part, part.open("wb") as file:
            np.savez(
                file, nll_reference=self.nll_reference, nll=self.nll, kld=self.kld, same_top=self.same_top
            )

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read what ``save`` wrote."""
        with np.load(path) as stored:
            return cls(**{name: stored[name] for name in stored.files})


@dataclass(frozen=True)
class Estimate:
    """A number and one standard error of it."""

    value: float
    error: float


@dataclass(frozen=True)
class Scores:
    """What the scored tokens say."""

    tokens: int
    perplexity: Estimate
    perplexity_reference: Estimate
    ln_ppl_ratio: Estimate
    """ln(PPL / PPL of the reference)."""
    mean_kld: Estimate
    kld_median: Estimate
    kld_99: Estimate
    kld_999: Estimate
    kld_max: Estimate
    rms_dp: Estimate
    """Root mean square of the change of the probability of the token that came."""
    same_top_p: Estimate
    """Share of positions whose most likely token is the reference's."""


def summarize(tokens: Tokens) -> Scores:
    """All statistics of ``tokens`` (at least two)."""
    nll, nll_reference = tokens.nll.astype(np.float64), tokens.nll_reference.astype(np.float64)
    kld = np.sort(tokens.kld.astype(np.float64))
    change = np.exp(-nll) - np.exp(-nll_reference)
    square = mean(change**2)
    rms = math.sqrt(square.value)
    share = float(tokens.same_top.mean(dtype=np.float64))
    return Scores(
        tokens=len(nll),
        perplexity=_exponential(mean(nll)),
        perplexity_reference=_exponential(mean(nll_reference)),
        ln_ppl_ratio=mean(nll - nll_reference),
        mean_kld=mean(kld),
        kld_median=_quantile(kld, 0.5),
        kld_99=_quantile(kld, 0.99),
        kld_999=_quantile(kld, 0.999),
        kld_max=Estimate(float(kld[-1]), float(kld[-1] - kld[-2]) * (len(kld) - 1) / len(kld)),
        rms_dp=Estimate(rms, 0.5 / rms * square.error if rms else 0.0),
        same_top_p=Estimate(share, math.sqrt(share * (1 - share) / (len(nll) - 1))),
    )


def mean(values: NDArray[np.float64]) -> Estimate:
    """The mean of at least two ``values`` and its standard error."""
    return Estimate(float(values.mean()), math.sqrt(float(values.var()) / (len(values) - 1)))


def _exponential(estimate: Estimate) -> Estimate:
    value = math.exp(min(estimate.value, 700.0))  # a ruined artifact must not overflow
    return Estimate(value, value * estimate.error)


def _quantile(ordered: NDArray[np.float64], fraction: float) -> Estimate:
    """Linear interpolation between order statistics; half the width of the interval of one standard deviation."""
    last = len(ordered) - 1
    spread = math.sqrt(fraction * (1 - fraction) / len(ordered))
    low, value, high = np.interp(
        np.clip([fraction - spread, fraction, fraction + spread], 0, 1) * last,
        np.arange(len(ordered)),
        ordered,
    )
    return Estimate(float(value), float(high - low) / 2)
