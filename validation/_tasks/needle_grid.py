"""Two grids of hidden sentences compared: what the reference found and the artifact lost, as a finding and a table."""

from __future__ import annotations

from collections.abc import Sequence

from quantool.records import Finding, Verdict
from quantool.validation._findings.paired import mcnemar, verdicts
from quantool.validation._tasks.needle_worker import Hidden

CELLS = {(True, True): "both", (True, False): "LOST", (False, True): "gained", (False, False): "none"}
"""What stands in the grid, by whether the reference and the artifact found the sentence."""
ANSWER_SHOWN = 60  # characters


def nothing_found(reference: Sequence[Hidden], *, chat: bool) -> str:
    """Why retrieval cannot be compared with a reference that finds nothing."""
    form = "in chat form" if chat else "as the beginning of the sentence (it has no chat template)"
    return (
        f"the reference finds none of {len(reference)} hidden sentences, asked {form}, so a loss could not be seen; its "
        f"first answer: {reference[0].answer[:ANSWER_SHOWN]!r}"
    )


def compare(
    reference: Sequence[Hidden], artifact: Sequence[Hidden], check: str = "needle", metric: str = "retrieval"
) -> Finding:
    """The finding on two grids of the same cells, in the same order."""
    difference = mcnemar([cell.found for cell in reference], [cell.found for cell in artifact])
    (verdict,) = verdicts([difference], 0.0)
    conclusion = {
        Verdict.REGRESSION: "; lost beyond chance",
        Verdict.ANOMALOUS: "; more than the reference beyond chance, so the comparison is probably broken",
    }.get(verdict, "")
    summary = (
        f"finds {sum(cell.found for cell in artifact)} of {len(artifact)} hidden sentences, the reference "
        f"{sum(cell.found for cell in reference)}; {difference.text}{conclusion}"
    )
    lines = [
        summary,
        *_grid(reference, artifact),
        *_lost(reference, artifact),
    ]
    repeats = max(cell.repeats for cell in artifact)
    if repeats > 1:
        lines.append(f"the text was too short and stands up to {repeats} times in a prompt")
    return Finding(
        check=check,
        metric=metric,
        verdict=verdict,
        measured=difference.measured,
        reference=difference.reference,
        error=difference.error,
        detail="\n".join(lines),
    )


def _grid(reference: Sequence[Hidden], artifact: Sequence[Hidden]) -> list[str]:
    """A table: a row for each depth, a column for each length in tokens, what ``CELLS`` says in them."""
    found = {
        (theirs.depth, theirs.length): CELLS[theirs.found, ours.found]
        for theirs, ours in zip(reference, artifact, strict=True)
    }
    lengths, depths = sorted({length for _, length in found}), sorted({depth for depth, _ in found})
    head = "  depth" + "".join(f"{length:>9}" for length in lengths)
    rows = [
        f"{100 * depth:5.0f} %" + "".join(f"{found[depth, length]:>9}" for length in lengths)
        for depth in depths
    ]
    return [head, *rows]


def _lost(reference: Sequence[Hidden], artifact: Sequence[Hidden]) -> list[str]:
    """What the artifact said in the first cell that it lost."""
    for theirs, ours in zip(reference, artifact, strict=True):
        if theirs.found and not ours.found:
            place = f"{100 * ours.depth:.0f} % of {ours.length} tokens"
            return [f"at {place} {ours.value} is asked for, the answer: {ours.answer[:ANSWER_SHOWN]!r}"]
    return []
