"""The methods for people and programs: levels, options and what is missing here."""

from __future__ import annotations

from typing import Any

from quantool.errors import QuantoolError
from quantool.plugins import find


def methods(name: str | None = None) -> dict[str, dict[str, Any]]:
    """All methods by name, or one, as JSON values.

    Of all, one that lacks a library says so; of one it is the error (``find.find_method``).
    """
    entries: dict[str, dict[str, Any]] = {}
    for known in [name] if name is not None else find.names("methods"):
        try:
            method = find.find_method(known)
            options = {key: field.description for key, field in method.options.model_fields.items()}
            entries[known] = {"levels": method.levels(), "options": options}
        except QuantoolError as error:
            if name is not None:
                raise
            entries[known] = {"missing": error.message, "hint": error.hint}
    return entries


def as_text(entries: dict[str, dict[str, Any]]) -> str:
    """The methods with their levels; of a single one also what each option means."""
    lines = []
    for name, entry in entries.items():
        if "missing" in entry:
            lines += [f"{name}: {entry['missing']}. {entry['hint']}", ""]
            continue
        lines += [name, *_aligned(entry["levels"])]
        if len(entries) == 1:
            lines += ["options", *_aligned(entry["options"])]
        else:
            lines += ["  options: " + ", ".join(entry["options"]), ""]
    return "\n".join(lines)


def _aligned(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries), default=0)
    return [f"  {name.ljust(width)}  {text}".rstrip() for name, text in entries.items()]
