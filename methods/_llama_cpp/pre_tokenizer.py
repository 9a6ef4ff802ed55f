"""Which of llama.cpp's pre-tokenizers a tokenizer.json is like.

llama.cpp cuts text by a regular expression that it knows by name (0c1e570, src/llama-vocab.cpp), and its converter finds the name
by a hash over the ids of one text: over the vocabulary, so it knows no tokenizer that was trained since. The steps in
tokenizer.json show the expression itself. Where all of them are those of a name, the name is used; the ids prove it (check
``tokenizer``).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NAMED = re.compile(r'^\s+res = "([\w.-]+)"', re.MULTILINE)  # conversion/base.py: get_vocab_base_pre

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(letter: str, digits: str, marks: str = "") -> str:
    """GPT-4's expression and its variants: contractions, words, runs of digits, punctuation, white space."""
    return rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}| ?[^\s\p{{L}}{marks}\p{{N}}]{_REST}"


def _cased(digits: str, endings: str) -> str:
    """Words cut where lower case turns into upper case."""
    start = r"[^\r\n\p{L}\p{N}]?"
    both = rf"{start}{_UPPER}*{_LOWER}+{endings}|{start}{_UPPER}+{_LOWER}*{endings}"
    return rf"{both}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# (steps, whether whole words in the vocabulary skip the merges) -> name. Upper-case steps are not expressions.
KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    ((_words(r"\p{L}", r"\p{N}"), "BYTES"), False): "qwen2",
    ((_words(r"[\p{L}\p{M}]", r"\p{N}", r"\p{M}"), "BYTES"), False): "qwen35",
    ((_words(r"\p{L}", r"\p{N}{1,3}"), "BYTES"), True): "llama-bpe",
    ((_words(r"\p{L}", r"\p{N}{1,3}"), "BYTES"), False): "smaug-bpe",
    ((_cased(r"\p{N}{1,3}", rf"{_ENDINGS}?"), "BYTES"), False): "gpt-4o",
    ((_cased(r"\p{N}", ""), "BYTES"), True): "tekken",
    (("GPT2",), False): "gpt-2",
    (("DIGIT", "GPT2"), False): "smollm",
}


CONVERTED = frozenset({"gpt-2", "llama-bpe", "qwen2", "qwen35", "smaug-bpe", "smollm"})
"""Those whose expression llama.cpp has as it stands; of gpt-4o and tekken it has an approximation for capitals beyond ASCII."""
DEFAULTS: dict[str, Any] = {
    "type": "BPE", "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "byte_fallback": False,
}  # fmt: skip
"""What the model of a byte-level BPE tokenizer.json says, or leaves out; null stands for the empty text."""


def equal_steps(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name where every step of a tokenizer.json is one of that name's; None where one is not.

    NFC is the one normalizer that is passed over: llama.cpp has none for any of these names, Qwen's own files included
    (the check ``tokenizer`` reports it).
    """
    name = suggest(tokenizer)
    return name if name in CONVERTED and not other_steps(tokenizer) else None


def other_steps(tokenizer: dict[str, Any]) -> list[str]:
    """What of normalizer, model and decoder llama.cpp would do differently for all of the names, as ``key: value``."""
    normalizer, decoder, model = (tokenizer.get(key) for key in ("normalizer", "decoder", "model"))
    found = [f"normalizer: {json.dumps(normalizer)}"] * (normalizer not in (None, {"type": "NFC"}))
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        found.append(f"decoder: {json.dumps(decoder)}")
    for key, wanted in DEFAULTS.items():
        value = (model or {}).get(key, wanted)
        if value != wanted and (value or wanted):
            found.append(f"model.{key}: {json.dumps(value)}")
    return found


def suggest(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json, None when its steps are none that are known."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return KNOWN.get((tuple(steps), bool(tokenizer["model"].get("ignore_merges"))))


def is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether the vocabulary spells bytes as GPT-2 does; one that does not is a SentencePiece model in disguise."""
    return "ByteLevel" in (json.dumps(tokenizer.get("pre_tokenizer")) + json.dumps(tokenizer.get("decoder")))


def known_names(toolchain: Path) -> list[str]:
    """The names that llama.cpp's converter can give, sorted."""
    return sorted(set(NAMED.findall((toolchain / "conversion" / "base.py").read_text(encoding="utf-8"))))


def _steps(step: Any) -> list[str]:
    match step:
        case {"type": "Sequence", "pretokenizers": [*inner]}:
            return [found for part in inner for found in _steps(part)]
        case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(pattern)}} if not step.get(
            "invert"
        ):
            return [pattern]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ["GPT2" if step.get("use_regex", True) else "BYTES"]
        case {"type": "Digits", "individual_digits": True}:
            return ["DIGIT"]
    return [f"UNKNOWN {json.dumps(step)}"]
