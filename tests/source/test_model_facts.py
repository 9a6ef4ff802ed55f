from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import SourceError
from quantool.formats.safetensors import check_index
from quantool.records import ModelFacts
from quantool.source.class_defaults import class_defaults
from quantool.source.model_facts import model_facts, read_configuration, special_tokens
from tests.checkpoint import CONFIG, TOKENIZER, write_checkpoint, write_json


def facts(
    folder: Path, generation: dict[str, Any] | None = None, **config: Any
) -> tuple[ModelFacts, list[str]]:
    write_checkpoint(folder, **config)
    found, _ = read_configuration(folder, trust_remote_code=False)
    return model_facts(found, generation or {}, folder, check_index(folder))


def test_facts_of_a_plain_model(tmp_path: Path) -> None:
    found, notes = facts(tmp_path, {"eos_token_id": [2, 0]})
    assert found.architecture == "LlamaForCausalLM"
    assert found.parameters == 32 * 8 * 2 + 64 + 8
    assert (found.dtype, found.largest_tensor) == ("F16", 512)
    assert (found.vocabulary, found.context, found.layers, found.hidden) == (32, 64, 2, 8)
    assert (found.heads, found.kv_heads, found.head_size) == (4, 2, 2)
    assert (found.bos_token_id, found.eos_token_ids) == (1, (2, 0))
    assert (found.sliding_window, found.tied_embeddings, found.has_sentencepiece) == (None, False, False)
    assert notes == []


def test_an_answer_that_would_not_stop_is_noted(tmp_path: Path) -> None:
    _, notes = facts(tmp_path, eos_token_id=0)
    assert len(notes) == 1
    assert "<|im_end|> (2)" in notes[0]
    assert "[0]" in notes[0]


def test_special_tokens_of_an_older_tokenizer_config(tmp_path: Path) -> None:
    assert special_tokens(tmp_path, {"added_tokens_decoder": {"7": {"content": "<e>"}}}) == {"<e>": 7}
    write_json(tmp_path / "tokenizer.json", TOKENIZER)
    assert special_tokens(tmp_path, {}) == {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [1]}')
    with pytest.raises(SourceError, match="added_tokens"):
        special_tokens(tmp_path, {})


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"sliding_window": 16}, 16),
        ({"sliding_window": 64}, None),  # as long as the context
        ({"sliding_window": 16, "use_sliding_window": False}, None),
        ({"sliding_window": 16, "layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}, 16),
        (
            {"model_type": "mistral", "max_position_embeddings": 8192},
            4096,
        ),  # the class has it, config.json not
        ({"model_type": "qwen2", "sliding_window": 16}, None),  # the class switches it off
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, None),  # from layer 28 on
        (
            {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            16,
        ),
    ],
)
def test_a_sliding_window_counts_only_where_it_is_active(
    tmp_path: Path, config: dict[str, Any], window: int | None
) -> None:
    assert facts(tmp_path, **config)[0].sliding_window == window


def test_a_multimodal_model_is_described_by_its_text_part(tmp_path: Path) -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "max_position_embeddings": 32,
    }
    gone: dict[str, Any] = dict.fromkeys(CONFIG)
    found, _ = facts(
        tmp_path,
        **{
            **gone,
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": text,
        },
    )
    assert (found.hidden, found.layers, found.context) == (16, 3, 32)
    assert (found.heads, found.kv_heads, found.head_size) == (8, 4, 256)  # from the class
    assert found.tied_embeddings


def test_names_that_a_class_maps_are_understood(tmp_path: Path) -> None:
    gone: dict[str, Any] = dict.fromkeys(CONFIG)
    names = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16, "vocab_size": 32}
    found, _ = facts(
        tmp_path, **{**gone, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **names}
    )
    assert (found.hidden, found.heads, found.layers, found.context) == (8, 2, 1, 16)
    assert found.tied_embeddings


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gpt2", "phi3"]
)
@pytest.mark.e2e
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[model_type]()
    found = class_defaults(model_type)
    assert found is not None
    for key in (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "tie_word_embeddings",
    ):
        name = found.get("attribute_map", {}).get(key, key)
        assert found[name] == getattr(made, key), key


