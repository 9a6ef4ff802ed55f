"""Which file for which memory at which context: weights and the attention cache, added up from records."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantool.footprint import BATCH, CACHE_TYPES, cache_bytes, compute_bytes, running_bytes
from quantool.records import ModelFacts, Report, Verdict
from quantool.report.finding_text import percent
from quantool.report.fitted import divergences, sentences
from quantool.report.pooled import FIGURES, pooled_metrics, shown, worst_pooled
from quantool.report.recommend import recommend
from quantool.report.table import file_name, markdown, worst
from quantool.runtime.progress import amount

MIB = 1 << 20
GIB = 1 << 30
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)
MEMORIES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 141, 192, 256, 320, 512, 640, 1024, 2048)
"""GiB that cards and machines have."""
USUAL_CONTEXT = 8192
"""Tokens for which the first table says what is needed."""
OWNED = (8, 12, 16, 24, 48, 80, 160, 320, 640)
"""GiB of the cards that people have, and of two to eight of the largest."""
ASKED_CONTEXTS = (8192, 32768)
RESERVE = GIB // 2
"""What a driver and a desktop keep for themselves."""
CACHES = {True: ("f16", "q8_0"), False: ("bf16", "fp8")}
"""Types of the cache that llama.cpp (True) and vLLM offer without loss worth naming."""


def needed(report: Report, facts: ModelFacts, context: int, kind: str = "f16") -> int:
    """Bytes to run an artifact: its files, the cache of the type ``kind``, and what is computed in."""
    return running_bytes(facts, report.artifact.bytes(), context, kind)


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
    lines += [your_memory(facts, reports), *(f"{sentence}\n" for sentence in sentences(reports))]
    return "\n".join(line for line in lines if line)


def your_memory(facts: ModelFacts, reports: Sequence[Report]) -> str:
    """The best file for each memory that people have; only rows in which the model's size makes a difference.

    The best is the one closest to the reference among those that passed and fit; where nothing was measured, the largest.
    Empty where no file passed.
    """
    passed = [report for report in reports if report.verdict() is Verdict.PASS]
    if not passed or not facts.task.generates:
        return ""
    gguf = all(report.artifact.files[0].name.endswith(".gguf") for report in passed)
    lengths = [n for n in ASKED_CONTEXTS if n <= facts.context] or [facts.context]
    cases = [(length, kind) for length in lengths for kind in CACHES[gguf]]
    closest = min(passed, key=_distance)
    rows = []
    for size in OWNED:
        best = [_best(facts, passed, size * GIB - RESERVE, *case) for case in cases]
        if any(best):
            rows.append([f"{size} GB", *(f"`{file_name(report)}`" if report else "-" for report in best)])
        if all(report is closest for report in best):
            break
    longest = f"{lengths[-1]:,} tokens"
    if not rows:
        return f"None fits {OWNED[-1]} GB with {longest}.\n"
    if len(rows) == 1 and rows[0][0] == f"{OWNED[0]} GB" and len(set(rows[0][1:])) == 1:
        return f"A memory of {OWNED[0]} GB holds {rows[0][1]}, the file closest to the original, with {longest} of context.\n"
    heads = ["your memory", *(f"{length:,} tokens, cache {kind}" for length, kind in cases)]
    return markdown(heads, rows) + (
        f"\nThe file closest to the original that fits with its cache, {memory(compute_bytes(facts, lengths[-1]))} to compute in, "
        f"and {memory(RESERVE)} left to the driver.{_how_to_set(cases) if gguf else ''}\n"
    )


def _best(facts: ModelFacts, reports: Sequence[Report], room: int, context: int, kind: str) -> Report | None:
    fitting = [report for report in reports if needed(report, facts, context, kind) <= room]
    return min(fitting, key=_distance, default=None)


def _distance(report: Report) -> tuple[float, int]:
    """Mean KLD on the worst text, and what decides where none was measured: the larger file is first."""
    return max(divergences(report).values(), default=math.inf), -report.artifact.bytes()


def _how_to_set(cases: Sequence[tuple[int, str]]) -> str:
    kind = cases[-1][1]
    return f" The second kind of cache: `--cache-type-k {kind} --cache-type-v {kind}`."


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
        f"{facts.kv_heads} heads · {facts.head_size} · {CACHE_TYPES['f16']:g} bytes, 16 bits a number), and up to "
        f"{memory(compute_bytes(facts, lengths[-1]))} to compute {BATCH} tokens in.\n"
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
