"""A Llama checkpoint as an F16 GGUF, written tensor by tensor: enough to score token ids, without a tokenizer.

Independent of the converter, so that a test of the scores tests the scores. Rotary positions of a Hugging Face Llama
pair row i with row i + half of a head, llama.cpp's pair neighbours: the rows of Q and K are put in that order
(llama.cpp, conversion/llama.py, ``permute``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    folder: Path,
    output: Path,
    *,
    permute_k: bool = True,
    vocabulary: int | None = None,
    ruined: bool = False,
    file_type: int | None = None,
) -> Path:
    """Write the checkpoint in ``folder`` to ``output``; the other arguments plant a fault.

    ``permute_k=False`` leaves the rows of K as they are, ``vocabulary`` cuts or pads the embeddings and the head,
    ``ruined`` makes a norm so large that the logits overflow, ``file_type`` is what ``general.file_type`` says (no more).
    """
    import torch
    from gguf import GGUFWriter
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    weights = {k: v.to(torch.float32).numpy() for k, v in load_file(folder / "model.safetensors").items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = vocabulary or config["vocab_size"]
    writer = GGUFWriter(output, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(rows)
    for name, original in weights.items():
        target, values = renamed(name), original
        if target.endswith(("attn_q.weight", "attn_k.weight")) and (permute_k or "attn_q" in target):
            values = permuted(original, heads if "attn_q" in target else kv_heads)
        elif target in {"token_embd.weight", "output.weight"}:
            values = np.resize(original, (rows, original.shape[1]))
        elif ruined and target == "output_norm.weight":
            values = original * np.float32("inf")
        writer.add_tensor(target, values if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def renamed(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER[rest.removesuffix('.weight')]}.weight"


def permuted(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of Q or K, each head's two halves interleaved."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
