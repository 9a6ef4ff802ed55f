"""How many calibration tokens a router sends to each expert, counted while llmcompressor calibrates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Counter:
    """Of one layer's experts: the first ``calls`` calls are the calibration samples, one each; then scales are searched."""

    def __init__(self, experts: int, calls: int) -> None:
        import torch

        self.tokens = torch.zeros(experts, dtype=torch.long)
        self._left = calls

    def hook(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of ``LinearExperts2D``: its second argument names the experts of each token [tokens, used]."""
        import torch

        chosen = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        if self._left and isinstance(chosen, torch.Tensor) and not chosen.is_floating_point():
            self._left -= 1
            self.tokens += torch.bincount(chosen.flatten().cpu(), minlength=len(self.tokens))


@contextmanager
def counted_routing(model: Any, samples: int) -> Iterator[dict[str, Any]]:
    """Count while the block runs; ``_Counter`` by name of the module that holds a layer's experts."""
    from llmcompressor.modeling.moe.linearize import get_linearized_moes

    counters: dict[str, Any] = {}
    handles = []
    for name, module in get_linearized_moes(model):
        counters[name] = _Counter(module.num_experts, samples)
        handles.append(module.register_forward_pre_hook(counters[name].hook, with_kwargs=True))
    try:
        yield counters
    finally:
        for handle in handles:
            handle.remove()
