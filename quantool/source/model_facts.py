"""What a checkpoint's small files say: model facts, tokenizer facts, the card. No weights, no torch, no transformers.

Keys that config.json leaves out have the values that transformers' configuration classes give them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import SourceError, nearest
from quantool.formats.json_file import brief, read_json, read_optional, require_bounded
from quantool.formats.safetensors import TensorHeader
from quantool.records import ModelFacts
from quantool.source.chat_template import ChatTemplates, end_of_turn, read_templates
from quantool.source.class_defaults import class_defaults, model_types
from quantool.source.quantized import quantization

ELSEWHERE = (
    "a model of type {model_type} keeps it elsewhere, or has none: decoders, and encoders with positions of their own, are "
    "supported; of an assembled model the language model alone, saved as a checkpoint (…ForCausalLM)"
)
"""What to do where config.json lacks what every supported model has: encoder-decoders, and models made of several."""
MAX_NUMBER = 1 << 40
"""Nothing that a configuration counts is more."""
MAX_NAME = 100
"""Characters of a model type or an architecture."""


@dataclass(frozen=True)
class Configuration:
    """config.json and the defaults of its class; for a multimodal model the language model's part comes first."""

    path: Path
    top: dict[str, Any]
    text: dict[str, Any]
    top_defaults: dict[str, Any]
    text_defaults: dict[str, Any]

    def get(self, key: str) -> Any:
        """The value of ``key`` under its own name or the one the class maps it to; None without any."""
        for names in ((key,), self._other_names(key)):
            for part in (self.text, self.top, self.text_defaults, self.top_defaults):
                for name in names:
                    if name in part:
                        return part[name]
        return None

    def _other_names(self, key: str) -> tuple[str, ...]:
        maps = (self.text_defaults.get("attribute_map"), self.top_defaults.get("attribute_map"))
        return tuple(found[key] for found in maps if isinstance(found, dict) and key in found)

    def number(self, key: str) -> int:
        """A positive integer that must be there."""
        value = self.get(key)
        if type(value) is not int or not 1 <= value <= MAX_NUMBER:
            raise SourceError(
                f"{self.path}: {key} is {brief(value)}, expected a positive integer",
                hint=ELSEWHERE.format(model_type=self.top.get("model_type")) if value is None else "",
            )
        return value

    def optional_number(self, key: str) -> int | None:
        """A positive integer; None for one that is missing, null or 0."""
        return self.number(key) if self.get(key) not in (None, 0) else None


def read_configuration(folder: Path, *, trust_remote_code: bool) -> tuple[Configuration, list[str]]:
    """config.json of a checkpoint that can be used, and notes.

    Raises SourceError for a missing or malformed file, a checkpoint that is quantized in a form that cannot be read, a model
    type that transformers does not know, and one that needs its own Python code without ``trust_remote_code``.
    """
    path = folder / "config.json"
    top = read_json(path)
    text = top.get("text_config") or {}
    if not isinstance(text, dict):
        raise SourceError(f"{path}: text_config is not an object")
    model_type = top.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"{path} names no model_type")
    if len(model_type) > MAX_NAME:
        raise SourceError(f"{path}: unknown model type {brief(model_type)}")
    quantization(path, top, text)
    notes, defaults = [], class_defaults(model_type)
    if top.get("auto_map") and not trust_remote_code:
        if defaults is None:
            raise SourceError(
                f"{path}: auto_map: model type {model_type!r} needs Python code of the checkpoint",
                hint="read that code; then allow it with trust_remote_code: true",
            )
        notes.append(f"auto_map in config.json is not used: transformers itself has {model_type}")
    elif defaults is None and not top.get("auto_map"):
        raise SourceError(
            f"{path}: unknown model type {model_type!r}",
            hint=nearest(model_type, model_types()),
        )
    text_type = text.get("model_type")
    inner = class_defaults(text_type) if isinstance(text_type, str) and len(text_type) <= MAX_NAME else None
    return Configuration(path, top, text, defaults or {}, inner or {}), notes


def model_facts(
    config: Configuration, generation: Mapping[str, Any], tokenizer: Path, headers: Mapping[str, TensorHeader]
) -> tuple[ModelFacts, list[str]]:
    """The facts of a model whose tokenizer files lie in ``tokenizer``, and notes.

    Raises SourceError for values that cannot be, tokenizer files that cannot be read, and a chat template that
    does not parse.
    """
    tokenizer_config = read_optional(tokenizer / "tokenizer_config.json")
    templates = read_templates(tokenizer, tokenizer_config)
    eos = _end_ids(config, generation)
    notes = [*templates.notes, *_unstopped(templates, tokenizer, tokenizer_config, eos)]
    bytes_of: Counter[str] = Counter()
    for tensor in headers.values():
        bytes_of[tensor.dtype] += tensor.bytes
    heads = config.number("num_attention_heads")
    facts = ModelFacts(
        architecture=_architecture(config),
        model_type=config.top["model_type"],
        parameters=sum(tensor.elements for tensor in headers.values()),
        dtype=max(bytes_of, key=lambda dtype: bytes_of[dtype]),
        vocabulary=config.number("vocab_size"),
        context=config.number("max_position_embeddings"),
        layers=config.number("num_hidden_layers"),
        hidden=config.number("hidden_size"),
        heads=heads,
        kv_heads=config.optional_number("num_key_value_heads") or heads,
        head_size=config.optional_number("head_dim") or config.number("hidden_size") // heads,
        sliding_window=_sliding_window(config),
        tied_embeddings=_tied(config),
        largest_tensor=max(tensor.bytes for tensor in headers.values()),
        bos_token_id=next(iter(_ids(config.get("bos_token_id"), f"{config.path}: bos_token_id")), None),
        eos_token_ids=eos,
        chat_template=templates.default,
        named_templates=templates.named,
        has_sentencepiece=(tokenizer / "tokenizer.model").is_file(),
    )
    return facts, notes


