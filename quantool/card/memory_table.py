"""Which file for which memory at which context: weights and the attention cache, added up from records."""

from __future__ import annotations

from collections.abc import Sequence

from quantool.records import ModelFacts, Report, Verdict
from quantool.report.finding_text import percent
from quantool.report.pooled import FIGURES, pooled_metrics, shown, worst_pooled
from quantool.report.recommend import recommend
from quantool.report.table import file_name, markdown, worst
from quantool.runtime.progress import amount

MIB = 1 << 20
GIB = 1 << 30
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)
MEMORIES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 141, 192, 256, 320, 512, 640, 1024, 2048)
"""GiB that cards and machines have."""
HALF = 2  # bytes of a cached number: f16 in llama.cpp, the model's bf16 in vLLM
BATCH = 512  # src/llama-context.cpp: n_ubatch; the scores of so many tokens are kept at once
USUAL_CONTEXT = 8192
"""Tokens for which the first table says what is needed."""


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


def which_file(facts: ModelFacts, reports: Sequence[Report]) -> str:
    """What to take first, and what each file needs and keeps, the largest first."""
    chosen = recommend(reports)
    lines = []
    if chosen is not None and len(reports) > 1:
        file = file_name(chosen.report)
        lines.append(
            f"**Take `{file}`** ({amount(chosen.report.artifact.bytes(), 'B')}) if you have no reason for another: "
            f"{chosen.reason}.{_agreement(chosen.report)}\n"
        )
    elif len(reports) == 1:
        only = reports[0]
        failed = "" if only.verdict() is Verdict.PASS else ", which did not pass"
        lines.append(
            f"There is one{failed}: {only.artifact.level}, {amount(only.artifact.bytes(), 'B')}.{_agreement(only)}\n"
        )
    usual = min(USUAL_CONTEXT, facts.context)
    lengths = [usual] if usual == facts.context else [usual, facts.context]
    metrics = pooled_metrics(reports)[:1]
    last = [FIGURES[metric] for metric in metrics] or ["same top-p"]
    heads = ["level", "file", "size", *(f"memory at {n:,} tokens" for n in lengths), *last]
    rows = []
    for report in sorted(reports, key=lambda entry: -entry.artifact.bytes()):
        level = report.artifact.level
        row = [f"**{level}**" if chosen and report is chosen.report and len(reports) > 1 else level]
        row.append(f"`{file_name(report)}`" + ("" if report.verdict() is Verdict.PASS else " (did not pass)"))
        row.append(amount(report.artifact.bytes(), "B"))
        row += [memory(needed(report, facts, length)) for length in lengths]
        row += [shown(worst_pooled(report)) for _ in metrics] or [_top(report)]
        rows.append(row)
    lines.append(markdown(heads, rows))
    explained = (
        ""
        if metrics
        else " Same top-p: how often the most likely next token is the original's, on the worst text."
    )
    lines.append(
        "Memory: of the GPU, or of the machine where there is none; what a driver keeps for itself comes on top."
        f"{explained}\n"
    )
    return "\n".join(lines)


def _agreement(report: Report) -> str:
    top = _top(report)
    return "" if top == "-" else f" Its most likely next token is the original's at {top} of positions."


def _top(report: Report) -> str:
    divergence = worst(report)
    return percent(report.find("same_top_p", divergence.corpus), plain=True) if divergence else "-"


def memory_tables(facts: ModelFacts, reports: Sequence[Report]) -> str:
    """Two tables: what each level needs at each context, and the largest level that fits each memory."""
    ordered = sorted(reports, key=lambda report: report.artifact.bytes())
    lengths = contexts(facts)
    heads = [f"{length:,} tokens" for length in lengths]
    rows = [
        [
            report.artifact.level,
            memory(report.artifact.bytes()),
            *(memory(needed(report, facts, n)) for n in lengths),
        ]
        for report in ordered
    ]
    text = markdown(["level", "files", *heads], rows)
    if len(ordered) > 1:
        text += "\nThe largest level that fits:\n\n"
        text += markdown(["memory", *heads], _fitting(facts, ordered, lengths))
    each = cache_bytes(facts, 1)
    text += (
        f"\nAdded up: the files, {each:,} bytes of attention cache for each token (2 · {facts.layers} layers · "
        f"{facts.kv_heads} heads · {facts.head_size} · {HALF} bytes, 16 bits a number), and "
        f"{memory(4 * BATCH * facts.vocabulary)} for the scores of {BATCH} tokens.\n"
    )
    if facts.sliding_window:
        text += f"Layers with a sliding window of {facts.sliding_window:,} tokens need less cache than counted here.\n"
    return text


def _fitting(facts: ModelFacts, ordered: Sequence[Report], lengths: Sequence[int]) -> list[list[str]]:
    """A row for each memory, from the first that holds anything to the first that holds everything."""
    rows = []
    for size in MEMORIES:
        best = []
        for length in lengths:
            fitting = [r.artifact.level for r in ordered if needed(r, facts, length) <= size * GIB]
            best.append(fitting[-1] if fitting else "-")
        if set(best) != {"-"}:
            rows.append([f"{size} GiB", *best])
        if set(best) == {ordered[-1].artifact.level}:
            break
    return rows


def memory(size: int) -> str:
    """GiB with one decimal, MiB below one GiB; rounded up: what is promised must fit."""
    if size < GIB:
        return f"{-(-size // MIB)} MiB"
    tenths = -(-size * 10 // GIB)
    return f"{tenths / 10:.1f} GiB"
