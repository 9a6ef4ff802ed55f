"""Statistics of vectors beside others, against values worked out by hand."""

import math

import numpy as np
import pytest

from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._pooled.comparison import (
    cosines,
    kendall,
    logit_error,
    mean,
    permutation,
    recall,
    same_label,
)
from quantool.validation._pooled.probe import Probe
from quantool.validation._pooled.tokens import judge_ids
from quantool.validation._pooled.word_pieces import cleaned

GENERATOR = np.random.default_rng(3)
VECTORS = GENERATOR.standard_normal((60, 16)).astype(np.float32)


def test_cosines_are_those_of_directions() -> None:
    assert cosines(VECTORS, 3 * VECTORS) == pytest.approx(np.ones(60))
    assert cosines(VECTORS, -VECTORS) == pytest.approx(-np.ones(60))
    plane = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    assert cosines(plane, np.array([[0, 1], [1, 0], [1, 1]], np.float32)) == pytest.approx(
        [0, math.sqrt(0.5), 0]
    )


def test_recall_counts_neighbours_and_not_the_text_itself() -> None:
    assert recall(VECTORS, VECTORS * 2).tolist() == [1.0] * 60
    line = np.stack([np.cos(np.arange(20) * 0.01), np.sin(np.arange(20) * 0.01)], 1).astype(np.float32)
    other = line.copy()
    other[0] = line[19]  # the first text stands where the last one does
    assert recall(line, other)[0] == pytest.approx(1 / 10)  # 10 alone is among 1 to 10 and among 10 to 19
    assert recall(VECTORS, GENERATOR.standard_normal((60, 16)).astype(np.float32)).mean() < 0.4


def test_the_error_of_logits_is_1_for_a_constant_and_0_for_the_same() -> None:
    assert logit_error(VECTORS, VECTORS).value == 0
    constant = np.broadcast_to(VECTORS.mean(0), VECTORS.shape)
    assert logit_error(VECTORS, constant).value == pytest.approx(1, rel=1e-5)
    assert math.isnan(logit_error(constant, VECTORS).value)
    assert math.isnan(logit_error(VECTORS, VECTORS * np.float32(np.nan)).value)


def test_labels_and_their_order() -> None:
    assert same_label(VECTORS, VECTORS).mean() == 1
    assert permutation(VECTORS, VECTORS) is None
    assert permutation(VECTORS[:, :3], VECTORS[:, [2, 0, 1]]) == [2, 0, 1]
    assert permutation(VECTORS[:, :1], VECTORS[:, 1:2]) is None
    assert permutation(VECTORS[:, :3], GENERATOR.standard_normal((60, 3)).astype(np.float32)) is None


def test_kendall_by_query() -> None:
    scores = np.array([[1], [2], [3], [4], [4], [3], [2], [1]], np.float32)
    turned = np.array([[4], [3], [2], [1], [4], [3], [1], [2]], np.float32)
    assert kendall(scores, turned, 4) == pytest.approx([-1, (5 - 1) / 6])
    assert kendall(scores, np.zeros_like(scores), 4) == pytest.approx([0, 0])


def test_the_mean_has_a_standard_error() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert mean(values).value == 2.5
    assert mean(values).error == pytest.approx(math.sqrt(5 / 3) / 2)


@pytest.mark.parametrize(
    ("ours", "detail"),
    [
        ((1, 5, 6), "token 2 is missing at the end of a text (EOS)"),
        ((5, 6, 2), "token 1 is missing at the beginning of a text (BOS)"),
        ((1, 5, 6, 2, 2), "token 2 is added at the end of a text"),
        ((1, 1, 5, 6, 2), "token 1 is added at the beginning of a text"),
        ((1, 5, 6, 3), "a text ends with token 3, the source's with 2"),
        ((1, 7, 6, 2), "the first from token 1 on ((7, 6, 2), the source's (5, 6, 2))"),
    ],
)
def test_other_tokens_are_explained(ours: tuple[int, ...], detail: str) -> None:
    theirs = Probe("a", None, (1, 5, 6, 2))
    build = FindingBuilder("x")
    finding = judge_ids(build, [theirs] * 2, [theirs, Probe("a", None, ours)], "en")
    assert finding.verdict.fails
    assert detail in finding.detail
    assert finding.measured == "1 of 2"
    assert not judge_ids(build, [theirs], [theirs], "en").verdict.fails


def test_text_is_cleaned_as_bert_does() -> None:
    assert cleaned("a\x01b\tc\nd\u2028e\ufffd\u200bf") == "ab c d ef"
    assert cleaned("x " + "y" * 101 + " " + "z" * 100) == "x [UNK] " + "z" * 100
