"""PEFT adapters with random matrices, written as peft 0.21 writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
SETTINGS: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": "tiny-chat", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None, "lora_alpha": 16, "lora_dropout": 0.05,
    "modules_to_save": None, "peft_type": "LORA", "r": 4, "rank_pattern": {}, "alpha_pattern": {}, "revision": None,
    "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    "alora_invocation_tokens": None, "lora_bias": False, "trainable_token_indices": None, "target_parameters": None,
    "use_qalora": False, "qalora_group_size": 16, "megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {},
    "eva_config": None, "corda_config": None, "layer_replication": None, "exclude_modules": None, "use_bdlora": None,
    "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.21.2",
}  # fmt: skip


def write(
    folder: Path,
    weights: Mapping[str, tuple[int, int]],
    *,
    size: float = 0.02,
    more: Mapping[str, torch.Tensor] | None = None,
    **settings: Any,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Write an adapter for ``weights`` (name to [rows, columns]); returns A and B of each in float64.

    ``settings`` change adapter_config.json, ``more`` are further tensors.
    """
    chosen = SETTINGS | settings
    generator = torch.Generator().manual_seed(7)
    stored: dict[str, torch.Tensor] = {PREFIX + name: tensor for name, tensor in (more or {}).items()}
    made = {}
    for name, (rows, columns) in weights.items():
        module = name.removesuffix(".weight")
        rank = next((r for key, r in chosen["rank_pattern"].items() if module.endswith(key)), chosen["r"])
        a = size * torch.randn(rank, columns, generator=generator)
        b = size * torch.randn(rows, rank, generator=generator)
        stored[f"{PREFIX}{module}.lora_A.weight"], stored[f"{PREFIX}{module}.lora_B.weight"] = a, b
        made[name] = a.double(), b.double()
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(chosen), encoding="utf-8")
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return made
