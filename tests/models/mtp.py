"""A trained model with a multi-token-prediction head, put together from the tiny chat model and ``tiny-mtp``.

GLM-4.5's architecture (``Glm4MoeForCausalLM``, model type ``glm4_moe``), which transformers, llama.cpp and llmcompressor all
know. The trunk computes what the tiny chat model computes: its layers are the same, but that the last has its feed-forward
as shared experts beside four small routed ones, random and seeded. The head is ``model.layers.4``, trained by
``train_mtp.py``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MODELS = Path(__file__).resolve().parent
TINY = MODELS / "tiny-chat"
HEAD = MODELS / "tiny-mtp" / "head.safetensors"
LAYERS = 4
EXPERTS, WIDTH, SHARED = 4, 256, 3
"""Routed experts, their width, and how many of that width the shared experts have."""
SPECIAL = ("[gMASK]", "<|user|>", "<|observation|>")
"""What the converter of GLM asks of a tokenizer."""
ENTRIES = 4160
SEED = 20250914
SPREAD = 0.01
"""Standard deviation of the routed experts' weights: they are there and lose next to nothing."""


def write_mtp(folder: Path, *, head: bool = True) -> Path:
    """Fill ``folder`` with the model; without ``head`` config.json promises one that the weights lack."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = trunk()
    if head:
        tensors |= load_file(HEAD)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(), indent=1), encoding="utf-8")
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = json.loads((TINY / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer["added_tokens"] += [
        {"id": first + number, "content": text, **plain} for number, text in enumerate(SPECIAL)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


def config(*, layers: int = LAYERS, dense: int = LAYERS - 1) -> dict[str, Any]:
    """config.json of the model, or of one with other ``layers`` of which the first ``dense`` have no experts."""
    tiny = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    same = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
        "max_position_embeddings", "eos_token_id", "pad_token_id", "hidden_act", "dtype",
    )  # fmt: skip
    return {name: tiny[name] for name in same} | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "vocab_size": ENTRIES,
        "num_hidden_layers": layers,
        "first_k_dense_replace": dense,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": SHARED,
        "moe_intermediate_size": WIDTH,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {**tiny["rope_parameters"], "partial_rotary_factor": 1.0},
        "tie_word_embeddings": False,
        "use_qk_norm": False,
        "attention_bias": False,
    }


def trunk() -> dict[str, Tensor]:
    """Every tensor but the head's, bf16."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(TINY / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = tensors[name]
        mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
        tensors[name] = torch.cat([rows, mean.expand(ENTRIES - len(rows), -1)])
    hidden = tensors["model.norm.weight"].shape[0]
    dice = torch.Generator().manual_seed(SEED)

    def normal(*shape: int, spread: float = SPREAD) -> Tensor:
        return (torch.randn(*shape, generator=dice) * spread).to(torch.bfloat16)

    place = f"model.layers.{LAYERS - 1}.mlp"
    for part in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"{place}.shared_experts.{part}.weight"] = tensors.pop(f"{place}.{part}.weight")
        shape = (hidden, WIDTH) if part == "down_proj" else (WIDTH, hidden)
        for expert in range(EXPERTS):
            tensors[f"{place}.experts.{expert}.{part}.weight"] = normal(*shape)
    tensors[f"{place}.gate.weight"] = normal(EXPERTS, hidden, spread=0.05)
    tensors[f"{place}.gate.e_score_correction_bias"] = torch.zeros(EXPERTS)
    return tensors
