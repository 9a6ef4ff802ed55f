"""The ledger of an output: one line for every tensor and every file of the checkpoint, and what became of it.

Tensors whose names differ in numbers alone share a line: ``model.layers.{0-31}.mlp.experts.{0-7}.up_proj.weight``. The
lines are lossless: ``names`` gives back every single one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum

from quantool.errors import SourceError
from quantool.record import Record

NUMBER = re.compile(r"(?:(?<=\.)|^)(?:0|[1-9][0-9]*)(?=\.|$)")
APART = re.compile(f"({NUMBER.pattern})")
BRACES = re.compile(r"\{([0-9,-]+)\}")
TEXT, VISION, AUDIO, SPEECH, MTP, HEAD = "text", "vision", "audio", "speech", "mtp", "head"
"""Parts of a checkpoint: the language model, eyes, ears, a voice, a head that drafts further tokens, a classifier's."""
TOWERS = (VISION, AUDIO, SPEECH)
"""What a checkpoint has beside its language model."""
CHOSEN = "CHOSEN"
"""Dtype of a tensor of an artifact whose type a search chooses while the artifact is made; its record has the type."""


class Fate(StrEnum):
    """What became of a tensor or a file of the source."""

    CONVERTED = "converted"
    """The same values in another file format, dtype or order."""
    COPIED = "copied"
    """Byte for byte."""
    QUANTIZED = "quantized"
    MERGED = "merged"
    """Several became one, as the experts of a layer do in a GGUF."""
    TIED = "tied"
    """It is another tensor of the source again, and stored once."""
    DROPPED = "dropped"
    ADDED = "added"
    """In the artifact alone: what a method computes from the rest."""

    @property
    def is_in(self) -> bool:
        """Whether the values are in the artifact."""
        return self in (Fate.CONVERTED, Fate.COPIED, Fate.QUANTIZED, Fate.MERGED)


class ArtifactTensor(Record):
    """A tensor of the artifact, or in a grouped line all of a pattern; ``shape`` as numpy has it, rows first."""

    name: str
    dtype: str
    """As the format names it: ``BF16``, ``F8_E4M3``, ``Q4_K``."""
    shape: tuple[int, ...]


class TensorLine(Record):
    """What became of one tensor of the source, or in a grouped line of all of a pattern."""

    name: str
    """Empty for tensors that a method adds."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    part: str = TEXT
    fate: Fate
    to: tuple[ArtifactTensor, ...] = ()
    """What holds it in the artifact; none when it was left out."""
    reason: str = ""
    """Why it was dropped, tied or added, or what more there is to say."""

    def count(self) -> int:
        """Tensors of the source."""
        return math.prod(len(numbers(text)) for text in BRACES.findall(self.name)) if self.name else 0

    def elements(self) -> int:
        """Weights of all of them."""
        return self.count() * math.prod(self.shape)

    @staticmethod
    def numbers(name: str) -> list[str]:
        """The numbers in a name, of which the first is the layer."""
        return NUMBER.findall(name)

    def stored(self) -> Iterator[ArtifactTensor]:
        """Every tensor of the artifact that the line promises, by itself."""
        for entry in self.to:
            for name in names(entry.name):
                yield entry.model_copy(update={"name": name})


class FileLine(Record):
    """What became of one file of the source."""

    name: str
    bytes: int
    fate: Fate
    reason: str = ""


class Ledger(Record):
    """What became of the whole checkpoint in one output."""

    tensors: tuple[TensorLine, ...]
    files: tuple[FileLine, ...] = ()
    traced: bool = True
    """False where the method did not say what becomes of each tensor, so that only whole parts are accounted for."""

    def parts_left_out(self) -> dict[str, int]:
        """Parts of which nothing is in the artifact, text excepted, with their number of weights."""
        kept = {line.part for line in self.tensors if line.fate.is_in}
        left: dict[str, int] = {}
        for line in self.tensors:
            if line.fate is Fate.DROPPED and line.part not in kept and line.part != TEXT:
                left[line.part] = left.get(line.part, 0) + line.elements()
        return left

    def left_out(self) -> list[str]:
        """``vision (0.4 B)`` for each part that is not in the artifact."""
        return [f"{part} ({_weights(weights)})" for part, weights in self.parts_left_out().items()]

    def statement(self) -> str:
        """``summary``, and what was left out: ``…; vision (0.4 B) left out: this is a text-only file``."""
        if not (left := self.left_out()):
            return self.summary()
        means = ": this is a text-only file" if self.parts_left_out().keys() & TOWERS else ""
        return f"{self.summary()}; {', '.join(left)} left out{means}"

    def elements(self, fate: Fate) -> int:
        """Weights of the source with this fate."""
        return sum(line.elements() for line in self.tensors if line.fate is fate)

    def summary(self) -> str:
        """``291 tensors: 290 in, 1 tied``."""
        fates = {Fate.TIED: 0, Fate.DROPPED: 0}
        kept = 0
        for line in self.tensors:
            if line.fate.is_in:
                kept += line.count()
            elif line.fate in fates:
                fates[line.fate] += line.count()
        total = kept + sum(fates.values())
        shown = "; not traced one by one" if not self.traced else ""
        return f"{total} tensors: {kept} in" + _counted(fates) + shown


def _counted(fates: Mapping[Fate, int]) -> str:
    return "".join(f", {count} {fate}" for fate, count in fates.items() if count)


def _weights(count: int) -> str:
    if count < 50_000:
        return f"{count:,} weights"
    return f"{count / 1e9:.1f} B" if count >= 5e7 else f"{count / 1e6:.1f} M"


def names(pattern: str) -> Iterator[str]:
    """Every name that a pattern stands for."""
    pieces = BRACES.split(pattern)
    ranges = [numbers(text) for text in pieces[1::2]]
    for chosen in itertools.product(*ranges):
        ends = zip(map(str, chosen), pieces[2::2], strict=True)
        yield pieces[0] + "".join(itertools.chain.from_iterable(ends))


def numbers(text: str) -> list[int]:
    """``0-2,7`` is 0, 1, 2, 7."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def grouped(lines: Iterable[TensorLine]) -> tuple[TensorLine, ...]:
    """The lines of single tensors with those that differ in numbers alone joined, in the order of the first of each.

    Raises SourceError for a name that a pattern could be mistaken for.
    """
    groups: dict[object, list[_Split]] = {}
    for line in lines:
        split = _Split.of(line)
        groups.setdefault(split.likeness, []).append(split)
    return tuple(joined for members in groups.values() for joined in _joined(members))


