"""The random models of tests/models/structures.py are what they say they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import structures
from safetensors import safe_open

WRITERS = {
    "spm_llama": (structures.write_spm_llama, "LlamaForCausalLM", "LlamaTokenizer"),
    "qwen3": (structures.write_qwen3, "Qwen3ForCausalLM", "Qwen2Tokenizer"),
    "gemma3": (structures.write_gemma3, "Gemma3ForCausalLM", "GemmaTokenizer"),
    "moe": (structures.write_moe, "Qwen3MoeForCausalLM", "Qwen2Tokenizer"),
    "sliding_mistral": (structures.write_sliding_mistral, "MistralForCausalLM", "TokenizersBackend"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("structures")
    return {name: writer(root / name) for name, (writer, _, _) in WRITERS.items()}


def config(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return read


@pytest.mark.parametrize("name", WRITERS)
def test_loads_in_transformers_and_answers(folders: dict[str, Path], name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, architecture, tokenizer_class = WRITERS[name]
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    loaded: Any = AutoModelForCausalLM.from_pretrained(folders[name], output_loading_info=True)
    model, info = loaded
    assert config(folders[name])["architectures"] == [architecture]
    assert type(tokenizer).__name__ == tokenizer_class
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(tokenizer) <= model.config.vocab_size
    ids: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hola"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert torch.isfinite(model(**ids).logits).all()


@pytest.mark.parametrize("name", WRITERS)
def test_weights_are_bf16_with_rows_that_k_quants_take(folders: dict[str, Path], name: str) -> None:
    with safe_open(folders[name] / "model.safetensors", framework="np") as weights:
        slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118
        assert {piece.get_dtype() for piece in slices.values()} == {"BF16"}
        rows = {key: piece.get_shape()[-1] for key, piece in slices.items() if len(piece.get_shape()) > 1}
    assert all(row % 256 == 0 for row in rows.values()), rows


@pytest.mark.parametrize("name", ["spm_llama", "gemma3"])
def test_sentencepiece_and_tokenizer_json_agree(folders: dict[str, Path], name: str) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    pieces = sentencepiece.SentencePieceProcessor(str(folders[name] / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    for line in structures.text(50):
        assert tokenizer(line, add_special_tokens=False)["input_ids"] == pieces.encode(line)


def test_spm_llama_prints_its_bos_and_adds_it_too(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["spm_llama"])
    chat: Any = tokenizer.apply_chat_template([{"role": "user", "content": "hola"}], tokenize=False)
    assert chat.startswith("<s><|im_start|>user\n")
    assert tokenizer("hola")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [4]


def test_qwen3_is_tied_padded_and_normalized(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    with safe_open(folders["qwen3"] / "model.safetensors", framework="np") as weights:
        names = set(weights.keys())
    assert "lm_head.weight" not in names
    assert "model.layers.0.self_attn.q_norm.weight" in names
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen3"])
    assert config(folders["qwen3"])["vocab_size"] > len(tokenizer)
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"]
    silent: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert silent.endswith("<think>\n\n</think>\n\n")


def test_windows(folders: dict[str, Path]) -> None:
    gemma = config(folders["gemma3"])
    assert gemma["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    mistral = config(folders["sliding_mistral"])
    assert mistral["sliding_window"] < mistral["max_position_embeddings"]


def test_moe_routes_to_two_of_eight(folders: dict[str, Path]) -> None:
    moe = config(folders["moe"])
    assert (moe["num_local_experts"], moe["num_experts_per_tok"]) == (8, 2)


def test_same_bytes_every_time(folders: dict[str, Path], tmp_path: Path) -> None:
    again = structures.write_spm_llama(tmp_path / "again")
    names = sorted(path.name for path in again.iterdir())
    assert names == sorted(path.name for path in folders["spm_llama"].iterdir())
    for name in names:
        assert (again / name).read_bytes() == (folders["spm_llama"] / name).read_bytes(), name
