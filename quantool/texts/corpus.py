"""Texts to measure on and to calibrate with, read from files, from ``datasets``, or from Python itself.

A document is a text or a conversation. A .txt file is one document, as llama-perplexity reads it; a .jsonl or .parquet
file and a data set have one a line or row.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from quantool.config.schema import Config, Corpus
from quantool.errors import ConfigError, SourceError
from quantool.formats.json_file import JsonError, brief, parse_json
from quantool.records import fingerprint, sha256_of
from quantool.texts.readers import (
    BUILT_IN,
    MAX_EMPTY,
    ROW,
    SUFFIXES,
    Table,
    documentation_stamp,
    label,
    open_table,
    require_file,
)

COLUMNS = ("text", "messages")  # where the text is looked for when the configuration does not say
CHARACTERS_PER_TOKEN = 16  # more than any real text has, so a text cut there is long enough


@dataclass(frozen=True)
class Document:
    """A text, or a conversation when ``messages`` is not empty (then ``text`` is empty)."""

    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    def size(self) -> int:
        """Characters, of a conversation those of its messages as JSON."""
        return len(json.dumps(self.messages, ensure_ascii=False)) if self.messages else len(self.text)

    def is_blank(self) -> bool:
        """Whether there is nothing to read: no message, and no character but white space and NUL."""
        return not self.messages and not self.text.replace("\0", "").strip()


class Tokenizer(Protocol):
    """What rendering needs of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, tools: Any = None, *, tokenize: bool = True) -> Any:
        """Render a conversation."""


def corpora(config: Config) -> tuple[Corpus, ...]:
    """The held-out texts of a run: ``validation.corpora``, else ``eval_dataset``, else Python's docstrings."""
    chosen = config.validation.corpora
    if not chosen and config.eval_dataset is not None:
        chosen = (_named(config.eval_dataset, config),)
    if not chosen:
        chosen = (Corpus(name=BUILT_IN, dataset=BUILT_IN),)
    names = [corpus.name for corpus in chosen]
    if len(set(names)) < len(names):
        raise ConfigError(f"two corpora have the same name: {', '.join(names)}", hint="name each differently")
    return chosen


def _named(place: str, config: Config) -> Corpus:
    """``eval_dataset`` as a corpus: a file by its suffix, anything else a ``datasets`` id."""
    path = Path(place)
    if path.suffix in SUFFIXES:
        return Corpus(name=_name(path.stem), path=path)
    return Corpus(name=_name(path.name), dataset=place, config=config.dataset_config, split=config.split)


def _name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in text) or "corpus"


def read(
    corpus: Corpus, *, characters: int | None = None, cache_dir: Path | None = None
) -> tuple[Document, ...]:
    """The documents of ``corpus`` in order, no more than it takes to reach ``characters``.

    ``cache_dir`` is where ``datasets`` keeps downloads. Raises ConfigError naming file and line for a missing or empty
    file, malformed JSON, a missing column, or rows that are neither text nor conversations.
    """
    found: list[Document] = []
    left = characters
    for document in _documents(open_table(corpus, cache_dir), characters):
        found.append(document)
        if left is not None:
            left -= document.size()
            if left <= 0:
                break
    if all(document.is_blank() for document in found):
        raise ConfigError(f"corpus {corpus.name!r} is empty ({label(corpus)})")
    return tuple(found)


def render(document: Document, tokenizer: Tokenizer) -> str:
    """The text that the model sees: a conversation goes through the tokenizer's chat template.

    Raises SourceError when there is a conversation and no template, ConfigError when the template refuses it.
    """
    if not document.messages:
        return document.text
    if not tokenizer.chat_template:
        raise SourceError(
            "the corpus holds conversations, but this model has no chat template to render them",
            hint="use plain text (.txt, or a text column) for a base model",
        )
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            list(document.messages), tools=list(document.tools) or None, tokenize=False
        )
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in document.messages)
        raise ConfigError(
            f"the model's chat template refuses a conversation of the corpus (roles {roles}): {error}"
        ) from error
    return str(rendered)


def calibration(config: Config) -> tuple[Document, ...]:
    """The calibration documents: ``sample_size`` of ``dataset_path`` or ``dataset_id``, shuffled if ``shuffle``.

    The shuffle is ``random.Random(dataset_seed)`` over the row numbers, so a sample is the same on every machine.
    ``calibration_config.text_field`` names the column. Raises ConfigError like ``read``, or when there is no data set.
    """
    origin = calibration_corpus(config)
    if origin is None:
        raise ConfigError(
            "calibration text is needed, but neither dataset_path nor dataset_id is given",
            hint=f"dataset_path takes a {', '.join(SUFFIXES)} file; dataset_id: {BUILT_IN} needs no download",
        )
    table = open_table(origin, config.dataset_cache_dir)
    order = array("q", range(table.count()))
    if config.shuffle:
        random.Random(config.dataset_seed).shuffle(order)  # noqa: S311
    chosen = order[: config.sample_size]
    by_row = {row: _document(table, row, value) for row, value in table.rows(set(chosen))}
    found = tuple(by_row[row] for row in chosen if by_row[row].size())
    if all(document.is_blank() for document in found):
        raise ConfigError(f"the calibration text is empty ({label(origin)})")
    return found


