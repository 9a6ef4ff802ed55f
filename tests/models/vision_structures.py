"""A small multimodal model with random weights, as a real repository has it: eyes beside a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import structures


def write_gemma3_vision(folder: Path) -> Path:
    """Gemma 3 as it is published: SigLIP's tower, a projector, and the language model of ``structures.write_gemma3``."""
    import torch
    from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration

    structures.write_gemma3(folder)
    (folder / "model.safetensors").unlink()
    text = AutoConfig.from_pretrained(folder)
    text.initializer_range = 0.06
    eyes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    settings: dict[str, Any] = {"eos_token_id": text.eos_token_id}
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=eyes,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
        tie_word_embeddings=True,
        **settings,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(structures.SEED)
    try:
        model: Any = Gemma3ForConditionalGeneration(config)
        model = model.to(torch.bfloat16)
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved["text_config"].pop("_name_or_path", None)  # would be a path of this machine
    (folder / "config.json").write_text(json.dumps(saved, indent=2), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    card = "---\npipeline_tag: image-text-to-text\ntags: [vision, gemma]\n---\n# A model that sees\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder
