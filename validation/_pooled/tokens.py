"""Whether an artifact's tokenizer gives its model the same tokens, with what is added before and after a text."""

from __future__ import annotations

from collections.abc import Sequence

from quantool.records import Finding
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._pooled.probe import Probe


def judge_ids(
    build: FindingBuilder, reference: Sequence[Probe], artifact: Sequence[Probe], corpus: str
) -> Finding:
    """Token ids of all texts are equal; a token that is lost or added at an end, as EOS is, is named."""
    pairs = [(a.ids, b.ids) for a, b in zip(reference, artifact, strict=True)]
    wrong = [(theirs, ours) for theirs, ours in pairs if theirs != ours]
    problem = ""
    if wrong:
        causes = {_cause(*pair) for pair in wrong}
        cause = causes.pop() if len(causes) == 1 else ""
        theirs, ours = wrong[0]
        first = next(
            (n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(map(len, wrong[0]))
        )
        problem = f"{len(wrong)} of {len(pairs)} texts become other tokens, the first from token {first} on"
        problem += (
            f": {cause}"
            if cause
            else f" ({ours[first : first + 3]}, the source's {theirs[first : first + 3]})"
        )
    return build.fact("token_ids", f"{len(pairs) - len(wrong)} of {len(pairs)}", problem, corpus=corpus)


def _cause(theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    """What stands at an end of the one and not of the other, where all else is equal."""
    if theirs[:-1] == ours:
        return f"token {theirs[-1]} is missing at the end of a text (EOS)"
    if theirs[1:] == ours:
        return f"token {theirs[0]} is missing at the beginning of a text (BOS)"
    if theirs == ours[:-1]:
        return f"token {ours[-1]} is added at the end of a text"
    if theirs == ours[1:]:
        return f"token {ours[0]} is added at the beginning of a text"
    if theirs[:-1] == ours[:-1]:
        return f"a text ends with token {ours[-1]}, the source's with {theirs[-1]}"
    return ""
