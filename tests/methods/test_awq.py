from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantool.errors import SourceError
from quantool.formats.int4_layouts import PARTS, dequantize
from quantool.formats.safetensors import check_index
from quantool.records import Artifact, Finding, Plan, Verdict
from quantool.validation._engines.reference import load_model

Made = Callable[..., Artifact]
QUICK = {"n_grid": 3, "duo_scaling": False}
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def asymmetric(llama: Path, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return made(llama, tmp_path_factory.mktemp("awq"), "awq", "W4A16_ASYM", quantization_config=QUICK)


def agreement(reference: Any, found: Any) -> float:
    """Correlation of the logits."""
    return float(torch.corrcoef(torch.stack((reference.flatten(), found.flatten())))[0, 1])


def test_every_layer_is_packed_and_the_sizes_were_planned(
    llama: Path, asymmetric: Artifact, planned: Callable[..., Plan]
) -> None:
    found = check_index(asymmetric.folder)
    assert sum(name.endswith(".weight_packed") for name in found) == asymmetric.details["layers"] == 14
    assert found["lm_head.weight"].dtype == "BF16"
    (output,) = planned(
        llama,
        asymmetric.folder.parent,
        "awq",
        "W4A16_ASYM",
        quantization_config=QUICK,
        dataset_id="python-docs",
    ).outputs
    expected = {file.name: file.bytes for file in output.files if file.name != "config.json"}
    found_sizes = {file.name: file.bytes for file in asymmetric.files}
    assert {name: found_sizes[name] for name in expected} == expected
    assert found_sizes.keys() - expected.keys() == {"config.json", "recipe.yaml"}


def test_companions_are_the_sources_bytes(llama: Path, asymmetric: Artifact) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    ):
        assert (asymmetric.folder / name).read_bytes() == (llama / name).read_bytes(), name


def test_transformers_loads_it_and_it_answers_alike(
    llama: Path, asymmetric: Artifact, logits: Callable[[Path], Any]
) -> None:
    # plain rounding gives 0.939 on these random weights, a broken layout about 0
    assert agreement(logits(llama), logits(asymmetric.folder)) > 0.9


def test_without_bfloat16_instructions_it_is_calibrated_in_float32(
    llama: Path,
    asymmetric: Artifact,
    made: Made,
    logits: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same tensors in the same types and sizes, and as near to the source."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    plain = made(llama, tmp_path, "awq", "W4A16_ASYM", quantization_config=QUICK)
    assert plain.details["arithmetic"] == "float32"
    kinds = [
        {name: (tensor.dtype, tensor.shape) for name, tensor in check_index(artifact.folder).items()}
        for artifact in (plain, asymmetric)
    ]
    assert kinds[0] == kinds[1]
    assert {file.name: file.bytes for file in plain.files} == {
        file.name: file.bytes for file in asymmetric.files
    }
    assert agreement(logits(llama), logits(plain.folder)) > 0.9


@pytest.fixture(scope="module")
def converted(llama: Path, asymmetric: Artifact, made: Made) -> Artifact:
    """The same level in the AutoAWQ layout, in the same output folder."""
    options = {**QUICK, "format": "autoawq"}
    return made(llama, asymmetric.folder.parent, "awq", "W4A16_ASYM", quantization_config=options)


def test_the_autoawq_layout_is_converted_from_the_level_that_is_there(
    asymmetric: Artifact, converted: Artifact
) -> None:
    logs = asymmetric.folder.parent / "logs"
    assert (
        not (logs / "awq-W4A16_ASYM-autoawq.log").read_text().count("sequential")
    )  # nothing calibrated again
    assert converted.folder.name == "toy-llama-AWQ-W4A16-ASYM-AutoAWQ"
    assert converted.details["samples"] == asymmetric.details["samples"] == 4
    names = {path.name for path in asymmetric.folder.iterdir()}
    assert {path.name for path in converted.folder.iterdir()} == names


def test_the_autoawq_layout_is_judged_on_the_same_weights(asymmetric: Artifact, converted: Artifact) -> None:
    models = [
        load_model(folder, "auto", "cpu", trust_remote_code=False)
        for folder in (asymmetric.folder, converted.folder)
    ]
    ids = torch.arange(3, 67).view(1, -1)
    with torch.no_grad():
        expected, found = (model(ids).logits for model in models)
    assert torch.equal(found, expected)
    assert models[1].dtype == torch.bfloat16
    assert models[1].generation_config.eos_token_id == models[0].generation_config.eos_token_id


@pytest.mark.parametrize(
    ("change", "said"),
    [({"version": "gemv"}, "version 'gemv' cannot be unpacked"), ({"bits": 8}, "8-bit AutoAWQ weights")],
)
def test_other_layouts_of_autoawq_are_refused(
    converted: Artifact, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    settings = json.loads((converted.folder / "config.json").read_text())
    settings["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=said):
        load_model(tmp_path, "auto", "cpu", trust_remote_code=False)


def test_a_layer_without_its_zero_points_is_refused(converted: Artifact, tmp_path: Path) -> None:
    tensors = load_file(converted.folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(".qzeros"))
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_bytes((converted.folder / "config.json").read_bytes())
    with pytest.raises(SourceError, match=f"{lost.removesuffix('.qzeros')} lacks qzeros"):
        load_model(tmp_path, "auto", "cpu", trust_remote_code=False)


@pytest.mark.parametrize("layout", ["asymmetric", "converted"])
def test_vllm_would_serve_it(
    layout: str, request: pytest.FixtureRequest, served: Callable[[Path], list[Finding]]
) -> None:
    artifact: Artifact = request.getfixturevalue(layout)
    found = served(artifact.folder)
    assert {finding.verdict for finding in found} == {Verdict.PASS}
    assert next(one.measured for one in found if one.metric == "kernel") == "Machete"


def test_nothing_but_the_weights_depends_on_this_machine(asymmetric: Artifact) -> None:
    for name in ("config.json", "recipe.yaml"):
        assert str(asymmetric.folder.parent) not in (asymmetric.folder / name).read_text()


def test_autoawq_layout_of_a_mixture_of_experts(
    moe: Path, made: Made, tmp_path: Path, served: Callable[[Path], list[Finding]]
) -> None:
    options = {**QUICK, "n_grid": 2, "format": "autoawq", "ignore": ["lm_head"]}
    artifact = made(moe, tmp_path, "awq", "W4A16", quantization_config=options)
    assert (
        load_model(artifact.folder, "auto", "cpu", trust_remote_code=False).config.model_type == "qwen3_moe"
    )
    assert {finding.verdict for finding in served(artifact.folder)} == {Verdict.PASS}
    tensors = load_file(artifact.folder / "model.safetensors")
    module = "model.layers.1.mlp.experts.3.up_proj"
    weight = dequantize({part: tensors[f"{module}.{part}"] for part in PARTS})
    original = load_file(moe / "model.safetensors")[f"{module}.weight"].float()
    assert weight.shape == original.shape
    rows = torch.nn.functional.cosine_similarity(
        weight, original, dim=1
    )  # AWQ scales rows or columns of some layers
    assert rows.min() > 0.9
    settings = json.loads((artifact.folder / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["version"], settings["group_size"]) == ("awq", "gemm", 128)
    assert settings["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    ]
    assert artifact.bits_per_weight == pytest.approx(
        8 * sum(t.nbytes for t in tensors.values()) / sum(t.elements for t in check_index(moe).values())
    )
