"""The texts that a model is given for a vector each: passages of the held-out text, or a query and a passage."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantool.runtime.workspace import write_text
from quantool.texts.corpus import Document

LENGTHS = (100, 200, 400, 800)
"""Characters of a passage, in turn: short ones show what is added to a text, long ones what position does."""
MOST = 320
"""Texts of a corpus."""
FEWEST = 24
"""Passages of a corpus without which ten neighbours say nothing."""
DOCUMENTS = 8
"""Documents that are put in order for a query."""
QUERY = 60  # characters of a passage's beginning that stand for a query
SEED = 7


@dataclass(frozen=True)
class Probe:
    """A text, or a query with a document, and the token ids that the source's tokenizer makes of it."""

    text: str
    document: str | None
    ids: tuple[int, ...]


def passages(documents: Iterable[Document], characters: int) -> list[str]:
    """Different passages of the documents in order, ``characters`` together, cut at white space where there is some."""
    lengths = itertools.cycle(LENGTHS)
    found: dict[str, None] = {}
    left = characters
    for document in documents:
        for passage in _cut(" ".join(_words(document).split()), lengths):
            if left <= 0 or len(found) == MOST:
                return [*found]
            found[passage] = None
            left -= len(passage)
    return [*found]


def _words(document: Document) -> str:
    contents = [message.get("content") for message in document.messages]
    return document.text or "\n".join(content for content in contents if isinstance(content, str))


def _cut(text: str, lengths: Iterator[int]) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + next(lengths)
        space = text.find(" ", end, end + QUERY)
        end = space if space >= 0 else end
        if passage := text[start:end].strip():
            yield passage
        start = end


def pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Queries, each with ``DOCUMENTS`` passages in a row: the one that it begins, and others drawn by chance."""
    rng = random.Random(SEED)  # noqa: S311 - of queries, not of secrets
    found = []
    for number in range(min(len(texts), MOST // DOCUMENTS)):
        others = rng.sample([n for n in range(len(texts)) if n != number], DOCUMENTS - 1)
        query = texts[number][:QUERY].rpartition(" ")[0] or texts[number][:QUERY]
        found += [(query, texts[n]) for n in (number, *others)]
    return found


def fitting(text: str, document: str | None, tokenizer: Any, limit: int) -> Probe:
    """The text as the tokenizer gives it to the model, its longer part halved until it has ``limit`` tokens or fewer."""
    while True:
        ids = tokenizer(text, document, verbose=False)["input_ids"]
        if len(ids) <= limit or len(text) + len(document or "") < 2:
            return Probe(text, document, tuple(ids))
        if document is not None and len(document) >= len(text):
            document = document[: len(document) // 2]
        else:
            text = text[: len(text) // 2]


def save_probes(path: Path, probes: Sequence[Probe]) -> None:
    """Write them as JSON."""
    write_text(path, json.dumps([asdict(probe) for probe in probes]))


def load_probes(path: Path) -> list[Probe]:
    """Read what ``save_probes`` wrote."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    return [Probe(entry["text"], entry["document"], tuple(entry["ids"])) for entry in saved]
