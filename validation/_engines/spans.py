"""Windows in spans: what a worker keeps as soon as it is done, so that nothing is lost with a GPU, and what each GPU does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import QuantoolError
from quantool.runtime import process
from quantool.runtime.parallel import side_by_side
from quantool.runtime.progress import Bar
from quantool.runtime.worker import Work

SPAN_TOKENS = 8192
"""Tokens of a span; one window at least."""


@dataclass(frozen=True)
class Span:
    """Windows ``first`` to ``last`` (exclusive) of one of several texts."""

    text: int
    first: int
    last: int

    @property
    def windows(self) -> int:
        """How many."""
        return self.last - self.first

    def part(self, whole: Path, key: str) -> Path:
        """Where its part of the file ``whole``, which is kept under ``key``, lies until all are there."""
        return folder_of(whole) / f"{key[:16]}-{self.first}-{self.last}{whole.suffix}"


def folder_of(whole: Path) -> Path:
    """Where the parts of a file lie."""
    return whole.with_name(f"{whole.name}.parts")


def growing_file(whole: Path, key: str) -> Path:
    """What all spans of a file that is kept under ``key`` are written to until it is ``whole``; its folder is made."""
    place = folder_of(whole) / f"{key[:16]}{whole.suffix}"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def places_of(request: dict[str, Any]) -> list[tuple[Path, int, int] | None]:
    """In a worker, for each of the ``spans``: its file, how many windows that has, the first of them; None: the output itself."""
    import numpy as np

    if "states" not in request:
        return [None] * len(request["outputs"])
    totals = [len(np.load(path, mmap_mode="r")) for path in request["windows"]]
    return [(Path(request["states"][text]), totals[text], first) for text, first, _ in request["spans"]]


def spans_of(counts: Sequence[int], context: int) -> list[Span]:
    """All windows of texts of ``counts`` windows of ``context`` tokens."""
    step = max(1, SPAN_TOKENS // context)
    return [
        Span(text, first, min(first + step, count))
        for text, count in enumerate(counts)
        for first in range(0, count, step)
    ]


def divide(spans: Sequence[Span], hands: int) -> list[list[Span]]:
    """``spans`` in at most ``hands`` shares of about as many windows, in order; none is empty."""
    total = sum(span.windows for span in spans)
    shares: list[list[Span]] = [[] for _ in range(hands)]
    before = 0
    for span in spans:
        shares[min(hands - 1, (2 * before + span.windows) * hands // (2 * max(1, total)))].append(span)
        before += span.windows
    return [share for share in shares if share]


def drop_parts(wholes: Sequence[Path]) -> None:
    """Remove what parts there are of files that are whole, or that nobody wants."""
    for whole in wholes:
        shutil.rmtree(folder_of(whole), ignore_errors=True)


def in_shares(
    work: Work,
    spans: Sequence[Span],
    request: Callable[[Sequence[Span]], dict[str, Any]],
    hands: Sequence[dict[str, str]],
    *,
    log: Path,
    bar: Bar,
    failure: type[QuantoolError],
) -> list[dict[str, Any]]:
    """Run ``work`` on the ``request`` of a share of the spans for each of ``hands``, the environments of as many processes."""
    shares = divide(spans, len(hands))

    def run(number: int) -> Callable[[Bar], dict[str, Any]]:
        asked, variables = request(shares[number]), hands[number]
        own = log.with_suffix(f".{number}{log.suffix}") if number else log
        return lambda part: process.call(work, asked, log=own, bar=part, failure=failure, variables=variables)

    return side_by_side([run(number) for number in range(len(shares))], bar)
