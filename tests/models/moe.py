"""A trained mixture of experts small enough for the suite: ``tiny-moe`` with the tiny chat model's tokenizer.

Qwen3's mixture (``Qwen3MoeForCausalLM``): two layers of four experts of which two see a token, tied embeddings, every row a
multiple of 256 so that llama.cpp's K-quants apply everywhere. ``train_moe.py`` made it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent
TINY = MODELS / "tiny-chat"
WEIGHTS = MODELS / "tiny-moe" / "model.safetensors"
LAYERS, EXPERTS, WIDTH = 2, 4, 256


def config() -> dict[str, Any]:
    """config.json of the model."""
    tiny = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    same = (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size",
        "max_position_embeddings", "eos_token_id", "pad_token_id", "hidden_act", "dtype", "rope_parameters",
    )  # fmt: skip
    return {
        **{key: tiny[key] for key in same},
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": LAYERS,
        "intermediate_size": 3 * WIDTH,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.01,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def write_trained_moe(folder: Path) -> Path:
    """Fill ``folder`` with the model."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(), indent=1), encoding="utf-8")
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder
