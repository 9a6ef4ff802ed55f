"""Sums of squares of activations, by expert and for several weights at once; whole matrices are compared in test_imatrix."""

import ctypes

import pytest
import torch

from quantool.methods._llama_cpp.importance import activations
from quantool.methods._llama_cpp.importance.activations import Collector, by_expert


@pytest.fixture
def collector() -> Collector:
    """One that has summed two columns of 20 rows for ``blk.0.attn_q.weight``."""
    found = Collector()
    found._add_dense("blk.0.attn_q.weight", weight(), torch.tensor([[[[1.0, 2.0]] * 20]]), 64)
    return found


def weight(matrices: int = 1) -> activations.GgmlTensor:
    return activations.GgmlTensor(ne=(ctypes.c_int64 * 4)(2, 8, matrices, 1))


def test_rows_count_for_their_experts() -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    experts = torch.tensor([2, 0, 2, 3, 0, 2])
    expected = torch.tensor([[10.0, 12.0], [0.0, 0.0], [14.0, 17.0], [6.0, 7.0]])
    assert torch.equal(by_expert(rows, experts, 4), expected)
    one_hot = torch.nn.functional.one_hot(experts, 4).T.to(rows)  # what a GPU computes
    assert torch.equal(one_hot @ rows, expected)


def test_weights_that_read_the_same_activations_share_their_sum(collector: Collector) -> None:
    assert collector._known("blk.0.attn_k.weight", weight(), 64)
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        assert collector.sums[name].tolist() == [[20.0, 40.0]]
        assert collector.counts[name].tolist() == [20]
    collector.sums["blk.0.attn_k.weight"] += 1
    assert collector.sums["blk.0.attn_q.weight"].tolist() == [[20.0, 40.0]]


def test_what_looks_the_same_and_is_not_is_summed_again(collector: Collector) -> None:
    """Another place, the same weight (the next graph has its tensors where this one had them), several matrices."""
    assert not collector._known("blk.0.attn_k.weight", weight(), 65)
    assert not collector._known("blk.0.attn_q.weight", weight(), 64)
    assert not collector._known("blk.0.attn_k.weight", weight(matrices=2), 64)
    collector.forget()
    assert not collector._known("blk.0.attn_k.weight", weight(), 64)
    assert [*collector.sums] == ["blk.0.attn_q.weight"]


def test_blocks_go_to_their_matrices() -> None:
    found = Collector()
    squares = torch.tensor(
        [[[[1.0]] * 16, [[2.0]] * 16, [[3.0]] * 16, [[4.0]] * 16]]
    )  # four blocks, two matrices
    found._add_dense(
        "blk.0.x.weight", activations.GgmlTensor(ne=(ctypes.c_int64 * 4)(1, 8, 2, 1)), squares, 64
    )
    assert found.sums["blk.0.x.weight"].tolist() == [[64.0], [96.0]]
    assert found.counts["blk.0.x.weight"].tolist() == [32]