@pytest.mark.parametrize(
    ("config", "said", "hint"),
    [
        ({"model_type": None}, "names no model_type", ""),
        ({"model_type": "lama"}, "unknown model type 'lama'", "llama"),
        ({"model_type": "../x"}, "unknown model type", ""),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "already quantized .*bitsandbytes",
            "bf16",
        ),
        (
            {"text_config": {"quantization_config": {"quant_method": "quark"}}},
            "already quantized .*quark",
            "bf16",
        ),
        ({"text_config": [1]}, "text_config is not an object", ""),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
            "auto_map: model type 'own'",
            "trust_remote_code",
        ),
        ({"architectures": None}, "names no architecture", ""),
        ({"vocab_size": "many"}, "vocab_size is 'many'", ""),
        ({"num_attention_heads": 0}, "num_attention_heads is 0", ""),
        ({"num_attention_heads": True}, "num_attention_heads is True", ""),
        ({"vocab_size": 10**30}, f"vocab_size is {10**30}, expected", ""),
        (
            {"architectures": ["T5EncoderModel"], "model_type": "t5", "max_position_embeddings": None},
            "max_position_embeddings is None, expected",
            "a model of type t5 keeps it elsewhere",
        ),
        ({"num_key_value_heads": "abc"}, "num_key_value_heads is 'abc', expected a positive integer", ""),
        ({"head_dim": [1]}, r"head_dim is \[1\], expected", ""),
        ({"sliding_window": "abc"}, "sliding_window is 'abc', expected", ""),
        ({"layer_types": 0}, "layer_types is 0, expected a list", ""),
        (
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": "a"},
            "max_window_layers is 'a'",
            "",
        ),
        (
            {"eos_token_id": 32},
            "eos_token_id is 32, but the vocabulary has the ids 0 to 31",
            "vocab_size in ",
        ),
        ({"eos_token_id": [2, -1]}, "eos_token_id is -1, but the vocabulary", "vocab_size in "),
        ({"eos_token_id": "2"}, "eos_token_id is '2', expected a token id or a list", ""),
        ({"eos_token_id": [[2]]}, r"eos_token_id is \[2\], expected a token id", ""),
        ({"eos_token_id": True}, "eos_token_id is True, expected", ""),
        ({"bos_token_id": {}}, "bos_token_id is {}, expected", ""),
        ({"model_type": "x" * 10**6}, "unknown model type 'xxx", ""),
        ({"architectures": ["a\nb"]}, "names no architecture", ""),
        ({"quantization_config": "x" * 10**6}, "already quantized", "bf16"),
    ],
)
def test_a_configuration_that_cannot_be_used(
    tmp_path: Path, config: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(SourceError, match=said) as caught:
        facts(tmp_path, **config)
    assert "config.json" in caught.value.message
    assert hint in caught.value.hint


def test_an_end_of_sequence_outside_the_vocabulary_is_found_in_either_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"generation_config\.json: eos_token_id is 99, but the vocabulary"):
        facts(tmp_path, {"eos_token_id": [2, 99]})


@pytest.mark.parametrize(
    ("tokenizer", "config", "said"),
    [
        (b'{"added_tokens": [1]}', {}, r"tokenizer\.json: added_tokens: 1 is no token"),
        (b'{"added_tokens": [[[[]]]]}', {}, r"tokenizer\.json: added_tokens: \[\[\[\]\]\] is no token"),
        (b'{"added_tokens": [{"id": "a", "content": "b"}]}', {}, "is no token"),
        (b'{"added_tokens": [{"id": 1, "content": [1]}]}', {}, "is no token"),
        (b'{"added_tokens": [', {}, "added_tokens is not a list"),
        (b'{"added_tokens": "\xff"}', {}, r"tokenizer\.json: not UTF-8"),
        (b'{"added_tokens": ' + b"[" * 5000, {}, r"tokenizer\.json: nested more than 64 deep"),
        (
            None,
            {"added_tokens_decoder": [1]},
            r"tokenizer_config\.json: added_tokens_decoder is \[1\], expected an object",
        ),
        (
            b'{"added_tokens": []}',
            {"added_tokens_decoder": [1]},
            r"tokenizer_config\.json: added_tokens_decoder",
        ),
        (None, {"added_tokens_decoder": {"x": {"content": "a"}}}, "is no token"),
        (None, {"added_tokens_decoder": {"1": "a"}}, "'a' is no token"),
    ],
)
def test_added_tokens_of_the_wrong_shape(
    tmp_path: Path, tokenizer: bytes | None, config: dict[str, Any], said: str
) -> None:
    if tokenizer is not None:
        (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    with pytest.raises(SourceError, match=said):
        special_tokens(tmp_path, config)


def test_code_of_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, auto_map={"AutoConfig": "x.X"})
    assert "not used" in read_configuration(tmp_path, trust_remote_code=False)[1][0]
    write_checkpoint(tmp_path, model_type="own", auto_map={"AutoConfig": "x.X"})
    assert read_configuration(tmp_path, trust_remote_code=True)[1] == []


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 10**20)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["llama", "gemma3_text"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["id", "content", "model_type", "hidden_size"]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = st.sampled_from(
    [*CONFIG, "head_dim", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "text_config", "auto_map",
     "quantization_config", "attribute_map"]
)  # fmt: skip


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), st.booleans())
def test_any_configuration_has_facts_or_a_source_error(config: dict[str, Any], windowed: bool) -> None:
    sliding = {"sliding_window": 16, "use_sliding_window": True} if windowed else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(SourceError):
        found, _ = facts(Path(folder), {"eos_token_id": config.get("eos_token_id")}, **{**sliding, **config})
        assert found.vocabulary > max(found.eos_token_ids, default=0) or "eos_token_id" not in config
        found.model_dump_json()


@settings(derandomize=True, max_examples=100, deadline=None)
@given(VALUES, VALUES)
def test_any_list_of_added_tokens_is_read_or_a_source_error(listed: Any, decoder: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(SourceError):
            special_tokens(Path(folder), {"added_tokens_decoder": decoder})
        (Path(folder) / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}), encoding="utf-8")
        with contextlib.suppress(SourceError):
            special_tokens(Path(folder), {})
