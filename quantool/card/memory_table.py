"""Which level for which memory at which context: weights and the attention cache, added up from records."""

from __future__ import annotations

from collections.abc import Sequence

from quantool.records import ModelFacts, Report
from quantool.report.table import markdown

GIB = 1 << 30
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)
MEMORIES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 141, 192, 256, 320, 512, 640, 1024, 2048)
"""GiB that cards and machines have."""
HALF = 2  # bytes of a cached number: f16 in llama.cpp, the model's bf16 in vLLM
BATCH = 512  # src/llama-context.cpp: n_ubatch; the scores of so many tokens are kept at once


def cache_bytes(facts: ModelFacts, context: int, number: int = HALF) -> int:
    """Bytes of the attention cache of ``context`` tokens: keys and values of every layer, ``number`` bytes each.

    2 · layers · kv_heads · head_size · number · context (llama.cpp's src/llama-kv-cache.cpp prints the same sum). From
    above where layers look back over a sliding window only, or keep a compressed state.
    """
    return 2 * facts.layers * facts.kv_heads * facts.head_size * number * context


def needed(report: Report, facts: ModelFacts, context: int) -> int:
    """Bytes to run an artifact: its files, the cache, and the scores of a batch of tokens in float32."""
    return report.artifact.bytes() + cache_bytes(facts, context) + 4 * BATCH * facts.vocabulary


def contexts(facts: ModelFacts) -> list[int]:
    """The contexts of the tables; the model's own is the last."""
    return [*(context for context in CONTEXTS if context < facts.context), facts.context]


def choosing(facts: ModelFacts, reports: Sequence[Report]) -> str:
    """Two tables: GiB that each level needs at each context, and the largest level that fits each memory."""
    ordered = sorted(reports, key=lambda report: report.artifact.bytes())
    lengths = contexts(facts)
    heads = [f"{length:,} tokens" for length in lengths]
    rows = [
        [
            report.artifact.level,
            _gib(report.artifact.bytes()),
            *(_gib(needed(report, facts, n)) for n in lengths),
        ]
        for report in ordered
    ]
    text = markdown(["level", "files", *heads], rows)
    if len(ordered) > 1:
        text += "\nThe largest level that fits:\n\n"
        text += markdown(["memory", *heads], _fitting(facts, ordered, lengths))
    each = cache_bytes(facts, 1)
    text += (
        f"\nGiB: the files, {each:,} bytes of attention cache for each token (2 · {facts.layers} layers · {facts.kv_heads} "
        f"heads · {facts.head_size} · {HALF} bytes, 16 bits a number), and {_gib(4 * BATCH * facts.vocabulary)} for the "
        f"scores of {BATCH} tokens. What a driver or an engine keeps for itself comes on top.\n"
    )
    if facts.sliding_window:
        text += f"Layers with a sliding window of {facts.sliding_window:,} tokens need less cache than counted here.\n"
    return text


def _fitting(facts: ModelFacts, ordered: Sequence[Report], lengths: Sequence[int]) -> list[list[str]]:
    """A row for each memory, from the first that holds anything to the first that holds everything."""
    rows = []
    for memory in MEMORIES:
        best = []
        for length in lengths:
            fitting = [r.artifact.level for r in ordered if needed(r, facts, length) <= memory * GIB]
            best.append(fitting[-1] if fitting else "-")
        if set(best) != {"-"}:
            rows.append([f"{memory} GiB", *best])
        if set(best) == {ordered[-1].artifact.level}:
            break
    return rows


def _gib(size: int) -> str:
    """GiB, rounded up: what is promised must fit."""
    hundredths = -(-size * 100 // GIB)
    return f"{hundredths / 100:.2f}"
