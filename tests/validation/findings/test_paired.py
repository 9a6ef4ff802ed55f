"""Tests on paired answers say what the textbook says, and no sound model fails by chance."""

import math
import random
from collections import Counter
from fractions import Fraction
from statistics import NormalDist, mean, stdev

import pytest

from quantool.records import Verdict
from quantool.validation._findings.paired import FEWEST, error_of, holm, mcnemar, of_means, tail, verdicts


def answers(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    counts = {(True, True): both, (True, False): lost, (False, True): gained, (False, False): neither}
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    return [before for before, _ in pairs], [after for _, after in pairs]


@pytest.mark.parametrize(
    ("count", "trials"), [(0, 0), (0, 7), (5, 5), (9, 10), (13, 20), (700, 1300), (2600, 5000)]
)
def test_the_tail_is_that_of_a_coin(count: int, trials: int) -> None:
    ways = sum(math.comb(trials, heads) for heads in range(count, trials + 1))
    assert tail(count, trials) == pytest.approx(float(Fraction(ways, 2**trials)), rel=1e-9)


def test_published_tails() -> None:
    """Figures of the binomial distribution from elsewhere: scipy.stats.binomtest, and 92 of 8192 ways."""
    assert tail(59, 100) == pytest.approx(0.04431, abs=1e-5)
    assert tail(11, 13) == pytest.approx(92 / 8192)


def test_mcnemar_counts_what_changed_alone() -> None:
    found = mcnemar(*answers(50, 9, 1, 40))
    assert (found.measured, found.reference) == (0.51, 0.59)
    assert found.worse == pytest.approx(11 / 1024)
    assert found.better == pytest.approx(1023 / 1024)
    assert found.error == pytest.approx((0.51 * 0.49 / 99) ** 0.5)  # as lm-eval has it
    assert "9 lost, 1 gained: p = 0.011" in found.text


@pytest.mark.parametrize(
    ("lost", "gained", "max_drop", "verdict"),
    [
        (9, 1, 0.02, Verdict.REGRESSION),
        (9, 1, 0.1, Verdict.PASS),  # significant, but no more than may be lost
        (6, 2, 0.02, Verdict.PASS),  # more than may be lost, but chance explains it
        (0, 0, 0.0, Verdict.PASS),
        (0, 8, 0.02, Verdict.PASS),
        (0, 10, 0.02, Verdict.ANOMALOUS),
        (0, 10, 0.2, Verdict.PASS),
    ],
)
def test_a_loss_must_be_significant_and_large(
    lost: int, gained: int, max_drop: float, verdict: Verdict
) -> None:
    difference = mcnemar(*answers(60, lost, gained, 100 - 60 - lost - gained))
    assert verdicts([difference], max_drop) == [verdict]


def test_fewer_questions_than_the_fewest_prove_nothing() -> None:
    for count in (FEWEST - 1, FEWEST):
        (verdict,) = verdicts([mcnemar([True] * count, [False] * count)], 0.0)
        assert verdict is (Verdict.REGRESSION if count == FEWEST else Verdict.PASS)


def test_several_tests_share_one_level() -> None:
    assert holm([0.04], 0.05) == [True]
    assert holm([0.04, 0.5], 0.05) == [False, False]
    assert holm([0.04, 0.02], 0.05) == [True, True]  # 0.02 < 0.05 / 2, then 0.04 < 0.05
    assert holm([0.03, 0.2, 0.001], 0.05) == [False, False, True]
    assert holm([], 0.05) == []


def test_sound_models_pass_however_many_tasks_there_are() -> None:
    """Equally good models that disagree on a fifth of 200 documents, 30 tasks at once."""
    dice = random.Random(3)
    failed: Counter[bool] = Counter()
    for _ in range(200):
        found = []
        for _ in range(30):
            lost = sum(dice.random() < 0.5 for _ in range(40))
            found.append(mcnemar(*answers(100, lost, 40 - lost, 60)))
        failed[any(verdict.fails for verdict in verdicts(found, 0.02))] += 1
    assert failed[True] <= 10  # 5 % of 200


def test_grades_between_0_and_1_are_compared_by_their_means() -> None:
    dice = random.Random(1)
    before = [dice.random() * 0.8 + 0.2 for _ in range(400)]
    after = [grade - 0.05 + dice.uniform(-0.15, 0.15) for grade in before]
    found = of_means(before, after)
    assert found.measured - found.reference == pytest.approx(-0.05, abs=0.01)
    assert found.worse < 1e-8
    assert verdicts([found], 0.02) == [Verdict.REGRESSION]
    assert verdicts([of_means(after, before)], 0.02) == [Verdict.ANOMALOUS]
    other = [grade + dice.uniform(-0.2, 0.2) for grade in before[:30]]
    slight = of_means(before[:30], other)
    changes = [new - old for old, new in zip(before, other, strict=False)]
    assert slight.worse == pytest.approx(NormalDist().cdf(mean(changes) / (stdev(changes) / 30**0.5)))
    assert slight.worse + slight.better == pytest.approx(1)


def test_few_equal_grades_prove_nothing() -> None:
    assert of_means([0.5], [0.2]).worse == 0.5
    assert of_means([0.5] * 3, [0.2] * 3).worse == 0.125
    assert of_means([0.5] * 3, [0.5] * 3).worse == 1
    assert error_of([0.3]) == 0
