"""Bytes that an engine needs to run a model beside its files: the attention cache, and what it computes in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from quantool.records import ModelFacts

BATCH = 512
"""Tokens computed at once: n_ubatch of llama.cpp (src/llama-context.cpp)."""
CACHE_TYPES: Mapping[str, float] = MappingProxyType(
    {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32, "fp8": 1.0}
)
"""Bytes of a number of the cache; the types of ggml hold a scale for 32 of them."""


def cache_bytes(facts: ModelFacts, context: int, kind: str = "f16") -> int:
    """Bytes of the attention cache of ``context`` tokens: keys and values of every layer, of the type ``kind``.

    2 · layers · kv_heads · head_size · context · bytes a number (llama.cpp's src/llama-kv-cache.cpp prints the same sum).
    From above where layers look back over a sliding window only, or keep a compressed state.
    """
    return round(2 * facts.layers * facts.kv_heads * facts.head_size * context * CACHE_TYPES[kind])


def compute_bytes(facts: ModelFacts, context: int) -> int:
    """Bytes that a batch of tokens is computed in, from above, with flash attention as llama.cpp's tools have it by default.

    The scores of the batch in float32, two of its hidden states, and the mask of attention in float16
    (llama.cpp prints the sum as "compute buffer size"; without flash attention it grows by the scores of every head).
    What the experts of a mixture compute in is not counted: with an ordinary vocabulary the scores take more.
    """
    return 4 * BATCH * (facts.vocabulary + 2 * facts.hidden) + 2 * BATCH * context


def running_bytes(facts: ModelFacts, files: int, context: int, kind: str = "f16") -> int:
    """Bytes to run ``files`` bytes of a model with a cache of ``context`` tokens of the type ``kind``."""
    return files + cache_bytes(facts, context, kind) + compute_bytes(facts, context)
