"""config.json against the weights: both numbers in one line, and no sound checkpoint refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import structures

from quantool.config.schema import Config
from quantool.errors import SourceError
from quantool.formats.safetensors import TensorHeader
from quantool.records import Source
from quantool.runtime.progress import Progress
from quantool.source import shapes
from quantool.source.resolve import resolve
from quantool.source.shapes import CONFORMING, check_config_shapes
from quantool.source.tensor_headers import headers

TINY = Path(structures.__file__).parent / "tiny-chat"


def source(folder: Path, **keys: Any) -> Source:
    wanted = Config.model_validate(
        {"model_id": str(folder), "output_path": "never", "method": "fp16", "quant_level": "F16", **keys}
    )
    return resolve(wanted, weights=True, progress=Progress(quiet=True))


def changed(folder: Path, **keys: Any) -> Path:
    """tiny-chat with other numbers in config.json; None drops a key."""
    shutil.copytree(TINY, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vocab_size": 4092}, "config.json: vocab_size 4092, but model.embed_tokens.weight has 4096 rows"),
        ({"vocab_size": 8192}, "config.json: vocab_size 8192, but model.embed_tokens.weight has 4096 rows"),
        ({"hidden_size": 512}, "config.json: hidden_size 512, but model.embed_tokens.weight has 256 columns"),
        (
            {"num_attention_heads": 7},
            "config.json: num_attention_heads 7 of 64 make 448, but model.layers.0.self_attn.q_proj.weight has 256 rows",
        ),
        (
            {"num_attention_heads": 7, "head_dim": None},
            "config.json: num_attention_heads 7 of 36 make 252, but model.layers.0.self_attn.q_proj.weight has 256 rows",
        ),
        (
            {"num_key_value_heads": 4},
            "config.json: num_key_value_heads 4 of 64 make 256, but model.layers.0.self_attn.k_proj.weight has 128 rows",
        ),
        (
            {"intermediate_size": -1},
            "config.json: intermediate_size -1, but model.layers.0.mlp.gate_proj.weight has 768 rows",
        ),
        ({"num_hidden_layers": 5}, "config.json: num_hidden_layers 5, but the weights have 4 layers"),
    ],
)
def test_both_numbers_are_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    found = source(changed(tmp_path / "model", **keys))
    with pytest.raises(SourceError) as caught:
        check_config_shapes(found, headers(found))
    assert caught.value.message == message
    assert "different models" in caught.value.hint or "layers" in message


def test_what_nothing_is_known_of_is_left_to_the_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = source(changed(tmp_path / "model", vocab_size=4092))
    monkeypatch.setattr(shapes, "CONFORMING", frozenset())
    check_config_shapes(found, headers(found))


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", ["write_spm_llama", "write_qwen3", "write_moe", "write_gemma3", "write_sliding_mistral"]
)
def test_sound_checkpoints_pass(tmp_path: Path, name: str) -> None:
    found = source(getattr(structures, name)(tmp_path / "model"))
    assert found.facts.model_type in CONFORMING
    check_config_shapes(found, headers(found))


def test_tiny_chat_passes() -> None:
    found = source(TINY)
    check_config_shapes(found, headers(found))


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")
def test_transformers_builds_these_types_as_it_is_said_here(tmp_path: Path) -> None:
    """Every type of the list, without weights: the tensors that exist have the shapes that config.json promises."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = source(TINY)
    build: Any = AutoModelForCausalLM.from_config
    for model_type in sorted(CONFORMING):
        config = AutoConfig.for_model(
            model_type, vocab_size=500, hidden_size=128, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, head_dim=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
        )  # fmt: skip
        with torch.device("meta"):
            model = build(config)
        found = {
            name: TensorHeader(name, "BF16", tuple(value.shape), "model.safetensors", 0, 0)
            for name, value in model.state_dict().items()
        }
        assert shapes.EMBEDDING in found, model_type
        numbers = {"vocabulary": 500, "hidden": 128, "heads": 4, "kv_heads": 2, "head_size": 40, "layers": 2}
        facts = plain.facts.model_copy(update={"model_type": model_type, **numbers})
        (tmp_path / "config.json").write_text('{"intermediate_size": 160}')
        check_config_shapes(plain.model_copy(update={"facts": facts, "folder": tmp_path}), found)
