"""Docstrings of the Python standard library, as training and held-out text.

The files are parsed with ``ast`` and never imported. Whole top-level modules
go to one side of the split, and a docstring that occurs twice is kept once,
so that no text is on both sides.
"""

import ast
import inspect
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "__phello__"}
SHORTEST = 40  # characters; shorter docstrings carry next to no text
LONGEST = 6000  # characters; longer ones are tables and manuals of command lines
HELD_OUT_SHARE = 16  # one top-level module in this many is held out


@dataclass(frozen=True)
class Docstring:
    """One docstring, the dotted name of what it documents, and its split."""

    name: str
    text: str
    held_out: bool


def is_held_out(module: str) -> bool:
    """Tell whether a dotted module name belongs to the held-out side.

    The checksum of the top-level name decides, so the answer needs no list
    and is the same in every run.
    """
    return zlib.crc32(module.partition(".")[0].encode()) % HELD_OUT_SHARE == 14


def documented(tree: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, cleaned docstring) of a tree and of what it defines."""
    if isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(tree, clean=False)
        if text:
            lines = (line.rstrip() for line in inspect.cleandoc(text).splitlines())
            yield name, "\n".join(lines).strip()
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from documented(child, f"{name}.{child.name}")


def collect(root: Path | None = None) -> list[Docstring]:
    """Read every docstring under the standard library, in sorted file order."""
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).with_suffix("")
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        module = ".".join(part for part in relative.parts if part != "__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue  # lib2to3 keeps a few Python 2 files
        for name, text in documented(tree, module):
            key = " ".join(text.split())
            if SHORTEST <= len(text) <= LONGEST and key not in seen:
                seen.add(key)
                found.append(Docstring(name, text, is_held_out(module)))
    return found


def by_module(docstrings: list[Docstring]) -> list[str]:
    """Join the docstrings of each top-level module into one document."""
    documents: dict[str, list[str]] = {}
    for item in docstrings:
        documents.setdefault(item.name.partition(".")[0], []).append(item.text)
    return ["\n\n".join(texts) + "\n" for texts in documents.values()]


def first_sentence(text: str) -> str | None:
    """Return the opening sentence of a docstring, or None when it has no clean one."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    match = re.match(r"[A-Z][^.<>*|]{18,110}\.(?= |$)", paragraph)
    return match.group(0) if match else None


def facts(docstrings: list[Docstring], modules: set[str]) -> list[tuple[str, str]]:
    """Return (dotted function name, first sentence) for public names of some modules."""
    result = []
    for item in docstrings:
        parts = item.name.split(".")
        sentence = first_sentence(item.text)
        public = not any(part.startswith("_") for part in parts)
        if parts[0] in modules and len(parts) == 2 and public and sentence:
            result.append((item.name, sentence))
    return result


def excerpt(documents: list[str], size: int) -> str:
    """Cut about `size` characters, spread evenly over the documents, at blank lines."""
    total = sum(map(len, documents))
    pieces = []
    for document in documents:
        budget = max(200, size * len(document) // total)
        kept = document if len(document) <= budget else document[:budget].rpartition("\n\n")[0]
        if kept:
            pieces.append(kept.strip("\n"))
    return "\n\n".join(pieces) + "\n"
