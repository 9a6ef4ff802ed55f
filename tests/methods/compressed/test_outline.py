"""Planning and refusals that FP8, AWQ, GPTQ and SmoothQuant share; no weights are read here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from quantool.config import load
from quantool.errors import ConfigError, DependencyError, SourceError
from quantool.methods._compressed import outline
from quantool.methods.awq import RECIPE as AWQ
from quantool.methods.fp8 import RECIPE as FP8
from quantool.plugins import find
from quantool.records import Plan

TEXT = {"dataset_id": "python-docs"}
Planned = Callable[..., Plan]


def copied(checkpoint: Path, target: Path, **changes: Any) -> Path:
    """The checkpoint with other values in config.json."""
    shutil.copytree(checkpoint, target)
    settings = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(settings))
    return target


def test_folders_are_named_as_vendors_do() -> None:
    names = [outline.repo_name("tiny-chat", FP8, level) for level in FP8.schemes]
    assert names == ["tiny-chat-FP8-dynamic", "tiny-chat-FP8", "tiny-chat-FP8-block"]
    assert outline.repo_name("tiny-chat", AWQ, "W4A16_ASYM") == "tiny-chat-AWQ-W4A16-ASYM"


def test_a_plan_has_sizes_and_bits_and_does_not_touch_the_output(
    llama: Path, tmp_path: Path, planned: Planned
) -> None:
    drawn = planned(llama, tmp_path / "out", "awq", ["W4A16", "W4A16_ASYM", "W8A16"], **TEXT)
    bits = {output.level: output.bits_per_weight for output in drawn.outputs}
    assert bits["W4A16"] < bits["W4A16_ASYM"] < bits["W8A16"] < 16  # type: ignore[operator]
    assert {output.engine for output in drawn.outputs} == {"transformers"}
    assert not (tmp_path / "out").exists()


def test_the_plan_imports_neither_torch_nor_llmcompressor() -> None:
    code = (
        "import sys, quantool.methods.awq, quantool.methods.fp8, quantool.methods.gptq, quantool.methods.smoothquant;"
        "print([name for name in ('torch', 'transformers', 'llmcompressor', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("method", "level", "options"),
    [
        ("awq", "W4A16", {}),
        ("gptq", "W8A8", {}),
        ("fp8", "FP8", {}),
        ("fp8", "FP8_DYNAMIC", {"kv_cache": "fp8"}),
    ],
)
def test_calibration_text_is_asked_for(
    llama: Path, tmp_path: Path, planned: Planned, method: str, level: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="needs calibration text"):
        planned(llama, tmp_path, method, level, quantization_config=options)


def test_levels_without_calibration_do_not_ask(llama: Path, tmp_path: Path, planned: Planned) -> None:
    drawn = planned(llama, tmp_path, "fp8", ["FP8_DYNAMIC", "FP8_BLOCK"])
    assert any("8.9" in warning for warning in drawn.warnings) or drawn.warnings == ()


def test_a_group_size_that_does_not_divide_is_refused(llama: Path, tmp_path: Path, planned: Planned) -> None:
    with pytest.raises(ConfigError, match="groups of 96 do not divide"):
        planned(llama, tmp_path, "awq", "W4A16", quantization_config={"group_size": 96}, **TEXT)


def test_autoawq_holds_four_bits_only(llama: Path, tmp_path: Path, planned: Planned) -> None:
    with pytest.raises(ConfigError, match="4-bit"):
        planned(llama, tmp_path, "awq", "W8A16", quantization_config={"format": "autoawq"}, **TEXT)


def test_autoawq_keeps_the_head(llama: Path, tmp_path: Path, planned: Planned) -> None:
    options = {"format": "autoawq", "ignore": []}
    with pytest.raises(ConfigError, match="keeps the output head"):
        planned(llama, tmp_path, "awq", "W4A16", quantization_config=options, **TEXT)


def test_one_level_can_be_made_in_both_layouts(llama: Path, tmp_path: Path, planned: Planned) -> None:
    entries = [
        {"method": "awq", "quant_level": "W4A16", "quantization_config": options}
        for options in ({}, {"format": "autoawq"}, {"format": "compressed-tensors"})
    ]
    drawn = planned(llama, tmp_path, None, None, quantizations=entries[:2], **TEXT)
    assert [(output.id, output.repo) for output in drawn.outputs] == [
        ("awq/W4A16", "toy-llama-AWQ-W4A16"),
        ("awq/W4A16-autoawq", "toy-llama-AWQ-W4A16-AutoAWQ"),
    ]
    assert any("unpacked" in warning for warning in drawn.warnings)
    with pytest.raises(ConfigError, match="awq/W4A16 is asked for twice"):
        planned(llama, tmp_path, None, None, quantizations=entries, **TEXT)


@pytest.mark.parametrize(("n_grid", "duo_scaling"), [(3, "both"), (2, True)])
def test_a_search_over_too_few_points_is_refused(
    llama: Path, tmp_path: Path, planned: Planned, n_grid: int, duo_scaling: str | bool
) -> None:
    options = {"n_grid": n_grid, "duo_scaling": duo_scaling}
    with pytest.raises(ConfigError, match=f"n_grid is {n_grid}, too few") as error:
        planned(llama, tmp_path, "awq", "W4A16", quantization_config=options, **TEXT)
    assert error.value.hint == f"set n_grid to {n_grid + 1} or more"


def test_options_that_would_be_dropped_are_refused(llama: Path, tmp_path: Path, planned: Planned) -> None:
    with pytest.raises(ConfigError, match="group_size means nothing to W8A8"):
        planned(llama, tmp_path, "gptq", "W8A8", quantization_config={"group_size": 64}, **TEXT)
    mappings = [{"smooth_layer": "re:.*input_layernorm$", "balance_layers": ["re:.*[qkv]_proj$"]}]
    with pytest.raises(ConfigError, match="smoothing_strength is not set"):
        planned(llama, tmp_path, "gptq", "W4A16", quantization_config={"mappings": mappings}, **TEXT)


@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_a_pattern_that_is_no_regular_expression_is_told_by_line(tmp_path: Path, key: str) -> None:
    path = tmp_path / "job.yaml"
    entry = f"method: fp8\nquant_level: FP8_DYNAMIC\nquantization_config: {{{key}: ['re:.*(x']}}\n"
    path.write_text(f"model_id: x\n{entry}")
    with pytest.raises(
        ConfigError, match=rf"job\.yaml:4:\d+: quantization_config\.{key}.* no regular expression"
    ):
        load.load(path, (), find)


def test_a_checkpoint_that_is_quantized_without_saying_so_is_refused(
    llama: Path, tmp_path: Path, planned: Planned
) -> None:
    made = copied(llama, tmp_path / "made")
    for path in made.glob("*.safetensors"):
        tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        SourceError, match=r"are parts of quantized weights .* config.json has no quantization_config"
    ):
        planned(made, tmp_path / "out", "awq", "W4A16", **TEXT)


def test_an_architecture_without_mappings_is_refused(llama: Path, tmp_path: Path, planned: Planned) -> None:
    odd = copied(llama, tmp_path / "odd", architectures=["OddForCausalLM"])
    with pytest.raises(SourceError, match="OddForCausalLM"):
        planned(odd, tmp_path / "out", "awq", "W4A16", **TEXT)


def test_an_architecture_that_is_no_text_model_is_refused(
    llama: Path, tmp_path: Path, planned: Planned
) -> None:
    odd = copied(llama, tmp_path / "odd", architectures=["LlamaForConditionalGeneration"])
    with pytest.raises(SourceError, match="not supported"):
        planned(odd, tmp_path / "out", "fp8", "FP8_DYNAMIC")


def test_an_absent_gpu_is_refused(
    llama: Path, tmp_path: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outline, "capabilities", list)
    with pytest.raises(DependencyError, match="no CUDA device"):
        planned(llama, tmp_path, "fp8", "FP8_DYNAMIC", device="cuda")


def test_two_levels_cannot_go_to_one_repository(llama: Path, tmp_path: Path, planned: Planned) -> None:
    with pytest.raises(ConfigError, match="would both write"):
        planned(llama, tmp_path, "fp8", ["FP8_DYNAMIC", "FP8_BLOCK"], repo_id="someone/one")


@pytest.mark.parametrize(
    ("method", "level"), [("awq", "W4A16"), ("gptq", "W8A8")], ids=["awq.yaml", "gptq.yaml"]
)
def test_the_keys_of_0_2_0_are_accepted(
    llama: Path, tmp_path: Path, planned: Planned, method: str, level: str
) -> None:
    written = {
        "model_id": "amd/AMD-Llama-135m",
        "method": method,
        "quant_level": level,
        "quantization_config": {"targets": "Linear", "ignore": ["lm_head"]},
        "dataset_id": "HuggingFaceH4/ultrachat_200k",
        "split": "train_sft",
        "sample_size": 4,
        "output_path": str(tmp_path / "out"),
    }
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(written))
    loaded = load.load(path, (), find).config
    assert loaded.requested()[0].quantization_config == written["quantization_config"]
    drawn = planned(
        llama, tmp_path, method, level, quantization_config=written["quantization_config"], **TEXT
    )
    assert drawn.outputs[0].options["targets"] == ["Linear"]
