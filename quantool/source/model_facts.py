"""What a checkpoint's small files say: model facts, tokenizer facts, the card. No weights, no torch, no transformers.

Keys that config.json leaves out have the values that transformers' configuration classes give them; those are read
from the installed transformers' source text, because importing it takes seconds.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantool.errors import SourceError, nearest
from quantool.formats.safetensors import TensorHeader
from quantool.records import ModelCard, ModelFacts
from quantool.source.chat_template import end_of_turn, read_named, read_template


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
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SourceError(f"{self.path}: {key} is {value!r}, expected a positive integer")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; SourceError naming file, line and column when it is none."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing") from error
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}:1:1: not a JSON object")
    return content


def read_optional(path: Path) -> dict[str, Any]:
    """Like ``read_json``; an empty object when the file is not there."""
    return read_json(path) if path.exists() else {}


def read_configuration(folder: Path, *, trust_remote_code: bool) -> tuple[Configuration, list[str]]:
    """config.json of a checkpoint that can be used, and notes.

    Raises SourceError for a missing or malformed file, a checkpoint that is quantized already, a model type that
    transformers does not know, and one that needs its own Python code without ``trust_remote_code``.
    """
    path = folder / "config.json"
    top = read_json(path)
    text = top.get("text_config") or {}
    if not isinstance(text, dict):
        raise SourceError(f"{path}: text_config is not an object")
    model_type = top.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"{path} names no model_type")
    for part in (top, text):
        if quantized := part.get("quantization_config"):
            how = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
            raise SourceError(
                f"{path}: the checkpoint is already quantized (quantization_config, quant_method {how})",
                hint="start from the bf16 or f16 checkpoint it was made from",
            )
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
            hint=nearest(model_type, sorted(_special_modules()[0])),
        )
    text_type = text.get("model_type")
    inner = class_defaults(text_type) if isinstance(text_type, str) else None
    return Configuration(path, top, text, defaults or {}, inner or {}), notes


@cache
def class_defaults(model_type: str) -> dict[str, Any] | None:
    """Literal defaults of transformers' configuration class for ``model_type``; None when it has none.

    Read from ``models/<module>/configuration_<module>.py`` without importing it. Values that are not literals are
    left out.
    """
    names, modules = _special_modules()
    module = modules.get(model_type, model_type.replace("-", "_"))
    path = _transformers() / "models" / module / f"configuration_{module}.py"
    if not module.isidentifier() or not path.is_file():
        return {} if model_type in names else None
    classes = {node.name: node for node in _parse(path).body if isinstance(node, ast.ClassDef)}
    for node in classes.values():
        found = _literals(node, classes)
        if found.get("model_type") == model_type:
            return found
    return {} if model_type in names else None


def _literals(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= _literals(classes[base.id], classes)
    for line in node.body:
        match line:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case _:
                continue
        try:
            found[name] = ast.literal_eval(value)
        except ValueError:  # a call or an expression
            found.pop(name, None)
    return found


@cache
def _special_modules() -> tuple[frozenset[str], dict[str, str]]:
    """All model types of the installed transformers, and the module of those that are not named like it."""
    auto = _transformers() / "models" / "auto"
    tables: dict[str, dict[str, str]] = {}
    for path in (auto / "auto_mappings.py", auto / "configuration_auto.py"):
        for node in _parse(path).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(args=[table])):
                    pass
                case ast.Expr(ast.Call(ast.Attribute(ast.Name(id=name), "update"), args=[table])):
                    pass
                case _:
                    continue
            try:
                tables.setdefault(name, {}).update(dict(ast.literal_eval(table)))
            except (ValueError, TypeError):  # not a literal table
                continue
    return frozenset(tables["CONFIG_MAPPING_NAMES"]), tables["SPECIAL_MODEL_TYPE_TO_MODULE_NAME"]


def _transformers() -> Path:
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:  # a dependency of quantool
        raise AssertionError
    return Path(spec.origin).parent


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def model_facts(
    config: Configuration, generation: Mapping[str, Any], tokenizer: Path, headers: Mapping[str, TensorHeader]
) -> tuple[ModelFacts, list[str]]:
    """The facts of a model whose tokenizer files lie in ``tokenizer``, and notes.

    Raises SourceError for values that cannot be, tokenizer files that cannot be read, and a chat template that
    does not parse.
    """
    tokenizer_config = read_optional(tokenizer / "tokenizer_config.json")
    template, notes = read_template(tokenizer, tokenizer_config)
    eos = _ids(config.get("eos_token_id"), generation.get("eos_token_id"))
    if template is not None:
        notes += _unstopped(template, tokenizer, tokenizer_config, eos)
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
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config.number("hidden_size") // heads,
        sliding_window=_sliding_window(config),
        tied_embeddings=_tied(config),
        largest_tensor=max(tensor.bytes for tensor in headers.values()),
        bos_token_id=next(iter(_ids(config.get("bos_token_id"))), None),
        eos_token_ids=eos,
        chat_template=template,
        named_templates=read_named(tokenizer, tokenizer_config),
        has_sentencepiece=(tokenizer / "tokenizer.model").is_file(),
    )
    return facts, notes


def _architecture(config: Configuration) -> str:
    match config.top.get("architectures"):
        case [str(name), *_]:
            return name
        case _:
            raise SourceError(
                f"{config.path} names no architecture",
                hint='"architectures": ["LlamaForCausalLM"], for example',
            )


def _ids(*values: Any) -> tuple[int, ...]:
    """Token ids of keys that hold one, a list or null; in order, each once."""
    flat = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(entry for entry in flat if isinstance(entry, int)))


def _tied(config: Configuration) -> bool:
    """As transformers: the outermost configuration decides; a class without the key does not tie."""
    for part in (config.top, config.text, config.top_defaults, config.text_defaults):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    return False


def _sliding_window(config: Configuration) -> int | None:
    """The window of a model in which some layer really looks back less far than its context."""
    window = config.get("sliding_window")
    if (
        not window
        or window >= config.number("max_position_embeddings")
        or config.get("use_sliding_window") is False
    ):
        return None
    kinds = config.get("layer_types")
    if kinds is not None:
        return int(window) if "sliding_attention" in kinds else None
    first = config.get("max_window_layers") if config.get("use_sliding_window") else None
    if first is not None and first >= config.number("num_hidden_layers"):  # Qwen2: layers from this one on
        return None
    return int(window)


def _unstopped(
    template: str, tokenizer: Path, tokenizer_config: Mapping[str, Any], eos: tuple[int, ...]
) -> list[str]:
    """A note when the token that ends an answer in the template would not end generation."""
    special = special_tokens(tokenizer, tokenizer_config)
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in tokenizer_config.items()
        if key.endswith("_token")
        and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
    }
    token = end_of_turn(template, special, named)
    if token is None or special[token] in eos:
        return []
    known = f"end-of-sequence ids {list(eos)} of config.json and generation_config.json"
    return [
        f"the chat template ends an answer with {token} ({special[token]}), which is not among the {known}"
    ]


def special_tokens(tokenizer: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, int]:
    """Text to id of the added tokens that tokenizer.json (else tokenizer_config.json) lists."""
    path = tokenizer / "tokenizer.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        # Only this list is parsed: the vocabulary after it can be tens of megabytes.
        place = text.find('"added_tokens"')
        start = text.find("[", place)
        try:
            entries = json.JSONDecoder().raw_decode(text, start)[0] if place >= 0 else []
            return {entry["content"]: entry["id"] for entry in entries}
        except (ValueError, TypeError, KeyError) as error:
            raise SourceError(f"{path}: added_tokens is not a list of tokens") from error
    listed = tokenizer_config.get("added_tokens_decoder", {})
    return {entry["content"]: int(number) for number, entry in listed.items()}


def model_card(folder: Path) -> tuple[ModelCard, list[str]]:
    """What README.md's YAML front matter says; a note instead of an error where it cannot be read."""
    import yaml

    path = folder / "README.md"
    if not path.is_file():
        return ModelCard(), []
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return ModelCard(), []
    front, closed, _ = text[3:].partition("\n---")
    if not closed:
        return ModelCard(), ["README.md: the YAML front matter has no end (a line ---); it is ignored"]
    try:
        data = yaml.safe_load(front) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        return ModelCard(), [
            f"README.md{line}: the front matter is not YAML; license and languages are unknown"
        ]
    if not isinstance(data, dict):
        return ModelCard(), [
            "README.md: the front matter is not a mapping; license and languages are unknown"
        ]
    card = ModelCard(
        license=next(iter(_texts(data.get("license"))), None),
        license_name=next(iter(_texts(data.get("license_name"))), None),
        license_link=next(iter(_texts(data.get("license_link"))), None),
        languages=_texts(data.get("language")),
        pipeline_tag=next(iter(_texts(data.get("pipeline_tag"))), None),
        tags=_texts(data.get("tags")),
        base_models=_texts(data.get("base_model")),
    )
    return card, []


def _texts(value: Any) -> tuple[str, ...]:
    entries: Iterable[Any] = value if isinstance(value, list) else [value]
    # YAML reads the language code of Norwegian, no, as false.
    return tuple("no" if entry is False else str(entry) for entry in entries if entry is not None)
