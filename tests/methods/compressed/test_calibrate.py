from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from quantool.errors import ConfigError, DependencyError, QuantizationError, QuantoolError
from quantool.methods._compressed import calibrate, torch_setup

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB.\nand much more"


def quiet(done: float, total: float) -> None:
    """Take progress reports."""


def request(checkpoint: Path, text: Path, **changes: Any) -> dict[str, Any]:
    config = {"model_id": str(checkpoint), "method": "gptq", "dataset_path": str(text), "sample_size": 7}
    return {
        "source": str(checkpoint),
        "output": str(text.parent / "out"),
        "config": {**config, "trust_remote_code": False},
        "max_seq_length": 40,
        "device": "auto",
        "seed": 1,
        **changes,
    }


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("el gat dorm a la cadira " * 30, encoding="utf-8")
    return path


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("failure", "kind", "said", "hint"),
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            DependencyError,
            "Tried to allocate 2.00 GiB",
            r"max_seq_length \(now 40\)",
        ),
        (MemoryError(), QuantizationError, "out of memory", r"sample_size \(now [1-7]\)"),
    ],
    ids=["cuda", "host"],
)
def test_out_of_memory_says_what_to_lower(
    llama: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    kind: type[QuantoolError],
    said: str,
    hint: str,
) -> None:
    def fail(*args: object) -> None:
        raise failure

    monkeypatch.setattr(calibrate, "_run", fail)
    monkeypatch.setattr(calibrate, "repair_libraries", lambda: None)
    with pytest.raises(kind, match=said) as error:
        calibrate.quantize(request(llama, text), quiet)
    assert re.search(hint, error.value.hint)


def test_a_long_text_becomes_several_samples_with_bos(llama: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    samples = calibrate.calibration_samples(request(llama, text), tokenizer)
    assert len(samples) > 2
    assert {len(sample) for sample in samples[:-1]} == {40}
    assert all(sample.count(tokenizer.bos_token_id) == 1 for sample in samples)
    joined = [token for sample in samples for token in sample[1:]]
    whole = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    assert joined == whole[: len(joined)]


def test_samples_are_limited_and_keep_the_mix_of_documents(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "two.jsonl"
    lines = [{"text": "el gat dorm a la cadira " * 30}, {"text": "etxe zuri bat"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    asked = request(llama, path)
    asked["config"] |= {"shuffle": False, "sample_size": 3}
    long, short, more = calibrate.calibration_samples(asked, tokenizer)
    assert (len(long), len(more)) == (40, 40)
    assert str(tokenizer.decode(short, skip_special_tokens=True)).strip() == "etxe zuri bat"
    asked["config"] |= {"calibration_config": {"max_tokens": 41}}
    assert len(calibrate.calibration_samples(asked, tokenizer)) == 2


def test_a_conversation_gets_one_bos_from_its_template(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hola"}]}\n', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    (sample,) = calibrate.calibration_samples(request(llama, path), tokenizer)
    assert sample[0] == tokenizer.bos_token_id
    assert sample.count(tokenizer.bos_token_id) == 1


def test_text_of_less_than_two_tokens_is_refused(qwen3: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="no document of two tokens"):
        calibrate.calibration_samples(request(qwen3, path), AutoTokenizer.from_pretrained(qwen3))


def test_mappings_that_fit_no_layer_are_an_error() -> None:
    model: Any = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4), "q_proj": torch.nn.Linear(4, 4)})
    calibrate._require_match(model, [("re:.*norm$", ["re:.*q_proj$"])])
    with pytest.raises(QuantizationError, match="no AWQ mapping fits ModuleDict"):
        calibrate._require_match(model, [("re:.*norm$", ["re:.*qkv_proj$"])])


def test_a_cpu_build_of_torch_with_device_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DependencyError, match="torch sees no CUDA device"):
        torch_setup.choose_device("cuda")
    assert torch_setup.choose_device("auto") == "cpu"


def test_config_without_quantization_is_an_error(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(QuantizationError, match="without quantization_config"):
        torch_setup.write_config(llama, tmp_path)


def test_what_float32_computed_is_written_as_planned(tmp_path: Path) -> None:
    """Scales have their written value before the weights are rounded for them; a float32 that was planned stays."""
    from safetensors.torch import load_file, save_file

    model: Any = torch.nn.Linear(2, 2, bias=False)
    model.register_parameter("weight_scale", torch.nn.Parameter(torch.tensor([0.1, 0.3])))
    calibrate._round_scales(model, torch.bfloat16)
    assert model.weight_scale.dtype == torch.float32
    assert torch.equal(model.weight_scale.to(torch.bfloat16).float(), model.weight_scale)
    planned = {"scale": "BF16", "router": "F32", "half": "F16", "packed": "I32"}
    tensors = {name: torch.full((2,), 0.1) for name in planned} | {"packed": torch.ones(2, dtype=torch.int32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    calibrate._narrow(tmp_path, planned)
    found = load_file(tmp_path / "model.safetensors")
    assert {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in found.items()} == {
        "scale": "bfloat16",
        "router": "float32",
        "half": "float16",
        "packed": "int32",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
