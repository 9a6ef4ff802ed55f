"""What the README.md of a checkpoint says about it, by its YAML front matter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantool.config.yaml_file import parse
from quantool.errors import ConfigError, SourceError
from quantool.formats.json_file import read_bounded
from quantool.records import ModelCard

MAX_BYTES = 1 << 22


def model_card(folder: Path) -> tuple[ModelCard, list[str]]:
    """The license, languages and tags of README.md; a note instead of an error where it cannot be read."""
    data, notes = front_matter(folder)
    card = ModelCard(
        license=next(iter(_texts(data.get("license"))), None),
        license_name=next(iter(_texts(data.get("license_name"))), None),
        license_link=next(iter(_texts(data.get("license_link"))), None),
        languages=_texts(data.get("language")),
        pipeline_tag=next(iter(_texts(data.get("pipeline_tag"))), None),
        tags=_texts(data.get("tags")),
        base_models=_texts(data.get("base_model")),
    )
    return card, notes


def front_matter(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What of README.md's YAML front matter can be read, and what is wrong with the rest."""
    path = folder / "README.md"
    if not path.is_file():
        return {}, []
    ignored = "license and languages are unknown"
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    except SourceError as error:
        return {}, [f"{error.message}: {ignored}"]
    if not text.startswith("---\n"):
        return {}, []
    front, closed, _ = text[3:].partition("\n---")
    if not closed:
        return {}, ["README.md: the YAML front matter has no end (a line ---); it is ignored"]
    try:
        document = parse(front, "README.md")
    except ConfigError as error:
        what = error.message.replace("not YAML", "the front matter is not YAML", 1)
        return {}, [f"{what}; {ignored}"]
    if not isinstance(document.data, dict):
        what = f"README.md: the front matter is not a mapping; {ignored}"
        return {}, [] if document.data is None else [what]
    return document.data, document.error(document.mistakes).message.splitlines()


def _texts(value: Any) -> tuple[str, ...]:
    entries: Iterable[Any] = value if isinstance(value, list) else [value]
    # YAML reads the language code of Norwegian, no, as false.
    return tuple(
        "no" if entry is False else str(entry) for entry in entries if isinstance(entry, (str, int, float))
    )
