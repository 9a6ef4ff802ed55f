"""The method fp16: exact sizes, the source's values, files that load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import making
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantool import pipeline
from quantool.config.schema import Config
from quantool.errors import ConfigError, QuantizationError
from quantool.methods._llama_cpp import quantize
from quantool.methods._safetensors import cast
from quantool.records import Artifact, Plan
from quantool.runtime import process

pytestmark = pytest.mark.e2e

LEVELS = {"gguf": ["F16", "F32"], "safetensors": ["F16", "BF16", "F32"]}
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.fixture(scope="module", autouse=True)
def _cache() -> Iterator[None]:
    with making.own_cache():
        yield


@cache
def sharded() -> Path:
    """The small Llama in two shards, one tensor in float32, one of integers."""
    folder = making.room() / "sharded"
    shutil.copytree(making.model(making.SMALL), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    weight_map: dict[str, str] = {}
    for number, chosen in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in chosen}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@cache
def exported(form: str) -> tuple[Plan, list[Artifact]]:
    wanted = making.config(
        sharded(),
        making.room() / f"fp16-{form}",
        LEVELS[form],
        method="fp16",
        quantization_config={"format": form, "pre_tokenizer": None},
    )
    return making.make(wanted)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_files_have_the_planned_bytes(form: str) -> None:
    for output, artifact in zip(*(exported(form)[0].outputs, exported(form)[1]), strict=True):
        for file in output.files:
            assert (artifact.folder / file.name).stat().st_size == file.bytes, (output.id, file.name)
        recorded = {file.name: file.bytes for file in artifact.files}
        assert recorded.items() >= {file.name: file.bytes for file in output.files}.items()


@pytest.mark.parametrize("number", range(3))
def test_safetensors_hold_the_source_values(number: int) -> None:
    artifact = exported("safetensors")[1][number]
    dtype = DTYPES[artifact.level]
    found, source = weights(artifact.folder), weights(sharded())
    assert found.keys() == source.keys()
    assert all(tensor.dtype == dtype for tensor in found.values())
    assert all(torch.equal(found[name], source[name].to(dtype)) for name in found)
    assert artifact.bits_per_weight == {"F16": 16, "BF16": 16, "F32": 32}[artifact.level]
    saved = making.read_json(artifact.folder / "config.json")
    assert saved["dtype"] == str(dtype).removeprefix("torch.")


def test_safetensors_folder_loads_in_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported("safetensors")[1][0].folder
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert loaded[0].dtype == torch.float16
    assert not any(loaded[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(folder).chat_template
    index = making.read_json(folder / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == {f"model-{n:05}-of-00002.safetensors" for n in (1, 2)}


@pytest.mark.parametrize("number", range(2))
def test_gguf_holds_the_source_values(number: int, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    artifact = exported("gguf")[1][number]
    path = artifact.folder / artifact.files[0].name
    assert path.name == f"sharded-898K-{artifact.level}.gguf"
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert tensors["output.weight"].tensor_type.name == artifact.level
    dtype = DTYPES[artifact.level]
    for theirs, ours in (
        ("lm_head.weight", "output.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
    ):
        data = torch.from_numpy(dequantize(tensors[ours].data, tensors[ours].tensor_type).copy())
        assert torch.equal(data, weights(sharded())[theirs].to(dtype).float())
    request = {"path": str(path), "vocabulary_only": False}
    process.call(quantize.probe, request, log=tmp_path / "log")


def test_rerun_makes_nothing_again() -> None:
    for form in ("gguf", "safetensors"):
        made, artifacts = exported(form)
        before = {path: path.stat().st_mtime_ns for one in artifacts for path in one.folder.rglob("*")}
        wanted = making.config(
            sharded(), making.room() / f"fp16-{form}", LEVELS[form], method="fp16",
            quantization_config={"format": form, "pre_tokenizer": None},
        )  # fmt: skip
        _, machine = pipeline.plan_here(wanted, making.QUIET)
        assert {output.id for output in made.outputs} <= set(machine.done)
        assert making.make(wanted)[1] == artifacts
        assert {
            path: path.stat().st_mtime_ns for one in artifacts for path in one.folder.rglob("*")
        } == before


def test_split_export_is_as_planned_and_loads(tmp_path: Path) -> None:
    wanted = making.config(
        making.TINY, tmp_path / "out", "BF16", method="fp16", quantization_config={"max_shard_size": "3M"}
    )
    made, (artifact,) = making.make(wanted)
    planned = {file.name: file.bytes for file in made.outputs[0].files}
    assert len(planned) == 4
    assert {file.name: (artifact.folder / file.name).stat().st_size for file in artifact.files} == planned
    assert max(planned.values()) <= 3_000_000
    request = {"path": str(artifact.folder / artifact.files[0].name), "vocabulary_only": False}
    assert process.call(quantize.probe, request, log=tmp_path / "log")["tokens"] == 4096


def test_overflow_while_casting_names_the_tensor(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_file({"fine": torch.ones(2), "large": torch.full((2,), 1e6)}, tmp_path / "in" / "model.safetensors")
    request = {
        "source": str(tmp_path / "in"), "target": str(tmp_path / "out"), "files": ["model.safetensors"], "dtype": "F16",
    }  # fmt: skip
    with pytest.raises(QuantizationError, match="large overflows"):
        process.call(cast.cast, request, log=tmp_path / "log")


def test_formats_that_would_overwrite_each_other_are_refused(tmp_path: Path) -> None:
    entries = [{"method": "fp16", "quant_level": "F16"}, {"method": "gguf", "quant_level": "F16"}]
    options = {"quantization_config": {"pre_tokenizer": "qwen2"}}
    wanted = Config.model_validate(
        {
            "model_id": str(making.TINY),
            "output_path": tmp_path,
            "quantizations": [entry | options for entry in entries],
        }
    )
    with pytest.raises(ConfigError, match=r"fp16/F16 and gguf/F16 would both write"):
        pipeline.plan(wanted, making.QUIET)
