from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from quantool.errors import DependencyError
from quantool.formats.safetensors import check_index
from quantool.methods._compressed import stream
from quantool.records import Artifact, Plan
from quantool.runtime import process

COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "LICENSE",
)  # fmt: skip
Made = Callable[..., Artifact]
pytestmark = pytest.mark.e2e


def divergence(reference: Any, found: Any) -> float:
    """Mean Kullback-Leibler divergence in nats."""
    import torch

    p, q = torch.log_softmax(reference, -1), torch.log_softmax(found, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def dynamic(llama: Path, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return made(llama, tmp_path_factory.mktemp("fp8"), "fp8", "FP8_DYNAMIC")


@pytest.fixture(scope="module")
def upstream(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What llmcompressor's own model_free_ptq makes of the checkpoint."""

    def convert(level: str) -> Path:
        from llmcompressor.entrypoints.model_free import model_free_ptq

        folder = tmp_path_factory.mktemp("upstream") / level
        model_free_ptq(
            str(llama), str(folder), scheme=level, ignore=["lm_head", "model.embed_tokens"], device="cpu"
        )
        return folder

    return convert


def same_tensors(ours: Path, theirs: Path) -> None:
    import torch

    for shard in sorted(path.name for path in theirs.glob("*.safetensors")):
        expected, found = load_file(theirs / shard), load_file(ours / shard)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype, name
            assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name


def test_the_streamed_tensors_are_those_of_model_free_ptq(
    dynamic: Artifact, upstream: Callable[[str], Path]
) -> None:
    same_tensors(dynamic.folder, upstream("FP8_DYNAMIC"))


def test_slices_and_blocks_give_the_same_bytes_as_whole_shards(
    llama: Path, upstream: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import asdict

    from quantool.methods._compressed.schemes import FP8, select

    monkeypatch.setattr(stream, "SLICE", 1 << 16)  # 128 rows a slice
    chosen = select(check_index(llama), ["Linear"], None, tied=False)
    request = {
        "source": str(llama),
        "output": str(tmp_path),
        "shards": sorted(path.name for path in llama.glob("*.safetensors")),
        "layers": [layer.name for layer in chosen.layers],
        "head": [],
        "scheme": asdict(FP8["FP8_BLOCK"]),
        "targets": ["Linear"],
        "ignore": list(chosen.ignore),
        "workers": 2,
        "device": "cpu",
    }
    seen: list[tuple[float, float]] = []
    stream.quantize(request, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(tensor.bytes for tensor in check_index(llama).values())
    same_tensors(tmp_path, upstream("FP8_BLOCK"))


def test_the_folder_is_complete_and_has_the_planned_sizes(
    llama: Path, dynamic: Artifact, planned: Callable[..., Plan]
) -> None:
    for name in COMPANIONS:
        assert (dynamic.folder / name).read_bytes() == (llama / name).read_bytes(), name
    (output,) = planned(llama, dynamic.folder.parent, "fp8", "FP8_DYNAMIC").outputs
    sizes = {file.name: file.bytes for file in dynamic.files}
    inexact = {file.name for file in output.files if sizes[file.name] != file.bytes}
    assert inexact <= {"config.json"}
    assert {file.name for file in output.files} == sizes.keys()
    assert dynamic.bits_per_weight == output.bits_per_weight
    assert dynamic.folder.name == "toy-llama-FP8-dynamic"


def test_config_is_the_sources_with_the_quantization(llama: Path, dynamic: Artifact) -> None:
    saved = json.loads((dynamic.folder / "config.json").read_text())
    quantization = saved.pop("quantization_config")
    assert saved == json.loads((llama / "config.json").read_text())
    (group,) = quantization["config_groups"].values()
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "float-quantized")
    assert (group["weights"]["strategy"], group["input_activations"]["dynamic"]) == ("channel", True)
    assert quantization["ignore"] == ["lm_head"]


def test_transformers_loads_it_and_it_answers_alike(
    llama: Path, dynamic: Artifact, logits: Callable[[Path], Any]
) -> None:
    assert divergence(logits(llama), logits(dynamic.folder)) < 0.01


def test_a_finished_level_is_not_made_again(
    llama: Path, dynamic: Artifact, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "call", None)
    assert (
        made(llama, dynamic.folder.parent, "fp8", "FP8_DYNAMIC", quantization_config={"workers": 1})
        == dynamic
    )
    with pytest.raises(TypeError):  # another ignore list is other work
        made(
            llama,
            dynamic.folder.parent,
            "fp8",
            "FP8_DYNAMIC",
            quantization_config={"ignore": ["re:.*o_proj$"]},
        )


def test_experts_are_quantized_and_routers_are_not(moe: Path, made: Made, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    artifact = made(moe, tmp_path, "fp8", "FP8_DYNAMIC")
    found = check_index(artifact.folder)
    assert found["model.layers.0.mlp.experts.7.down_proj.weight"].dtype == "F8_E4M3"
    assert found["model.layers.0.mlp.gate.weight"].dtype == "BF16"
    assert artifact.details["ignored"] == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    # Logits are no measure here: a rounded activation sends a token of this random model to other experts.
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (moe, artifact.folder)]
    expected, loaded = (model.model.layers[0].mlp.experts.down_proj.detach().float() for model in models)
    assert 0 < float((expected - loaded).norm() / expected.norm()) < 0.04


@pytest.mark.parametrize(("cache", "strategy"), [("fp8", "tensor"), ("fp8_head", "attn_head")])
def test_static_scales_and_the_attention_cache_are_calibrated(
    cache: str,
    strategy: str,
    llama: Path,
    made: Made,
    planned: Callable[..., Plan],
    tmp_path: Path,
    logits: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quantool.methods._compressed.sizes.SHARD_BYTES", 400_000)
    options = {"kv_cache": cache}
    artifact = made(llama, tmp_path, "fp8", "FP8", quantization_config=options)
    (output,) = planned(
        llama, tmp_path, "fp8", "FP8", quantization_config=options, dataset_id="python-docs"
    ).outputs
    sizes = {file.name: file.bytes for file in artifact.files}
    assert sizes.keys() - {file.name for file in output.files} == {"recipe.yaml"}
    weights = {file.name: file.bytes for file in output.files if "safetensors" in file.name}
    assert len(weights) > 3
    assert {name: sizes[name] for name in weights} == weights  # shards and index, as planned
    found = check_index(artifact.folder)
    heads = json.loads((llama / "config.json").read_text())["num_key_value_heads"]
    assert heads > 1
    shape = (1,) if strategy == "tensor" else (heads, 1, 1)
    assert found["model.layers.1.self_attn.k_scale"].shape == shape
    assert found["model.layers.1.mlp.down_proj.input_scale"].shape == (1,)
    saved = json.loads((artifact.folder / "config.json").read_text())["quantization_config"]
    assert saved["kv_cache_scheme"]["num_bits"] == 8
    assert saved["kv_cache_scheme"]["strategy"] == strategy
    assert divergence(logits(llama), logits(artifact.folder)) < 0.05
    assert artifact.details["samples"] == 4


def test_out_of_memory_says_what_to_lower(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import asdict

    import torch

    from quantool.methods._compressed.schemes import FP8

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr(stream._CheckpointWriter, "convert", fail)
    request = {
        "source": str(llama),
        "output": str(tmp_path),
        "shards": ["model-00001-of-00003.safetensors"],
        "layers": [],
        "head": [],
        "scheme": asdict(FP8["FP8_DYNAMIC"]),
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        "workers": 2,
        "device": "cpu",
    }
    with pytest.raises(DependencyError, match=r"Tried to allocate 2\.00 GiB") as error:
        stream.quantize(request, lambda done, total: None)
    assert "workers (now 2)" in error.value.hint


def test_making_it_again_leaves_what_is_not_ours(llama: Path, made: Made, tmp_path: Path) -> None:
    """T3: a file and a folder of the user's beside the artifact, and another source."""
    source = tmp_path / "toy-llama"
    shutil.copytree(llama, source)
    artifact = made(source, tmp_path / "out", "fp8", "FP8_DYNAMIC")
    (artifact.folder / "notes.txt").write_text("mine")
    (artifact.folder / "mine").mkdir()
    (artifact.folder / "mine" / "data.bin").write_bytes(b"mine")
    (source / "LICENSE").write_text("Do as you please.\n")
    again = made(source, tmp_path / "out", "fp8", "FP8_DYNAMIC")
    assert (artifact.folder / "notes.txt").read_text() == "mine"
    assert (artifact.folder / "mine" / "data.bin").read_bytes() == b"mine"
    assert (artifact.folder / "LICENSE").read_text() == "Do as you please.\n"
    assert {file.name for file in again.files} == {file.name for file in artifact.files}