def calibration_corpus(config: Config) -> Corpus | None:
    """Where the calibration text comes from, or None when the configuration names nothing."""
    field = (config.calibration_config or {}).get("text_field")
    if field is not None and not isinstance(field, str):
        raise ConfigError(f"calibration_config.text_field must be the name of a column, not {field!r}")
    if config.dataset_path is not None:
        return Corpus(name="calibration", path=config.dataset_path, field=field)
    if config.dataset_id is not None:
        return Corpus(
            name="calibration",
            dataset=config.dataset_id,
            config=config.dataset_config,
            split=config.split,
            field=field,
        )
    return None


def require_texts(config: Config) -> None:
    """Raise ConfigError for text files that a run could not use, before it starts.

    Held-out text is read as far as it will be, conversations wholly; of calibration text, which may be long, only that
    it is there. Data sets are left alone: that needs the network.
    """
    origin, settings = calibration_corpus(config), config.validation
    if origin is not None and origin.path is not None:
        require_file(origin.path, "dataset_path")
        open_table(origin)
    for index, entry in enumerate(corpora(config)):
        if entry.path is not None:
            require_file(
                entry.path, f"validation.corpora.{index}.path" if settings.corpora else "eval_dataset"
            )
            read(entry, characters=settings.max_tokens * CHARACTERS_PER_TOKEN)
    whole = (("conversations", settings.conversations), ("behaviour.prompts", settings.behaviour.prompts))
    for name, path in whole:
        if path is not None:
            read(Corpus(name=name, path=require_file(path, f"validation.{name}")))
    if settings.needle is not None and (path := settings.needle.haystack) is not None:
        haystack = Corpus(name="haystack", path=require_file(path, "validation.needle.haystack"))
        read(haystack, characters=max(settings.needle.lengths) * CHARACTERS_PER_TOKEN)


def identity(corpus: Corpus) -> str | None:
    """A fingerprint of what ``corpus`` holds; None for a ``datasets`` id, which can change without a trace."""
    if corpus.dataset == BUILT_IN:
        return _documentation()
    if corpus.path is None:
        return None
    path = require_file(corpus.path).resolve()
    status = path.stat()
    return fingerprint(_sha256(path, status.st_size, status.st_mtime_ns), corpus.path.suffix, corpus.field)


@cache
def _documentation() -> str:
    return fingerprint(documentation_stamp())


@cache
def _sha256(path: Path, _size: int, _mtime: int) -> str:
    """The hash of a text, which every check of every level asks for."""
    return sha256_of(path)


def _documents(table: Table, characters: int | None) -> Iterator[Document]:
    empty = 0
    for row, value in table.rows():
        document = _document(table, row, value)
        empty += document.is_blank()
        if empty > MAX_EMPTY:
            raise ConfigError(f"{table.place(row)} is empty like {MAX_EMPTY:,} others")
        if characters is not None and len(document.text) > characters:
            document = Document(text=document.text[:characters])
        if document.size():
            yield document


def _document(table: Table, row: int, value: Any) -> Document:
    """The document of one row; ConfigError naming the place when it holds none."""
    if isinstance(value, str):
        return Document(text=value)
    if not isinstance(value, dict):
        raise ConfigError(f"{table.place(row)} is {_kind(value)}, not an object with text or messages")
    column = table.field or next((name for name in COLUMNS if name in value), None)
    if column is None or column not in value:
        wanted = repr(table.field) if table.field else " or ".join(map(repr, COLUMNS))
        raise ConfigError(
            f"{table.place(row)} has no column {wanted}; it has {', '.join(map(brief, [*value][:20])) or 'none'}",
            hint="name the column with the text in field (calibration_config.text_field for calibration)",
        )
    content = value[column]
    if isinstance(content, str):
        return Document(text=content)
    place = f"{table.place(row)}: {column}"
    messages = _objects(content, place)
    for message in messages:
        _require_message(message, place)
    return Document(messages=messages, tools=_objects(value.get("tools") or (), f"{table.place(row)}: tools"))


def _require_message(message: dict[str, Any], place: str) -> None:
    """ConfigError unless there is a role and something said: a text, parts, or a call of tools."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role.strip():
        problem = "has no role" if role is None else f"has the role {brief(role)}, not a text"
        raise ConfigError(f"{place}: a message {problem}")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if (
        not isinstance(content, list)
        or not content
        or not all(isinstance(part, (dict, str)) for part in content)
    ):
        raise ConfigError(
            f"{place}: a message of the role {brief(role)} has the content {brief(content)}, not a text"
        )


def _objects(value: object, place: str) -> tuple[dict[str, Any], ...]:
    """A list of objects, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = parse_json(value.encode(), ROW)
        except JsonError as error:
            raise ConfigError(f"{place} is not JSON: {str(error).removeprefix('not JSON: ')}") from error
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{place} is {_kind(value)}, not a text or a list of objects")
    return tuple(value)


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
