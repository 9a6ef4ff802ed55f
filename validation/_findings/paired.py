"""Whether an artifact answers worse than its reference, or only otherwise: tests on answers to the same questions.

Questions that both answer rightly, or both wrongly, say nothing about the difference. Of the others, as many are lost as
gained when the two are equally good, so the number lost is binomial with a probability of one half: the exact form of
McNemar's test (Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
Psychometrika 12, 1947). Several tests of one artifact are held to one level together by Holm's procedure (S. Holm, "A
simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantool.records import Verdict

LOSS_LEVEL = 0.05
"""A loss is significant when equally good models lose that much with less than this probability."""
GAIN_LEVEL = 0.001
"""Likewise a gain. Quantization adds noise and no knowledge, so what is better needs stronger proof than what is worse: this
is the level of three standard errors, at which a better perplexity counts as an anomaly."""

FEWEST = 5
"""Questions that a test needs: of fewer, all can be lost by chance with more than ``LOSS_LEVEL``."""


@dataclass(frozen=True)
class Difference:
    """An artifact beside its reference: larger values are better."""

    measured: float
    reference: float
    error: float
    """One standard error of ``measured``."""
    error_reference: float
    worse: float
    """Probability that equally good models differ at least so much to the artifact's disadvantage."""
    better: float
    text: str
    """How it was tested."""


def mcnemar(reference: Sequence[bool], artifact: Sequence[bool]) -> Difference:
    """Compare right (True) and wrong answers to the same questions; there must be one at least."""
    pairs = list(zip(reference, artifact, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    worse, better = tail(lost, lost + gained), tail(gained, lost + gained)
    text = f"{lost} lost, {gained} gained: p = {worse:.2g} (McNemar's exact test, one-sided)"
    ours, theirs = sum(artifact) / len(pairs), sum(reference) / len(pairs)
    return Difference(ours, theirs, error_of(artifact), error_of(reference), worse, better, text)


def tail(count: int, trials: int) -> float:
    """Probability of ``count`` or more heads in ``trials`` throws of a coin; exact."""
    ways = total = math.comb(trials, count)
    for heads in range(count, trials):
        ways = ways * (trials - heads) // (heads + 1)
        total += ways
    return total / (1 << trials)


def of_means(reference: Sequence[float], artifact: Sequence[float]) -> Difference:
    """Compare grades of the same answers (F1, ROUGE) by the mean of their differences, taken as normal.

    No probability is below that of all differences having one sign by chance, which is what few answers can show.
    """
    count = len(reference)
    changes = [ours - theirs for theirs, ours in zip(reference, artifact, strict=True)]
    mean, error = sum(changes) / count, error_of(changes)
    better = math.erfc(mean / error / math.sqrt(2)) / 2 if error else float(mean <= 0)
    worse = math.erfc(-mean / error / math.sqrt(2)) / 2 if error else float(mean >= 0)
    worse, better = max(worse, 0.5**count), max(better, 0.5**count)
    text = f"difference {mean:+.4f} ± {error:.2g}: p = {worse:.2g} (paired, one-sided)"
    ours, theirs = sum(artifact) / count, sum(reference) / count
    return Difference(ours, theirs, error_of(artifact), error_of(reference), worse, better, text)


def error_of(values: Sequence[float]) -> float:
    """Standard error of the mean as lm-eval has it: sample deviation over the root of the count; 0 for one value."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def verdicts(differences: Sequence[Difference], max_drop: float) -> list[Verdict]:
    """The verdict of each: REGRESSION for a loss that is significant and larger than ``max_drop``, ANOMALOUS for such a gain.

    The more differences there are, the more each has to show: together they are wrong no more often than one alone.
    """
    losses = holm([difference.worse for difference in differences], LOSS_LEVEL)
    gains = holm([difference.better for difference in differences], GAIN_LEVEL)
    found = []
    for difference, lost, gained in zip(differences, losses, gains, strict=True):
        change = difference.measured - difference.reference
        if lost and -change > max_drop:
            found.append(Verdict.REGRESSION)
        elif gained and change > max_drop:
            found.append(Verdict.ANOMALOUS)
        else:
            found.append(Verdict.PASS)
    return found


def holm(probabilities: Sequence[float], level: float) -> list[bool]:
    """Which of several tests are significant at ``level`` when one false alarm among all of them counts."""
    order = sorted(range(len(probabilities)), key=lambda place: probabilities[place])
    found = [False] * len(probabilities)
    for rank, place in enumerate(order):
        if not probabilities[place] < level / (len(order) - rank):
            break
        found[place] = True
    return found
