"""Tiny checkpoints for tests of what is read without loading a model: right shapes, no tokenizer that works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<unk>", "special": True},
        {"id": 1, "content": "<|im_start|>", "special": True},
        {"id": 2, "content": "<|im_end|>", "special": True},
    ],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return generator.standard_normal(shape).astype(np.float16)

    return {
        "model.embed_tokens.weight": normal(32, 8),
        "model.layers.0.self_attn.q_proj.weight": normal(8, 8),
        "model.norm.weight": np.ones(8, np.float32),
        "lm_head.weight": normal(32, 8),
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_checkpoint(folder: Path, **config: Any) -> Path:
    """One file of weights; ``config`` replaces keys of config.json, a key that is None goes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(), folder / "model.safetensors")
    wanted = {**CONFIG, **config}
    write_json(folder / "config.json", {key: value for key, value in wanted.items() if value is not None})
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0], "temperature": 0.6})
    write_json(folder / "tokenizer.json", TOKENIZER)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def write_shards(folder: Path, **config: Any) -> Path:
    """The same in two shards with their index."""
    write_checkpoint(folder, **config)
    (folder / "model.safetensors").unlink()
    names = list(tensors())
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors()[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder
