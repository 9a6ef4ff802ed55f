"""Checkpoints of every structure that users bring, as headers alone: true names and shapes, no data (sparse files).

Names are those of published checkpoints of each family (the safetensors indexes on the Hub); sizes are tiny. Nothing here
can be loaded: it is for what is decided from headers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantool.formats.safetensors_layout import Stored, encode
from tests.checkpoint import TOKENIZER, write_json

Shapes = dict[str, tuple[int, ...]]

HIDDEN, INNER, VOCABULARY, HEADS, KV, HEAD = 64, 128, 256, 4, 2, 16
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """A checkpoint: its config.json, its tensors, files beside (name to content), and what a plan makes of it."""

    config: dict[str, Any]
    tensors: Shapes
    files: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "BF16"


def attention(prefix: str, *, norms: bool = False) -> Shapes:
    """Query, key, value and output of one layer."""
    found: Shapes = {
        f"{prefix}.q_proj.weight": (HEADS * HEAD, HIDDEN),
        f"{prefix}.k_proj.weight": (KV * HEAD, HIDDEN),
        f"{prefix}.v_proj.weight": (KV * HEAD, HIDDEN),
        f"{prefix}.o_proj.weight": (HIDDEN, HEADS * HEAD),
    }
    if norms:
        found |= {f"{prefix}.q_norm.weight": (HEAD,), f"{prefix}.k_norm.weight": (HEAD,)}
    return found


def mlp(prefix: str, inner: int = INNER) -> Shapes:
    """Gate, up and down."""
    return {
        f"{prefix}.gate_proj.weight": (inner, HIDDEN),
        f"{prefix}.up_proj.weight": (inner, HIDDEN),
        f"{prefix}.down_proj.weight": (HIDDEN, inner),
    }


def experts(prefix: str, count: int = 4) -> Shapes:
    """A router and its experts, one tensor each."""
    found: Shapes = {f"{prefix}.gate.weight": (count, HIDDEN)}
    for number in range(count):
        found |= mlp(f"{prefix}.experts.{number}")
    return found


def fused_experts(prefix: str, count: int = 4) -> Shapes:
    """All experts of a layer in two tensors, inputs first and with biases, as gpt-oss has them."""
    return {
        f"{prefix}.router.weight": (count, HIDDEN),
        f"{prefix}.router.bias": (count,),
        f"{prefix}.experts.gate_up_proj": (count, HIDDEN, 2 * INNER),
        f"{prefix}.experts.gate_up_proj_bias": (count, 2 * INNER),
        f"{prefix}.experts.down_proj": (count, INNER, HIDDEN),
        f"{prefix}.experts.down_proj_bias": (count, HIDDEN),
    }


def joined_experts(prefix: str, count: int = 4) -> Shapes:
    """The experts of a layer end to end, as transformers 5 has them in memory."""
    return {
        f"{prefix}.gate.weight": (count, HIDDEN),
        f"{prefix}.experts.gate_up_proj": (count, 2 * INNER, HIDDEN),
        f"{prefix}.experts.down_proj": (count, HIDDEN, INNER),
    }


def layer(prefix: str, feed: Callable[[str], Shapes] = mlp, *, norms: bool = False) -> Shapes:
    """A decoder layer."""
    return {
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        **attention(f"{prefix}.self_attn", norms=norms),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        **feed(f"{prefix}.mlp"),
    }


def decoder(
    root: str = "model", feed: Callable[[str], Shapes] = mlp, *, layers: int = 2, norms: bool = False, head: str | None = "lm_head.weight"
) -> Shapes:  # fmt: skip
    """A language model."""
    found: Shapes = {f"{root}.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(layers):
        found |= layer(f"{root}.layers.{number}", feed, norms=norms)
    found[f"{root}.norm.weight"] = (HIDDEN,)
    return found | ({head: (VOCABULARY, HIDDEN)} if head else {})


def tower(prefix: str, blocks: str = "blocks", count: int = 3) -> Shapes:
    """Eyes or ears: an embedding of patches and some blocks."""
    found: Shapes = {f"{prefix}.patch_embed.proj.weight": (HIDDEN, 3, 2, 2)}
    for number in range(count):
        found |= {
            f"{prefix}.{blocks}.{number}.attn.qkv.weight": (3 * HIDDEN, HIDDEN),
            f"{prefix}.{blocks}.{number}.attn.qkv.bias": (3 * HIDDEN,),
            f"{prefix}.{blocks}.{number}.norm1.weight": (HIDDEN,),
        }
    return found


def linear_attention(prefix: str) -> Shapes:
    """Gated delta net of Qwen3-Next and Qwen3.5."""
    return {
        f"{prefix}.A_log": (HEADS,),
        f"{prefix}.dt_bias": (HEADS,),
        f"{prefix}.conv1d.weight": (3 * HIDDEN, 1, 4),
        f"{prefix}.in_proj_qkvz.weight": (4 * HIDDEN, HIDDEN),
        f"{prefix}.in_proj_ba.weight": (2 * HEADS, HIDDEN),
        f"{prefix}.norm.weight": (HEAD,),
        f"{prefix}.out_proj.weight": (HIDDEN, HIDDEN),
    }


def hybrid() -> Shapes:
    """Three layers of linear attention to one of full attention."""
    found = decoder(feed=experts, layers=4, norms=True)
    for number in range(3):
        for name in [name for name in found if name.startswith(f"model.layers.{number}.self_attn")]:
            del found[name]
        found |= linear_attention(f"model.layers.{number}.linear_attn")
    return found


def mamba() -> Shapes:
    """Mamba 2: no attention at all."""
    found: Shapes = {"backbone.embeddings.weight": (VOCABULARY, HIDDEN), "backbone.norm_f.weight": (HIDDEN,)}
    for number in range(2):
        mixer = f"backbone.layers.{number}.mixer"
        found |= {
            f"backbone.layers.{number}.norm.weight": (HIDDEN,),
            f"{mixer}.A_log": (HEADS,),
            f"{mixer}.D": (HEADS,),
            f"{mixer}.dt_bias": (HEADS,),
            f"{mixer}.conv1d.weight": (HIDDEN, 1, 4),
            f"{mixer}.conv1d.bias": (HIDDEN,),
            f"{mixer}.in_proj.weight": (3 * HIDDEN, HIDDEN),
            f"{mixer}.out_proj.weight": (HIDDEN, HIDDEN),
        }
    return found | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def state_space_hybrid() -> Shapes:
    """Bamba: a layer of Mamba 2, then one of attention."""
    mixer = "model.layers.0.mamba"
    found = {
        name.replace(".mlp.", ".feed_forward.")
        .replace("post_attention_layernorm", "pre_ff_layernorm")
        .replace("model.norm", "model.final_layernorm"): shape
        for name, shape in decoder().items()
        if "layers.0.self_attn" not in name
    }
    return found | {
        f"{mixer}.A_log": (8,),
        f"{mixer}.D": (8,),
        f"{mixer}.dt_bias": (8,),
        f"{mixer}.conv1d.weight": (160, 1, 4),
        f"{mixer}.conv1d.bias": (160,),
        f"{mixer}.in_proj.weight": (296, HIDDEN),
        f"{mixer}.out_proj.weight": (HIDDEN, 128),
        f"{mixer}.norm.weight": (128,),
    }


def sparse_latent() -> Shapes:
    """DeepSeek V3.2: latent attention, and an indexer that chooses what is attended to."""
    found = {name: shape for name, shape in decoder(feed=experts).items() if "self_attn" not in name}
    for number in range(2):
        attention = f"model.layers.{number}.self_attn"
        found |= {
            f"{attention}.q_a_proj.weight": (32, HIDDEN),
            f"{attention}.q_a_layernorm.weight": (32,),
            f"{attention}.q_b_proj.weight": (HEADS * 24, 32),
            f"{attention}.kv_a_proj_with_mqa.weight": (40, HIDDEN),
            f"{attention}.kv_a_layernorm.weight": (32,),
            f"{attention}.kv_b_proj.weight": (HEADS * 32, 32),
            f"{attention}.o_proj.weight": (HIDDEN, HEADS * 16),
            f"{attention}.indexer.wq_b.weight": (64, 32),
            f"{attention}.indexer.wk.weight": (16, HIDDEN),
            f"{attention}.indexer.k_norm.weight": (16,),
            f"{attention}.indexer.k_norm.bias": (16,),
            f"{attention}.indexer.weights_proj.weight": (4, HIDDEN),
            f"model.layers.{number}.mlp.gate.e_score_correction_bias": (4,),
            **mlp(f"model.layers.{number}.mlp.shared_experts"),
        }
    return found


def relative_encoder() -> Shapes:
    """T5's encoder, as sentence-t5 saves it: positions are relative, by a table of the first layer's."""
    found: Shapes = {
        "shared.weight": (VOCABULARY, HIDDEN),
        "encoder.final_layer_norm.weight": (HIDDEN,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, HEADS),
    }
    for number in range(2):
        block = f"encoder.block.{number}.layer"
        found |= {f"{block}.0.SelfAttention.{part}.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        found |= {
            f"{block}.0.layer_norm.weight": (HIDDEN,),
            f"{block}.1.DenseReluDense.wi.weight": (INNER, HIDDEN),
            f"{block}.1.DenseReluDense.wo.weight": (HIDDEN, INNER),
            f"{block}.1.layer_norm.weight": (HIDDEN,),
        }
    return found


def drafting(prefix: str) -> Shapes:
    """A layer that drafts further tokens, as DeepSeek and GLM number it behind the others."""
    return {
        f"{prefix}.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
        f"{prefix}.enorm.weight": (HIDDEN,),
        f"{prefix}.hnorm.weight": (HIDDEN,),
        **layer(prefix),
        f"{prefix}.shared_head.norm.weight": (HIDDEN,),
        f"{prefix}.embed_tokens.weight": (VOCABULARY, HIDDEN),
    }


def own_drafting() -> Shapes:
    """The head of Qwen3-Next and Qwen3.5, which has a name of its own."""
    return {
        "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
        "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
        "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
        **layer("mtp.layers.0", norms=True),
        "mtp.norm.weight": (HIDDEN,),
    }


def encoder() -> Shapes:
    """BERT."""
    found: Shapes = {
        "embeddings.word_embeddings.weight": (VOCABULARY, HIDDEN),
        "embeddings.position_embeddings.weight": (128, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
    }
    for number in range(2):
        block = f"encoder.layer.{number}"
        for name in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ):
            found |= {f"{block}.{name}.weight": (HIDDEN, HIDDEN), f"{block}.{name}.bias": (HIDDEN,)}
        found |= {
            f"{block}.intermediate.dense.weight": (INNER, HIDDEN),
            f"{block}.output.dense.weight": (HIDDEN, INNER),
        }
    return found | {"pooler.dense.weight": (HIDDEN, HIDDEN)}


def text(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    """config.json of a language model."""
    return {"architectures": [architecture], "model_type": model_type, **TEXT, **more}


def multimodal(architecture: str, model_type: str, text_type: str, **sections: Any) -> dict[str, Any]:
    """config.json with sections."""
    inner = {"model_type": text_type, **TEXT}
    return {"architectures": [architecture], "model_type": model_type, "text_config": inner, **sections}


EYES = {"vision_config": {"hidden_size": HIDDEN, "depth": 3}}
EARS = {"audio_config": {"hidden_size": HIDDEN}}
VISUAL = {**tower("model.visual"), "model.visual.merger.linear_fc1.weight": (HIDDEN, HIDDEN)}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
POOLING = {
    "modules.json": json.dumps(
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
    ),
    "1_Pooling/config.json": '{"pooling_mode_lasttoken": true}',
}

STRUCTURES: dict[str, Structure] = {
    "dense": Structure(text("LlamaForCausalLM", "llama"), decoder()),
    "dense in float16": Structure(text("MistralForCausalLM", "mistral"), decoder(), dtype="F16"),
    "tied": Structure(text("Qwen3ForCausalLM", "qwen3", tie_word_embeddings=True), decoder(norms=True, head=None)),
    "tied, head saved too": Structure(text("Qwen3ForCausalLM", "qwen3", tie_word_embeddings=True), decoder(norms=True)),
    "buffers": Structure(
        text("LlamaForCausalLM", "llama"),
        decoder() | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (HEAD // 2,) for n in range(2)},
    ),
    "biases": Structure(
        text("Qwen2ForCausalLM", "qwen2"),
        decoder() | {f"model.layers.{n}.self_attn.q_proj.bias": (HEADS * HEAD,) for n in range(2)},
    ),
    "experts": Structure(text("Qwen3MoeForCausalLM", "qwen3_moe", **QWEN_MOE), decoder(feed=experts, norms=True)),
    "experts in one tensor": Structure(
        text("Qwen3MoeForCausalLM", "qwen3_moe", **QWEN_MOE), decoder(feed=joined_experts, norms=True)
    ),
    "fused experts": Structure(text("GptOssForCausalLM", "gpt_oss", num_local_experts=4), decoder(feed=fused_experts)),
    "hybrid": Structure(
        text("Qwen3NextForCausalLM", "qwen3_next", **QWEN_MOE) | {"num_hidden_layers": 4}, hybrid()
    ),
    "state space hybrid": Structure(
        text("BambaForCausalLM", "bamba", mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, attn_layer_indices=[1]),
        state_space_hybrid(),
    ),
    "sparse latent attention": Structure(
        text(
            "DeepseekV32ForCausalLM", "deepseek_v32", kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
            v_head_dim=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=INNER,
            first_k_dense_replace=0, topk_group=1, n_group=1, index_n_heads=4, index_head_dim=16, index_topk=64,
        ),
        sparse_latent(),
    ),
    "relative encoder": Structure(
        {
            "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": HIDDEN, "d_kv": HEAD, "num_heads": HEADS,
            "num_layers": 2, "d_ff": INNER, "vocab_size": VOCABULARY,
        },
        relative_encoder(),
        POOLING,
    ),
    "state space": Structure(text("Mamba2ForCausalLM", "mamba2"), mamba()),
    "drafting layer": Structure(
        text("Glm4MoeForCausalLM", "glm4_moe", num_nextn_predict_layers=1), decoder() | drafting("model.layers.2")
    ),
    "drafting head": Structure(
        text("Qwen3NextForCausalLM", "qwen3_next", **QWEN_MOE, mtp_num_hidden_layers=1) | {"num_hidden_layers": 4},
        hybrid() | own_drafting(),
    ),
    "drafting head promised": Structure(
        text("Glm4MoeForCausalLM", "glm4_moe", num_nextn_predict_layers=1), decoder()
    ),
    "gemma3": Structure(
        multimodal("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text", **EYES),
        decoder("language_model.model", head=None)
        | tower("vision_tower.vision_model", "encoder.layers")
        | {"multi_modal_projector.mm_input_projection_weight": (HIDDEN, HIDDEN)},
    ),
    "qwen3_vl": Structure(
        multimodal("Qwen3VLForConditionalGeneration", "qwen3_vl", "qwen3_vl_text", **EYES),
        decoder("model.language_model", norms=True) | VISUAL,
    ),
    "qwen3_5": Structure(
        multimodal("Qwen3_5ForConditionalGeneration", "qwen3_5", "qwen3_5_text", **EYES),
        decoder("model.language_model", norms=True) | VISUAL,
    ),
    "llama4": Structure(
        multimodal("Llama4ForConditionalGeneration", "llama4", "llama4_text", **EYES),
        decoder("language_model.model", head="language_model.lm_head.weight")
        | tower("vision_model", "model.layers")
        | {"multi_modal_projector.linear_1.weight": (HIDDEN, HIDDEN)},
    ),
    "mistral3": Structure(
        multimodal("Mistral3ForConditionalGeneration", "mistral3", "mistral", **EYES),
        decoder("language_model.model", head="language_model.lm_head.weight") | tower("vision_tower", "transformer.layers"),
    ),
    "vision promised": Structure(
        multimodal("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text", **EYES),
        decoder("language_model.model", head=None),
    ),
    "audio": Structure(
        multimodal("Qwen2AudioForConditionalGeneration", "qwen2_audio", "qwen2", **EARS),
        decoder("language_model.model", head="language_model.lm_head.weight")
        | tower("audio_tower", "layers")
        | {"multi_modal_projector.linear.weight": (HIDDEN, HIDDEN)},
    ),
    "eyes and ears": Structure(
        multimodal("Gemma3nForConditionalGeneration", "gemma3n", "gemma3n_text", **EYES, **EARS),
        decoder("model.language_model", head=None)
        | {"model.language_model.per_layer_model_projection.weight": (HIDDEN, HIDDEN)}
        | tower("model.vision_tower.timm_model")
        | tower("model.audio_tower", "conformer")
        | {
            "model.embed_vision.embedding_projection.weight": (HIDDEN, HIDDEN),
            "model.embed_audio.embedding_projection.weight": (HIDDEN, HIDDEN),
        },
    ),
    "voice": Structure(
        multimodal("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni_moe", "qwen3_moe", talker_config={"a": 1}),
        decoder("thinker.model", head="thinker.lm_head.weight") | decoder("talker.model", head="talker.codec_head.weight"),
    ),
    "embedding": Structure(text("Qwen3ForCausalLM", "qwen3", tie_word_embeddings=True), decoder(norms=True, head=None), POOLING),
    "encoder": Structure(text("BertModel", "bert"), encoder()),
    "reranker": Structure(
        text("Qwen3ForSequenceClassification", "qwen3", id2label={"0": "relevant"}), decoder(norms=True, head=None) | {"score.weight": (1, HIDDEN)}
    ),
    "classifier": Structure(
        text("LlamaForSequenceClassification", "llama", id2label={"0": "no", "1": "yes"}), decoder(head=None) | {"score.weight": (2, HIDDEN)}
    ),
    "extra files": Structure(
        text("LlamaForCausalLM", "llama"),
        decoder(),
        {
            "pytorch_model.bin": "pickle", "consolidated.00.pth": "pickle", "consolidated.safetensors": "x", "model.onnx": "x",
            "onnx/model.onnx": "x", "other-Q4_K_M.gguf": "x", "adapter_config.json": "{}", "adapter_model.safetensors": "x",
            "tf_model.h5": "x", "flax_model.msgpack": "x", "modeling_llama.py": "x", "preprocessor_config.json": "{}",
            ".gitattributes": "x", "notes.md": "x", "assets/logo.png": "x", "training_args.bin": "x", "vision.safetensors": "x",
            "trainer_state.json": "{}", "strange.dat": "x",
        },
    ),
    "already quantized": Structure(
        text("LlamaForCausalLM", "llama", quantization_config={"quant_method": "bitsandbytes"}), decoder()
    ),
    "a tensor nobody knows": Structure(
        text("LlamaForCausalLM", "llama"), decoder() | {"model.layers.0.secret.weight": (HIDDEN, HIDDEN)}
    ),
}  # fmt: skip


def write(name: str, folder: Path, shards: int = 1) -> Path:
    """Write a structure; with several ``shards``, their index."""
    structure = STRUCTURES[name]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", structure.config)
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    write_json(folder / "tokenizer.json", TOKENIZER)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    for file, content in structure.files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(content, encoding="utf-8")
    stored = [Stored(tensor, structure.dtype, shape) for tensor, shape in structure.tensors.items()]
    files = dict(_sharded(stored, shards))
    for file, held in files.items():
        head, _ = encode(held)
        with (folder / file).open("wb") as weights:
            weights.write(head)
            weights.truncate(len(head) + sum(tensor.bytes for tensor in held))
    if shards > 1:
        weight_map = {tensor.name: file for file, held in files.items() for tensor in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _sharded(stored: list[Stored], shards: int) -> Iterator[tuple[str, list[Stored]]]:
    if shards == 1:
        yield "model.safetensors", stored
        return
    for number in range(shards):
        yield f"model-{number + 1:05d}-of-{shards:05d}.safetensors", stored[number::shards]
