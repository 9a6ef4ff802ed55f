"""Recipes: the ggml type of each tensor, as lines ``tensor=type`` that ``llama-quantize --tensor-type-file`` takes.

llama-quantize (0c1e570, tools/quantize/quantize.cpp, ``parse_tensor_type_file``) splits the file at white space and knows no
comments; the part before ``=`` is lowered and searched as a regular expression in each tensor's name, the first that is found
counts (src/llama-quant.cpp). So a name is written as the expression that no other tensor's name matches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from quantool.errors import ConfigError

ENDING = ".tensor-types.txt"
"""Of the name of a recipe beside its file, which begins as the file's."""
PATTERN = re.compile(r"\^((?:[\w-]|\\\.)+)\$")


def pattern(name: str) -> str:
    """The expression that matches the tensor ``name`` alone."""
    return f"^{name.replace('.', chr(92) + '.')}$"


def name_of(text: str) -> str | None:
    """The tensor's name that ``pattern`` made ``text`` of; None for any other expression."""
    found = PATTERN.fullmatch(text)
    return found[1].replace(r"\.", ".") if found else None


def write_recipe(types: Mapping[str, str]) -> str:
    """The text of a recipe: tensor name to ggml type, in the order given."""
    return "".join(f"{pattern(name)}={kind.lower()}\n" for name, kind in types.items())


def read_recipe(path: Path) -> dict[str, str]:
    """Read a recipe as pattern to ggml type (lower case), in its order, as llama-quantize would.

    Raises ConfigError naming the entry that llama-quantize would refuse, and one that it would never come to (given twice).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    types: dict[str, str] = {}
    for number, entry in enumerate(text.split(), 1):
        expression, equals, kind = entry.partition("=")
        if not expression or not equals or not kind:
            raise ConfigError(
                f"{path}: entry {number} is {entry!r}, not tensor=type",
                hint="^blk\\.0\\.attn_q\\.weight$=q4_k",
            )
        if expression.lower() in types:
            raise ConfigError(f"{path}: {expression} is there twice, llama-quantize takes the first")
        types[expression.lower()] = kind.lower()
    if not types:
        raise ConfigError(f"{path} is empty: a recipe has a line tensor=type for each tensor")
    return types
