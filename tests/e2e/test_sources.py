"""Checkpoints that are quantized already, and adapters, go the whole way; a wrong merge is found by somebody who has the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import adapters
import making
import pytest
import quantized_sources

from quantool.formats.gguf_header import read_header
from quantool.formats.safetensors import check_index
from quantool.runtime.llama_cpp import LlamaLog
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.llama_cpp import load_weights
from tests.e2e.conftest import DOCS, WIDE, Run, write

pytestmark = pytest.mark.e2e
VALIDATION: dict[str, Any] = {
    "max_tokens": 1024, "context": 128, "corpora": [DOCS], "checks": ["tokenizer", "integrity", "perplexity"],
}  # fmt: skip


def run_of(folder: Path, cache: Path, model: Path, **validation: Any) -> Run:
    """The configuration of one level, without a name for the pre-tokenizer."""
    settings = {
        "model_id": str(model),
        "method": "gguf",
        "quant_level": "Q8_0",
        "validation": VALIDATION | validation,
    }
    return Run(write(folder, "job", **settings), cache)


def with_digits(folder: Path, digits: str, *, ignore_merges: bool) -> Path:
    """The chat model with another expression for runs of digits."""
    shutil.copytree(making.TINY, folder)
    path = folder / "tokenizer.json"
    saved = making.read_json(path)
    split = saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r"|\p{N}|", f"|{digits}|")
    saved["model"]["ignore_merges"] = ignore_merges
    path.write_text(json.dumps(saved), encoding="utf-8")
    settings = making.read_json(folder / "tokenizer_config.json")
    settings["tokenizer_class"] = (
        "PreTrainedTokenizerFast"  # a class of its own may replace the steps by its own
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "digits", "ignore_merges"), [("qwen2", r"\p{N}", False), ("llama-bpe", r"\p{N}{1,3}", True)]
)
def test_unknown_vocabulary_with_known_steps_passes(
    name: str, digits: str, ignore_merges: bool, cache: Path, tmp_path: Path
) -> None:
    model = with_digits(tmp_path / "model", digits, ignore_merges=ignore_merges)
    ended = run_of(tmp_path, cache, model, checks=["tokenizer"]).finish()
    assert ended.code == 0, ended.err
    assert f"pre-tokenizer {name}: llama.cpp's converter does not know this vocabulary" in ended.err
    (report,) = making.read_json(tmp_path / "job" / "report.json")["reports"]
    assert {finding["verdict"] for finding in report["findings"]} == {"PASS"}


def test_steps_that_differ_by_a_character_end_the_plan(cache: Path, tmp_path: Path) -> None:
    model = with_digits(tmp_path / "model", r"\p{N}{1,4}", ignore_merges=True)
    ended = run_of(tmp_path, cache, model).finish(command="plan")
    assert ended.code == 2
    assert "quantization_config.pre_tokenizer" in ended.err


@pytest.mark.parametrize("form", ["FP8 channel", "INT4 asymmetric"])
def test_quantized_checkpoint_is_quantized_again(form: str, cache: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    quantized_sources.write(form, making.TINY, model)
    run = run_of(tmp_path, cache, model, gates=WIDE)
    ended = run.finish()
    assert ended.code == 0, ended.err
    said = (
        f"uantized again from {form[:4].strip()} (compressed-tensors): the reference is the dequantized model"
    )
    assert said in ended.err
    assert said in (run.output / "report.md").read_text()
    assert said in (run.folder / "README.md").read_text()
    assert str(tmp_path) not in (run.folder / "quantool.json").read_text()
    prepared = run.output / ".quantool" / "work" / "prepared" / "model.safetensors"
    written = prepared.stat().st_mtime_ns
    again = run.finish()
    assert (again.code, again.stages) == (0, [])
    assert prepared.stat().st_mtime_ns == written


def test_part_that_is_lost_ends_the_plan(cache: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    quantized_sources.write("DeepSeek FP8", making.TINY, model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ended = run_of(tmp_path, cache, model).finish(command="plan")
    assert ended.code == 2
    assert "model.layers.1.mlp.up_proj.weight_scale" in ended.err


def test_merged_adapter_passes_and_one_of_another_scale_does_not(cache: Path, tmp_path: Path) -> None:
    layers = {
        name: tensor.shape
        for name, tensor in check_index(making.TINY).items()
        if name.endswith(("q_proj.weight", "down_proj.weight"))
    }
    for name, alpha in (("lora", 16), ("doubled", 32)):
        adapters.write(
            tmp_path / name,
            layers,  # type: ignore[arg-type]
            size=0.05,
            base_model_name_or_path=str(making.TINY),
            lora_alpha=alpha,
        )
    run = run_of(tmp_path, cache, tmp_path / "lora")
    ended = run.finish()
    assert ended.code == 0, ended.err
    assert "adapter lora (rank 4 times 4 added to 8 weights) merged into tiny-chat" in ended.err
    (artifact,) = run.folder.glob("*.gguf")
    words = (str(artifact), "--reference", str(tmp_path / "doubled"), "--config", str(run.file))
    from tests.e2e.conftest import quantool

    with quantool("validate", *words, "--output", str(tmp_path / "judged"), cache=cache) as child:
        _, err = child.communicate()
    assert child.returncode == 5, err
    assert "mean_kld" in err


def test_adapter_beside_its_base_is_judged_as_the_merged_model(cache: Path, tmp_path: Path) -> None:
    """``merge: false``: the base's files pass with the adapter, and with an empty or a lost one they do not."""
    layers = {
        name: tensor.shape
        for name, tensor in check_index(making.TINY).items()
        if name.endswith(("q_proj.weight", "down_proj.weight"))
    }
    settings = {"base_model_name_or_path": str(making.TINY), "use_rslora": True}
    adapters.write(tmp_path / "tuned", layers, size=0.05, **settings)  # type: ignore[arg-type]
    run = run_of(tmp_path, cache, tmp_path / "tuned", checks=["integrity", "ledger", "perplexity"])
    ended = run.finish("--set", "merge=false")
    assert ended.code == 0, ended.err
    assert "adapter tuned (rank 4 times 8 added to 8 weights) beside tiny-chat" in ended.err
    adapter, artifact = run.folder / "tuned-lora.gguf", next(run.folder.glob("*Q8_0.gguf"))
    card = (run.folder / "README.md").read_text()
    assert f"llama-server -m {artifact.name} --lora {adapter.name}" in card
    assert f"- adapter: `{adapter.name}`" in card
    assert adapter.name in (run.folder / "SHA256SUMS").read_text()
    record = making.read_json(run.folder / "quantool.json")
    lines = record["plan"]["outputs"][0]["ledger"]["tensors"]
    added = {line["to"][0]["name"]: line["to"][0] for line in lines if "of the adapter" in line["reason"]}
    assert len(added) == 16
    assert added["blk.0.attn_q.weight.lora_a"]["shape"] == [
        4,
        layers["model.layers.0.self_attn.q_proj.weight"][1],
    ]

    from tests.e2e.conftest import quantool

    whole, start = adapter.read_bytes(), read_header(adapter).tensors[0].start
    adapter.write_bytes(whole[:start] + bytes(len(whole) - start))
    words = (str(artifact), "--reference", str(tmp_path / "tuned"), "--config", str(run.file))
    with quantool("validate", *words, "--output", str(tmp_path / "judged"), cache=cache) as child:
        _, err = child.communicate()
    assert child.returncode == 5, err
    assert "mean_kld" in err
    adapter.unlink()
    with (
        LlamaLog() as log,
        pytest.raises(Unsound, match=r"adapter tuned-lora\.gguf: it does not lie beside"),
        load_weights(artifact, gpu=False, log=log),
    ):
        pass