@dataclass(frozen=True, slots=True)
class _Split:
    """A line of one tensor with the numbers taken out of its names."""

    line: TensorLine
    likeness: object = field(compare=False)
    numbers: tuple[tuple[str, ...], ...]
    """Of the source's name, then of each name of the artifact."""

    @classmethod
    def of(cls, line: TensorLine) -> _Split:
        template, own = _taken_apart(line.name)
        apart = [(template, own) if e.name == line.name else _taken_apart(e.name) for e in line.to]
        to = tuple((text, e.dtype, e.shape) for (text, _), e in zip(apart, line.to, strict=True))
        likeness = (template, line.dtype, line.shape, line.part, line.fate, line.reason, to)
        return cls(line, likeness, (own, *(found for _, found in apart)))


def _taken_apart(name: str) -> tuple[str, tuple[str, ...]]:
    """A name with ``{}`` for its numbers, and these. Raises SourceError for one that a pattern could be mistaken for."""
    if "{" in name or "}" in name:
        raise SourceError(f"a tensor is named {name!r}, which no tool would write")
    pieces = APART.split(name)
    return "{}".join(pieces[::2]), tuple(pieces[1::2])


def _joined(members: Sequence[_Split]) -> list[TensorLine]:
    """As few lines as the numbers allow: one where they are all combinations, else one for each first number."""
    if len(members) == 1:
        return [members[0].line]
    columns = [{split.numbers[slot] for split in members} for slot in range(len(members[0].numbers))]
    if len({split.numbers for split in members}) == len(columns[0]) and all(map(_is_product, columns)):
        first = members[0].line
        to = tuple(
            entry.model_copy(update={"name": _pattern(entry.name, column)})
            for entry, column in zip(first.to, columns[1:], strict=True)
        )
        return [first.model_copy(update={"name": _pattern(first.name, columns[0]), "to": to})]
    alike: dict[frozenset[tuple[str, ...]], list[_Split]] = {}
    by_first: dict[str, list[_Split]] = {}
    for split in members:
        by_first.setdefault(split.numbers[0][0] if split.numbers[0] else split.line.name, []).append(split)
    for parts in by_first.values():
        alike.setdefault(frozenset(split.numbers[0][1:] for split in parts), []).extend(parts)
    if len(alike) > 1:
        return [line for parts in alike.values() for line in _joined(parts)]
    if len(by_first) > 1:
        return [line for parts in by_first.values() for line in _joined(parts)]
    return [split.line for split in members]


def _is_product(column: AbstractSet[tuple[str, ...]]) -> bool:
    return math.prod(len(set(values)) for values in zip(*column, strict=True)) == len(column)


def _pattern(name: str, column: AbstractSet[tuple[str, ...]]) -> str:
    """The name with the ranges of its numbers in braces; one that does not vary stays."""
    ranges = iter([_ranges({int(text) for text in values}) for values in zip(*column, strict=True)])
    return NUMBER.sub(lambda _: next(ranges), name)


def _ranges(values: set[int]) -> str:
    ordered = sorted(values)
    if len(ordered) == 1:
        return str(ordered[0])
    runs: list[list[int]] = []
    for value in ordered:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return "{" + ",".join(texts) + "}"
