from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def linearized(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of one layer of four experts, as llmcompressor finds them."""
    import torch
    from llmcompressor.modeling.moe import linearize

    class Layer(torch.nn.Module):
        num_experts = 4

        def forward(self, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            return hidden

    layer = Layer()
    monkeypatch.setattr(linearize, "get_linearized_moes", lambda _: [("model.layers.0.mlp.experts", layer)])
    return layer


def test_the_tokens_of_each_expert_are_counted_once_a_sample(linearized: Any) -> None:
    import torch

    from quantool.methods._compressed.experts import counted_routing

    chosen = torch.tensor([[0, 1], [0, 3], [0, 1]])
    with counted_routing(SimpleNamespace(), 2) as routed:
        linearized(torch.zeros(3, 8), chosen, torch.zeros(3, 2))
        linearized(torch.zeros(3, 8), top_k_index=chosen, top_k_weights=torch.zeros(3, 2))
        linearized(torch.zeros(3, 8), chosen, torch.zeros(3, 2))  # a scale is tried: no further sample
    linearized(torch.zeros(3, 8), chosen, torch.zeros(3, 2))
    assert routed["model.layers.0.mlp.experts"].tokens.tolist() == [6, 4, 0, 2]