def _architecture(config: Configuration) -> str:
    match config.top.get("architectures"):
        case [str(name), *_] if name.isidentifier() and len(name) <= MAX_NAME:
            return name
        case _:
            raise SourceError(
                f"{config.path} names no architecture",
                hint='"architectures": ["LlamaForCausalLM"], for example',
            )


def _ids(value: Any, place: str) -> tuple[int, ...]:
    """Token ids of a key that holds one, a list or null; in order."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [entry for entry in listed if type(entry) is not int]:
        raise SourceError(f"{place} is {brief(wrong[0])}, expected a token id or a list of them")
    return tuple(listed)


def _end_ids(config: Configuration, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end generation, each once; SourceError for one in a file that the vocabulary does not have."""
    ids: dict[int, None] = {}
    vocabulary = config.number("vocab_size")
    written = "eos_token_id" in config.text or "eos_token_id" in config.top
    for path, value in (
        (config.path, config.get("eos_token_id")),
        (config.path.with_name("generation_config.json"), generation.get("eos_token_id")),
    ):
        for number in _ids(value, f"{path}: eos_token_id"):
            if not 0 <= number < vocabulary and (written or path != config.path):
                raise SourceError(
                    f"{path}: eos_token_id is {number}, but the vocabulary has the ids 0 to {vocabulary - 1}",
                    hint=f"vocab_size in {config.path} is {vocabulary}; one of the two is wrong",
                )
            ids[number] = None
    return tuple(ids)


def _tied(config: Configuration) -> bool:
    """As transformers: the outermost configuration decides; a class without the key does not tie."""
    for part in (config.top, config.text, config.top_defaults, config.text_defaults):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    return False


def _sliding_window(config: Configuration) -> int | None:
    """The window of a model in which some layer really looks back less far than its context."""
    window, kinds = config.optional_number("sliding_window"), config.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise SourceError(f"{config.path}: layer_types is {brief(kinds)}, expected a list")
    if window is None or window >= config.number("max_position_embeddings"):
        return None
    if config.get("use_sliding_window") is False:
        return None
    if kinds is not None:
        return window if "sliding_attention" in kinds else None
    first = config.optional_number("max_window_layers") if config.get("use_sliding_window") else None
    if first is not None and first >= config.number("num_hidden_layers"):  # Qwen2: layers from this one on
        return None
    return window


def _unstopped(
    templates: ChatTemplates, tokenizer: Path, tokenizer_config: Mapping[str, Any], eos: tuple[int, ...]
) -> list[str]:
    """A note when the token that ends an answer in the default template would not end generation."""
    special = special_tokens(tokenizer, tokenizer_config)
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in tokenizer_config.items()
        if key.endswith("_token")
        and (isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str)))
    }
    token = end_of_turn(templates, special, named)
    if token is None or special[token] in eos:
        return []
    known = f"end-of-sequence ids {list(eos)} of config.json and generation_config.json"
    return [
        f"the chat template ends an answer with {token} ({special[token]}), which is not among the {known}"
    ]


def special_tokens(tokenizer: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, int]:
    """Text to id of the added tokens that tokenizer.json (else tokenizer_config.json) lists."""
    path, listed = tokenizer / "tokenizer.json", tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        place = tokenizer / "tokenizer_config.json"
        raise SourceError(f"{place}: added_tokens_decoder is {brief(listed)}, expected an object")
    if path.is_file():
        text = require_bounded(path).decode("utf-8")
        # Only this list is parsed: the vocabulary after it can be tens of megabytes.
        key_at = text.find('"added_tokens"')
        start = text.find("[", key_at)
        try:
            entries = json.JSONDecoder().raw_decode(text, start)[0] if key_at >= 0 <= start else []
        except ValueError as error:
            raise SourceError(f"{path}: added_tokens is not a list of tokens") from error
        key, pairs = (
            "added_tokens",
            [(entry.get("id") if isinstance(entry, dict) else None, entry) for entry in entries],
        )
    else:
        path, key = tokenizer / "tokenizer_config.json", "added_tokens_decoder"
        pairs = [(int(number) if number.isdecimal() else None, entry) for number, entry in listed.items()]
    tokens: dict[str, int] = {}
    for number, entry in pairs:
        content = entry.get("content") if isinstance(entry, dict) else None
        if type(number) is not int or not isinstance(content, str):
            raise SourceError(f"{path}: {key}: {brief(entry)} is no token with an id and a content")
        tokens[content] = number
    return tokens
