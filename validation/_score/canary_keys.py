"""What an artifact says of itself beside its weights, and the tokens that its canary runs through it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantool.formats.gguf_header import read_shards
from quantool.formats.json_file import TOKENIZER, read_json

TOKENS = 256
"""Tokens of the window, fewer where the model reads fewer."""
SPECIALS, SPREAD = 32, 96
"""Of them, special tokens at most, and tokens taken from the whole vocabulary at equal distances."""
LONGEST = 120
"""Characters of a value that is kept as it is; of a longer one the hash is."""
CONTROL, USER_DEFINED = 3, 4  # llama.h: enum llama_token_type
MEDIA = re.compile(r"^(image|video|audio|vision|boi|eoi|boa|eoa)\w*_(id|index)$")
TEXT = (
    "The committee met on 3 March 2024 at 9:45; seventeen of its 21 members voted for the proposal, and the chair said: "
    "\"We'll publish it by Friday.\"\n\nLa Núria i en Jordi col·laboren des del 1998: què n'hi ha, d'això? "
    "¿Cuántos kilómetros hay entre Cádiz y A Coruña? Gaur eguraldi ona egingo du Donostian, baina euria bihar.\n"
    "def mean(values: list[float]) -> float:\n    return sum(values) / max(1, len(values))  # 0 for none\n"
    '{"name": "quantool", "sizes": [1, 2.5e-3, null], "nested": {"ok": true}}\n'
    "你好，世界。今日は良い天気ですね。Привет, мир! مرحبا بالعالم 🚀 ½ x² ≤ 10⁻⁹\n"  # noqa: RUF001
    "Dear reader, the sea was calm that morning, and nobody on the island had yet heard the news from the mainland."
)


def keys_of(artifact: Path, engine: str, names: Sequence[str]) -> dict[str, Any]:
    """The metadata of an artifact by name: values, and of long ones number of entries and SHA-256.

    Of a GGUF its keys; of a folder the entries of those of its files ``names`` that hold no weights. Raises SourceError.
    """
    if engine == "llama.cpp":
        header = read_shards(artifact)[0]
        return {
            key: _brief(header.value(key), header.raw[start:end])
            for key, (start, end) in header.spans.items()
        }
    found: dict[str, Any] = {}
    for name in names:
        if name.endswith(".json") and not name.endswith(".index.json"):
            content = read_json(artifact / name, TOKENIZER)
            found |= {f"{name}: {key}": _brief(value, _canonical(value)) for key, value in content.items()}
        elif not name.endswith((".safetensors", ".md", ".png")):
            raw = (artifact / name).read_bytes()
            found[name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    return found


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _brief(value: Any, raw: bytes) -> Any:
    if len(_canonical(value)) <= LONGEST:
        return value
    entries = len(value) if isinstance(value, (list, dict, str)) else 1
    return {"entries": entries, "sha256": hashlib.sha256(raw).hexdigest()}


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two results of ``keys_of``, by name."""
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            yield f"{key} is gone"
        elif key not in before:
            yield f"{key} is new"
        elif _canonical(before[key]) != _canonical(after[key]):
            yield f"{key} is {_shown(after[key])}, was {_shown(before[key])}"


def _shown(value: Any) -> str:
    return f"#{value['sha256'][:8]}" if isinstance(value, dict) and "sha256" in value else repr(value)[:40]


def special_tokens(artifact: Path) -> list[int]:
    """The control and user-defined tokens of a GGUF."""
    kinds = read_shards(artifact)[0].value("tokenizer.ggml.token_type", [])
    return [number for number, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]


def media_tokens(folder: Path) -> set[int]:
    """Ids that stand for pictures and sound in the config.json of a folder: models refuse them without any."""
    config = read_json(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return {
        value
        for part in parts
        for key, value in part.items()
        if MEDIA.match(key) and isinstance(value, int) and not isinstance(value, bool)
    }


def window(text: Sequence[int], specials: Sequence[int], vocabulary: int, length: int = TOKENS) -> list[int]:
    """The tokens of a canary: a text, then special tokens, then tokens from the whole vocabulary; ``length`` at most."""
    share = length / TOKENS
    rare = [place * vocabulary // SPREAD for place in range(SPREAD)][:: max(1, round(1 / share))]
    tail = [*specials[: int(SPECIALS * share)], *rare][: length // 2]
    return [*text[: length - len(tail)], *tail]
