"""Rows of text files, of ``datasets`` ids and of Python's own documentation, read when they are asked for."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from quantool.config.schema import Corpus
from quantool.errors import ConfigError, DependencyError
from quantool.formats.json_file import JsonError, JsonLimits, parse_json, read_bounded

BUILT_IN = "python-docs"
"""The data set that needs no file: docstrings of the standard library of the Python that runs."""

SUFFIXES = (".txt", ".jsonl", ".parquet")

MAX_TEXT = 1 << 30
"""Bytes of a .txt file, which is one document."""
ROW = JsonLimits(bytes=1 << 26)
MAX_EMPTY = 1_000_000
"""Rows without text that are passed over in a table."""

_NOT_DOCUMENTATION = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SHORTEST_DOCSTRING = 40  # characters
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Fields of syntax trees that hold statements, or what holds them."""


class Table(Protocol):
    """Rows of one origin; a row is a text (str) or, of a line or data set, what it decodes to."""

    field: str | None
    """Column with the text, when the configuration says."""

    def count(self) -> int:
        """Count the rows."""

    def rows(self, wanted: set[int] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield number (from 0) and content of all rows, or of those ``wanted``."""

    def place(self, row: int) -> str:
        """Say where a row stands, for messages."""


def open_table(corpus: Corpus, cache_dir: Path | None = None) -> Table:
    """The rows of ``corpus``; ``cache_dir`` is where ``datasets`` keeps downloads.

    Raises ConfigError for a missing file, a file of another kind or an unknown data set; DependencyError when the data
    set cannot be had now.
    """
    if corpus.dataset == BUILT_IN:
        return _Docstrings()
    if corpus.dataset is not None:
        return _Dataset(corpus, cache_dir)
    if corpus.path is None:  # ruled out by Corpus
        raise AssertionError
    path = require_file(corpus.path)
    match path.suffix:
        case ".txt":
            return _Text(path, corpus.field)
        case ".jsonl":
            return _Lines(path, corpus.field)
        case ".parquet":
            return _Parquet(path, corpus.field)
        case _:
            raise ConfigError(
                f"{path} is not a text quantool reads", hint=f"give a {', '.join(SUFFIXES)} file"
            )


class _Docstrings:
    def __init__(self) -> None:
        self.field: str | None = None

    def count(self) -> int:
        return sum(1 for _ in docstrings())

    def rows(self, wanted: set[int] | None = None) -> Iterator[tuple[int, Any]]:
        return _picked(docstrings(), wanted)

    def place(self, row: int) -> str:
        return f"{BUILT_IN}, docstring {row + 1}"


class _Text:
    def __init__(self, path: Path, field: str | None) -> None:
        if field is not None:
            raise ConfigError(f"{path} is plain text and has no column {field!r}", hint="leave out field")
        self.path = path
        self.field: str | None = None

    def count(self) -> int:
        return 1

    def rows(self, wanted: set[int] | None = None) -> Iterator[tuple[int, Any]]:
        content = read_bounded(self.path, MAX_TEXT, ConfigError)
        try:
            return _picked([content.decode("utf-8-sig")], wanted)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path} is not UTF-8: {error.reason} at byte {error.start}") from error

    def place(self, row: int) -> str:  # noqa: ARG002
        return str(self.path)


class _Lines:
    def __init__(self, path: Path, field: str | None) -> None:
        self.path = path
        self.field = field

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def rows(self, wanted: set[int] | None = None) -> Iterator[tuple[int, Any]]:
        for number, line in _picked(self._lines(), wanted):
            try:
                yield number, parse_json(line, ROW) if line.strip() else ""
            except JsonError as error:
                column = f" at column {error.column}" if error.column else ""
                joint = " is" if str(error).startswith("not ") else ":"
                raise ConfigError(f"{self.place(number)}{joint} {error}{column}") from error

    def _lines(self) -> Iterator[bytes]:
        empty = 0
        with self.path.open("rb") as file:
            for number in itertools.count():
                line = file.readline(ROW.bytes + 1)
                if not line:
                    return
                empty += line.isspace()
                if len(line) > ROW.bytes or empty > MAX_EMPTY:
                    what = (
                        f"is longer than {ROW.bytes:,} bytes"
                        if empty <= MAX_EMPTY
                        else f"is empty like {MAX_EMPTY:,} others"
                    )
                    raise ConfigError(f"{self.place(number)} {what}", hint="is this a .jsonl file?")
                yield line

    def place(self, row: int) -> str:
        return f"{self.path}, line {row + 1}"


class _Parquet:
    def __init__(self, path: Path, field: str | None) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self.path = path
        self.field = field
        try:
            self.file = parquet.ParquetFile(path)
        except (pa.ArrowException, OSError, ValueError) as error:  # names that are not UTF-8, too
            raise ConfigError(f"{path} is not a parquet file: {_first_line(error)}") from error

    def count(self) -> int:
        return int(self.file.metadata.num_rows)

    def rows(self, wanted: set[int] | None = None) -> Iterator[tuple[int, Any]]:
        import pyarrow as pa

        def every() -> Iterator[Any]:
            try:
                for batch in self.file.iter_batches(batch_size=256):
                    yield from map(_without_nulls, batch.to_pylist())
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ConfigError(f"{self.path} is damaged: {_first_line(error)}") from error

        return _picked(every(), wanted)

    def place(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"


class _Dataset:
    def __init__(self, corpus: Corpus, cache_dir: Path | None) -> None:
        import datasets

        self.label = label(corpus)
        self.field = corpus.field
        try:
            self.table = datasets.load_dataset(
                corpus.dataset, corpus.config, split=corpus.split, cache_dir=cache_dir and str(cache_dir)
            )
        except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise ConfigError(f"{self.label} cannot be loaded: {error}") from error
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise DependencyError(
                f"{self.label} cannot be loaded: {error}", hint="is the network there, and HF_TOKEN set?"
            ) from error

    def count(self) -> int:
        return len(self.table)

    def rows(self, wanted: set[int] | None = None) -> Iterator[tuple[int, Any]]:
        numbers = range(len(self.table)) if wanted is None else sorted(wanted)
        return ((number, _without_nulls(self.table[number])) for number in numbers)

    def place(self, row: int) -> str:
        return f"{self.label}, row {row + 1}"


def docstrings(root: Path | None = None) -> Iterator[str]:
    """Docstrings of the standard library (of ``root``): files sorted, in source order, each text once."""
    seen: set[str] = set()
    for path in _documented_files(root):
        for text in _documented(path):
            if len(text) >= _SHORTEST_DOCSTRING and text not in seen:
                seen.add(text)
                yield text


def documentation_stamp(root: Path | None = None) -> list[tuple[str, int, int]]:
    """Name, size and modification time of every file that ``docstrings`` reads."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _documented_files(root)]


def _documented_files(root: Path | None) -> list[Path]:
    root = root or Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_DOCUMENTATION]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _documented(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and samples that are no Python
        return
    for node in _statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """What ``ast.walk`` gives, in its order, without expressions: nine of ten nodes, and none of them holds a docstring."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in node._fields:
            value = getattr(node, name)
            if name in _BLOCKS and isinstance(value, list):
                waiting.extend(value)


def _without_nulls(value: Any) -> Any:
    """Columnar files give every row the union of all keys; those a row never had come back as null."""
    if isinstance(value, Mapping):
        return {
            name: _without_nulls(item)
            for name, item in value.items()
            if item is not None or name == "content"
        }
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _picked(rows: Iterable[Any], wanted: set[int] | None) -> Iterator[tuple[int, Any]]:
    last = None if wanted is None else max(wanted, default=-1) + 1
    numbered = enumerate(itertools.islice(rows, last))
    return (pair for pair in numbered if wanted is None or pair[0] in wanted)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def require_file(path: Path, key: str = "text") -> Path:
    """``path`` if it is a file; else ConfigError, which names the configuration's ``key``."""
    if not path.is_file():
        raise ConfigError(
            f"{key}: {path} is a folder" if path.is_dir() else f"{key}: there is no file {path}",
            hint="a relative path starts in the current folder" if not path.is_absolute() else "",
        )
    return path


def label(corpus: Corpus) -> str:
    """Where the corpus comes from, for messages."""
    if corpus.path is not None:
        return str(corpus.path)
    return (
        f"data set {corpus.dataset}" + (f"/{corpus.config}" if corpus.config else "") + f" [{corpus.split}]"
    )
