"""Smoothing mappings: as users write them, and the architectures that llmcompressor has its own for."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from importlib.metadata import distribution
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from quantool.errors import ConfigError, SourceError
from quantool.methods._compressed.schemes import Pattern, matches

TRANSFORM = "llmcompressor/modifiers/transform"
AWQ_REGISTRIES = (
    (f"{TRANSFORM}/awq/mappings.py", "AWQ_MAPPING_REGISTRY"),
    (f"{TRANSFORM}/awq/dynamic_mappings.py", "AWQ_DYNAMIC_MAPPING_REGISTRY"),
)
HEADS = re.compile(r"(ForSequenceClassification|Model)$")
SMOOTHQUANT_REGISTRIES = (
    (f"{TRANSFORM}/smoothquant/utils.py", "MAPPINGS_REGISTRY"),
    (f"{TRANSFORM}/smoothquant/dynamic_mappings.py", "SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY"),
)


class Mapping(BaseModel):
    """A layer whose output channels are scaled, and the linear layers that undo it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    smooth_layer: Pattern = Field(
        description="Name or re: pattern of the layer before, e.g. re:.*input_layernorm$."
    )
    balance_layers: tuple[Pattern, ...] = Field(
        min_length=1, description="Names or re: patterns of the layers it feeds."
    )


def _spelled(value: Any) -> Any:
    """Accept llmcompressor's pair of one name and a list of names, in either order."""
    match value:
        case [str(smooth), [*balance]] | [[*balance], str(smooth)]:
            return {"smooth_layer": smooth, "balance_layers": balance}
    return value


Mappings = tuple[Annotated[Mapping, BeforeValidator(_spelled)], ...]


def decoder_of(architecture: str) -> str:
    """The class under which llmcompressor lists the layers of an embedding model or classifier: the one that writes text."""
    return HEADS.sub("ForCausalLM", architecture)


def check(
    mappings: Mappings | None,
    architecture: str,
    modules: Sequence[str],
    registries: Sequence[tuple[str, str]],
) -> None:
    """Refuse mappings that cannot work.

    ConfigError for a pattern that matches no module of the checkpoint; SourceError when there are no ``mappings`` and
    llmcompressor has none of its own for ``architecture`` (it would take Llama's in silence).
    """
    if mappings is None:
        if architecture not in known_architectures(registries):
            raise SourceError(
                f"llmcompressor has no smoothing mappings for {architecture}",
                hint="name smooth_layer and balance_layers in quantization_config.mappings",
            )
        return
    for mapping in mappings:
        for pattern in (mapping.smooth_layer, *mapping.balance_layers):
            if not any(matches(module, pattern) for module in modules):
                raise ConfigError(
                    f"quantization_config.mappings: {pattern!r} matches no layer of the checkpoint"
                )


def known_architectures(registries: Sequence[tuple[str, str]]) -> set[str]:
    """Keys of llmcompressor's registries, read from its source text: importing it takes seconds."""
    found: set[str] = set()
    for path, variable in registries:
        text = str(distribution("llmcompressor").locate_file(path))
        with open(text, encoding="utf-8") as file:  # noqa: PTH123 - locate_file gives a SimplePath
            tree = ast.parse(file.read())
        for node in tree.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.target.id == variable
                and isinstance(node.value, ast.Dict)
            ):
                found |= {
                    key.value
                    for key in node.value.keys
                    if isinstance(key, ast.Constant) and isinstance(key.value, str)
                }
    if not found:
        raise SourceError(
            "this llmcompressor keeps its mappings elsewhere", hint="pip install 'quantool[compressed]'"
        )
    return found
