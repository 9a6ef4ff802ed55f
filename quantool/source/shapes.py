"""config.json against the tensors of the checkpoint: numbers that cannot both be true, found before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantool.errors import SourceError
from quantool.formats.json_file import read_optional
from quantool.formats.safetensors import TensorHeader
from quantool.records import Source

CONFORMING = frozenset({
    "apertus", "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "granite", "granitemoe", "llama", "mistral",
    "ministral", "mixtral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "starcoder2",
})  # fmt: skip
"""Model types of transformers 5.17 whose layers have the shapes below (``modeling_*.py``); others may have any."""
EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.0"


def check_config_shapes(source: Source, tensors: Mapping[str, TensorHeader]) -> None:
    """SourceError naming the first key of config.json that does not fit the weights, with both numbers.

    Only for model types that are known to have these shapes, and only where the checkpoint has such a tensor: the tools
    that convert or load it say the rest, less readably.
    """
    if source.facts.model_type not in CONFORMING or source.trust_remote_code:
        return
    for key, name, axis, wanted in _expectations(source):
        tensor = tensors.get(name)
        if tensor is not None and len(tensor.shape) == 2 and tensor.shape[axis] != wanted:
            what = "rows" if axis == 0 else "columns"
            raise SourceError(
                f"config.json: {key}, but {name} has {tensor.shape[axis]} {what}",
                hint="config.json and the weights are of different models, or one of them was changed",
            )
    layers = {
        int(part)
        for name in tensors
        if name.startswith("model.layers.") and (part := name.split(".")[2]).isdigit()
    }
    if layers and max(layers) + 1 < source.facts.layers:
        raise SourceError(
            f"config.json: num_hidden_layers {source.facts.layers}, but the weights have {max(layers) + 1} layers"
        )


def _expectations(source: Source) -> Iterator[tuple[str, str, int, int]]:
    """What config.json says, a tensor, an axis of it, and the length that it must have."""
    facts = source.facts
    queries, keys = facts.heads * facts.head_size, facts.kv_heads * facts.head_size
    yield f"vocab_size {facts.vocabulary}", EMBEDDING, 0, facts.vocabulary
    yield f"hidden_size {facts.hidden}", EMBEDDING, 1, facts.hidden
    heads = f"num_attention_heads {facts.heads} of {facts.head_size} make {queries}"
    yield heads, f"{LAYER}.self_attn.q_proj.weight", 0, queries
    heads = f"num_key_value_heads {facts.kv_heads} of {facts.head_size} make {keys}"
    yield heads, f"{LAYER}.self_attn.k_proj.weight", 0, keys
    width = read_optional(source.folder / "config.json").get("intermediate_size")
    if isinstance(width, int):
        for projection in ("gate_proj", "up_proj"):
            yield f"intermediate_size {width}", f"{LAYER}.mlp.{projection}.weight", 0, width
