"""``quantool diff``: what changed between two releases, from their records: source, versions, options, tensors, figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantool.attest.release import RECORD, Release, ReleasedOutput
from quantool.errors import SourceError
from quantool.record import Record
from quantool.records import Report
from quantool.report.finding_text import figure, percent
from quantool.report.pooled import FIGURES, pooled_metrics, shown, worst_pooled
from quantool.report.table import markdown, worst
from quantool.runtime.progress import amount

NONE = "-"
LONGEST = 60
"""Characters of a value in a table."""


class Change(Record):
    """One thing that is not in both releases the same; ``-`` where one lacks it."""

    kind: str
    """``source``, ``version``, ``configuration``, ``option``, ``output``, ``tensors`` or ``figure``."""
    name: str
    before: str
    after: str


def changes(old: Release, new: Release) -> tuple[Change, ...]:
    """What changed from ``old`` to ``new``, in the order in which a changelog tells it.

    Raises SourceError for a record that lacks what packing writes.
    """
    try:
        return tuple(_changes(old, new))
    except (LookupError, TypeError, AttributeError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise SourceError(f"{RECORD} of one of the two is no record of a release ({kind})") from error


def _changes(old: Release, new: Release) -> Iterator[Change]:
    before, after = _by_level(old), _by_level(new)
    both = [level for level in after if level in before]
    yield from _entries("source", _source(old), _source(new))
    yield from _entries("version", old.plan["versions"], new.plan["versions"])
    yield from _entries("configuration", _flat(old.plan["config"]), _flat(new.plan["config"]))
    for level in both:
        options = (_flat(_planned(release, level)["options"]) for release in (old, new))
        yield from (_prefixed(level, change) for change in _entries("option", *options))
    yield from _entries("output", dict.fromkeys(before, "there"), dict.fromkeys(after, "there"))
    for level in both:
        yield from _tensors(level, before[level], after[level])
    for level in both:
        yield from figures(level, before[level].report, after[level].report)


def as_markdown(found: Sequence[Change]) -> str:
    """The changes as a table; one sentence where there are none."""
    if not found:
        return "Nothing changed but, maybe, the bytes.\n"
    rows = [[change.kind, change.name, _short(change.before), _short(change.after)] for change in found]
    return markdown(["what", "of", "before", "now"], rows)


def figures(level: str, before: Report, after: Report) -> list[Change]:
    """Size and the figures of the worst corpus, as tables show them."""
    found = []
    for name, old, new in zip(*_named(before, after), strict=True):
        if old != new:
            found.append(Change(kind="figure", name=f"{level} {name}", before=old, after=new))
    return found


def _named(before: Report, after: Report) -> tuple[list[str], list[str], list[str]]:
    metrics = pooled_metrics([before, after])
    names = [
        "size", "bits per weight", *([FIGURES[metrics[0]]] if metrics else ["mean KLD", "same top-p"]), "verdict",
    ]  # fmt: skip
    rows = []
    for report in (before, after):
        divergence = worst(report)
        corpus = divergence.corpus if divergence else None
        measured = (
            [shown(worst_pooled(report))]
            if metrics
            else [figure(divergence, plain=True), percent(report.find("same_top_p", corpus), plain=True)]
        )
        artifact = report.artifact
        size, bits = amount(artifact.bytes(), "B"), f"{artifact.bits_per_weight:.2f}"
        rows.append([size, bits, *measured, str(report.verdict())])
    return names, rows[0], rows[1]


def _tensors(level: str, before: ReleasedOutput, after: ReleasedOutput) -> Iterator[Change]:
    """How many tensors went from one type to another, were added or left out."""
    held = [
        {tensor.name: tensor.dtype for line in output.ledger.tensors for tensor in line.stored()}
        if output.ledger is not None
        else {}
        for output in (before, after)
    ]
    if not all(held):
        return
    names = held[0].keys() | held[1].keys()
    moves = Counter(
        (held[0].get(name, NONE), held[1].get(name, NONE))
        for name in names
        if held[0].get(name) != held[1].get(name)
    )
    for (old, new), count in sorted(moves.items()):
        yield Change(kind="tensors", name=f"{level} {count} tensor{'s' * (count > 1)}", before=old, after=new)


def _source(release: Release) -> dict[str, Any]:
    source = release.plan["source"]
    weights = [file["sha256"] for file in source["files"] if file["name"].endswith(".safetensors")]
    return {
        "checkpoint": source["model_id"],
        "commit": source["commit"] or NONE,
        "weights": ", ".join(str(digest)[:12] for digest in weights),
    }


def _by_level(release: Release) -> dict[str, ReleasedOutput]:
    return {output.id: output for output in release.outputs}


def _planned(release: Release, identity: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(o for o in release.plan["outputs"] if o["id"] == identity)
    return found


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _entries(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    return [
        Change(kind=kind, name=key, before=_text(before, key), after=_text(after, key))
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key) or (key in before) != (key in after)
    ]


def _text(table: Mapping[str, Any], key: str) -> str:
    if key not in table:
        return NONE
    value = table[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _prefixed(level: str, change: Change) -> Change:
    return change.model_copy(update={"name": f"{level} {change.name}"})


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
