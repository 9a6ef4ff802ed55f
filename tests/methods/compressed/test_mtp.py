"""A multi-token-prediction head in the folders that the compressed methods make; no weights are quantized here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import mtp as models
import pytest
import torch
from safetensors.torch import load_file, save_file
from tampering import source_of

from quantool.errors import ConfigError, SourceError
from quantool.formats.safetensors import check_index
from quantool.methods._compressed import mtp
from quantool.methods._compressed.outline import task_of
from quantool.methods.awq import RECIPE as AWQ
from quantool.methods.awq import Options as AwqOptions
from quantool.methods.fp8 import RECIPE as FP8
from quantool.methods.fp8 import Options as Fp8Options
from quantool.records import Plan
from quantool.source.mtp import head_tensors

Planned = Callable[..., Plan]
TEXT = {"dataset_id": "python-docs", "sample_size": 4}
OURS = r"re:^model\.layers\.4\..*"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_mtp(tmp_path_factory.mktemp("heads") / "tiny-mtp")


def test_a_head_is_kept_by_default_in_every_level(checkpoint: Path) -> None:
    source = source_of(checkpoint)
    head = set(head_tensors(check_index(checkpoint), 4))
    for recipe, level, options in (
        (FP8, "FP8_DYNAMIC", Fp8Options()),
        (AWQ, "W4A16", AwqOptions(group_size=64)),
    ):
        task = task_of(recipe, level, options, source)
        assert task.selection.ignore[-1] == OURS
        assert not head & {layer.name for layer in task.selection.layers}
        kinds = {tensor.name: tensor.dtype for tensor in task.tensors(check_index(checkpoint))}
        assert {kinds[name] for name in head} == {"BF16"}
        assert len(task.carried) == (len(head) if task.calibrated else 0)


def test_its_layer_is_quantized_where_that_is_asked_for_and_the_projection_never(checkpoint: Path) -> None:
    task = task_of(FP8, "FP8_DYNAMIC", Fp8Options(mtp="quantize"), source_of(checkpoint))
    chosen = {layer.name for layer in task.selection.layers}
    assert "model.layers.4.self_attn.q_proj.weight" in chosen
    assert "model.layers.4.mlp.experts.3.down_proj.weight" in chosen
    assert not {"model.layers.4.eh_proj.weight", "model.layers.4.mlp.gate.weight"} & chosen
    assert "model.layers.4.eh_proj" in task.selection.ignore


def test_no_calibrated_level_quantizes_it(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no calibration text goes through"):
        task_of(AWQ, "W4A16", AwqOptions(group_size=64, mtp="quantize"), source_of(checkpoint))


def test_patterns_of_the_user_may_name_the_head(checkpoint: Path) -> None:
    task = task_of(FP8, "FP8_DYNAMIC", Fp8Options(ignore=("lm_head", OURS)), source_of(checkpoint))
    assert task.selection.ignore.count(OURS) == 1


def test_the_plan_counts_its_bytes(checkpoint: Path, tmp_path: Path, planned: Planned) -> None:
    (output,) = planned(checkpoint, tmp_path / "out", "fp8", "FP8_DYNAMIC").outputs
    head = sum(check_index(checkpoint)[name].bytes for name in head_tensors(check_index(checkpoint), 4))
    without = models.write_mtp(tmp_path / "tiny-mtp", head=False)
    bare = planned(without, tmp_path / "other", "fp8", "FP8_DYNAMIC", drop=["mtp"]).outputs[0]
    sizes = [sum(file.bytes for file in each.files) for each in (output, bare)]
    assert 0 <= sizes[0] - sizes[1] - head < 4000  # the header's entries


def test_a_head_without_its_projection_is_refused_by_the_plan(
    checkpoint: Path, tmp_path: Path, planned: Planned
) -> None:
    broken = models.write_mtp(tmp_path / "tiny-mtp")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.4.eh_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=re.escape("lacks model.layers.4.eh_proj.weight")):
        planned(broken, tmp_path / "out", "fp8", "FP8_DYNAMIC")


def test_the_option_about_experts_means_nothing_without_calibration(
    checkpoint: Path, tmp_path: Path, planned: Planned
) -> None:
    options = {"calibrate_all_experts": False}
    with pytest.raises(ConfigError, match="calibrate_all_experts means nothing"):
        planned(checkpoint, tmp_path, "fp8", "FP8_DYNAMIC", quantization_config=options)
    settings = {
        **TEXT,
        "calibration_config": {"max_seq_length": 8},
        "quantization_config": options
        | {"group_size": 64, "mappings": [["re:.*input_layernorm$", ["re:.*q_proj$"]]]},
    }
    drawn = planned(checkpoint, tmp_path, "awq", "W4A16", **settings)
    assert any("reach each of 4 experts 16 times on average, and 32 are" in note for note in drawn.warnings)


def test_the_head_is_brought_byte_for_byte_into_a_folder_that_lacks_it(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "made"
    for place in (source, folder):
        place.mkdir()
    trunk = {"model.layers.0.a.weight": torch.ones(2, 2)}
    head = {"mtp.fc.weight": torch.randn(4, 8).bfloat16(), "mtp.norm.weight": torch.randn(4)}
    save_file(trunk | head, source / "model.safetensors")
    save_file(trunk, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"ignore": ["lm_head"]}}))
    for _ in range(2):  # a level that was made from a sibling has it already
        mtp.carry(source, folder, [*head], [r"re:^mtp\..*"])
    found = check_index(folder)
    assert found.keys() == trunk.keys() | head.keys()
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"] == [
        "lm_head",
        r"re:^mtp\..*",
    ]
    stored = load_file(folder / found["mtp.fc.weight"].file)
    assert torch.equal(stored["mtp.fc.weight"], head["mtp.fc.weight"])
