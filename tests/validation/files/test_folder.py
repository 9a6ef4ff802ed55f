"""Folders of safetensors in FP8, packed integers and AutoAWQ's layout: healthy ones, and what is found in damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tampering import autoawq_of, case, findings, folder_of, fp8_of, packed_of, regressions, spoilt

from quantool.formats.safetensors import TensorHeader, check_index
from quantool.plugins.contract import Case
from quantool.records import Finding, Verdict
from quantool.validation._files import folder as _folder
from quantool.validation._files import scales as _scales
from quantool.validation._files.modules import Numbers
from quantool.validation._findings.builder import FindingBuilder

pytestmark = pytest.mark.e2e
LAYER = "model.layers.1.mlp.up_proj"
Change = Callable[[dict[str, Any]], None]


def fp8(name: str = "spm_llama", folder: Path | None = None) -> Case:
    """The FP8 folder of a structure with its plan, or a damaged copy."""
    made, output = fp8_of(name)
    return replace(case(name, folder or made, output="fp8/FP8_DYNAMIC"), output=output)


@pytest.mark.parametrize("name", ["spm_llama", "moe", "qwen3"])
def test_healthy_fp8(name: str) -> None:
    found = findings("integrity", fp8(name))
    assert {one.verdict for one in found.values()} == {Verdict.PASS}
    assert "quantized" in str(found["layers"].measured)
    if name == "moe":
        assert "48 experts" in str(found["layers"].measured)
        assert found["kept_layers"].measured == "2 routers, lm_head"


@pytest.mark.parametrize("make", [packed_of, autoawq_of])
def test_healthy_integers(make: Callable[[str], Path]) -> None:
    found = findings("integrity", case("spm_llama", make("spm_llama"), output="given/toy"))
    assert not regressions(found)
    assert found["level"].verdict == Verdict.PASS
    assert found["layers"].measured == "14 quantized, 1 left alone"
    assert found["scales"].measured == "9216 of 9216 scales of 14 tensors read"


def test_healthy_without_quantization() -> None:
    found = findings("integrity", case("spm_llama", folder_of("spm_llama"), output="fp16/BF16-safetensors"))
    assert not regressions(found)
    assert found["layers"].measured == "15 left alone"


def test_healthy_blocks() -> None:
    folder, output = fp8_of("spm_llama", "FP8_BLOCK")
    chosen = replace(case("spm_llama", folder, output="fp8/FP8_BLOCK"), output=output)
    assert {one.verdict for one in findings("integrity", chosen).values()} == {Verdict.PASS}


def test_routers_that_are_quantized() -> None:
    """What llmcompressor does with a mixture of experts unless told otherwise."""
    found = findings("integrity", case("moe", packed_of("moe"), output="given/toy"))
    assert regressions(found) == {"kept_layers"}
    assert "model.layers.0.mlp.gate" in found["kept_layers"].detail


def leave(tensors: dict[str, Any]) -> None:
    """One layer is not quantized."""
    import torch

    weight, scale = tensors[f"{LAYER}.weight"], tensors.pop(f"{LAYER}.weight_scale")
    tensors[f"{LAYER}.weight"] = (weight.float() * scale.float()).to(torch.bfloat16)


def nan(tensors: dict[str, Any]) -> None:
    tensors[f"{LAYER}.weight_scale"][7] = float("nan")


def negative(tensors: dict[str, Any]) -> None:
    tensors[f"{LAYER}.weight_scale"][7] = -1.0


def nan_weight(tensors: dict[str, Any]) -> None:
    import torch

    weight = tensors[f"{LAYER}.weight"].view(torch.uint8)
    weight[3, 4] = 0xFF
    tensors[f"{LAYER}.weight"] = weight.view(torch.float8_e4m3fn)


def short_scale(tensors: dict[str, Any]) -> None:
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"][:1].clone()


def without_norm(tensors: dict[str, Any]) -> None:
    del tensors["model.norm.weight"]


def quantized_head(tensors: dict[str, Any]) -> None:
    import torch

    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


def without_layer(tensors: dict[str, Any]) -> None:
    del tensors[f"{LAYER}.weight"]
    del tensors[f"{LAYER}.weight_scale"]


@pytest.mark.parametrize(
    ("change", "metrics", "word"),
    [
        (leave, {"layers", "planned_size"}, f"{LAYER} is not quantized: its weight is BF16"),
        (nan, {"scales"}, f"{LAYER}.weight_scale: 1 of 512 scales are NaN"),
        (negative, {"scales"}, "1 of 512 scales are not above 0"),
        (nan_weight, {"scales"}, f"{LAYER}.weight: 1 of "),
        (short_scale, {"layers"}, "weight_scale is BF16 [1, 1], BF16 or F16 or F32 [512, 1] is expected"),
        (without_norm, {"other_tensors"}, "missing: model.norm.weight"),
        (quantized_head, {"layers", "kept_layers", "planned_size"}, "lm_head is quantized, although"),
        (without_layer, {"layers", "planned_size"}, f"{LAYER} is missing"),
    ],
)
def test_damaged_tensors(tmp_path: Path, change: Change, metrics: set[str], word: str) -> None:
    folder = spoilt(fp8_of("spm_llama")[0], tmp_path / "toy-FP8-dynamic", tensors=change)
    found = findings("integrity", fp8(folder=folder))
    assert regressions(found) == metrics
    assert word in "; ".join(found[metric].detail for metric in metrics)


def renamed(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"] = ["model.lm_head"]


def mistyped(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].append("model.layers.1.mlp.upproj")


def one_more(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].append(LAYER)


def other_target(config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [r"re:.*q_proj$", "re:.*nothing"]


def other_bits(config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"


def nothing(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def cached(config: dict[str, Any]) -> None:
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}


@pytest.mark.parametrize(
    ("change", "metrics", "word"),
    [
        (renamed, {"ignore", "layers"}, "matches no layer: 'model.lm_head'"),
        (mistyped, {"ignore"}, "'model.layers.1.mlp.upproj'"),
        (one_more, {"layers"}, f"{LAYER} is quantized, although config.json leaves it alone"),
        (other_target, {"ignore", "layers"}, "'re:.*nothing'"),
        (other_bits, {"level", "layers"}, "8-bit float by tensor, symmetric, not FP8_DYNAMIC"),
        (nothing, {"level", "layers"}, "is quantized, although"),
        (cached, {"kv_cache"}, "there is no model.layers.0.self_attn.k_scale"),
    ],
)
def test_changed_promise(tmp_path: Path, change: Change, metrics: set[str], word: str) -> None:
    folder = spoilt(fp8_of("spm_llama")[0], tmp_path / "toy-FP8-dynamic", settings=change)
    found = findings("integrity", fp8(folder=folder))
    assert regressions(found) == metrics
    assert word in "; ".join(found[metric].detail for metric in metrics)


def test_asymmetric_layer_without_zero_points(tmp_path: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors[f"{LAYER}.weight_zero_point"]

    folder = spoilt(packed_of("spm_llama"), tmp_path / "toy-W4A16-ASYM", tensors=drop)
    found = findings("integrity", case("spm_llama", folder, output="given/toy"))
    assert regressions(found) == {"layers"}
    assert f"{LAYER} has no weight_zero_point" in found["layers"].detail


def test_level_in_a_folder_name(tmp_path: Path) -> None:
    folder = spoilt(packed_of("spm_llama"), tmp_path / "toy-W8A16")
    found = findings("integrity", case("spm_llama", folder, output="given/toy"))
    assert regressions(found) == {"level"}
    assert "4-bit int by group, asymmetric, not W8A16" in found["level"].detail
    for name, level in {
        "toy-FP8-dynamic": "FP8_DYNAMIC",
        "toy-FP8": "FP8",
        "toy-FP8-block": "FP8_BLOCK",
        "toy-AWQ-W4A16-ASYM": "W4A16_ASYM",
        "toy-BF16": "BF16",
        "toy": None,
    }.items():
        assert _folder._named(name) == level


def test_autoawq_that_ignores_by_part_of_a_name(tmp_path: Path) -> None:
    def ignore(config: dict[str, Any]) -> None:
        config["quantization_config"]["modules_to_not_convert"] = ["up_proj", "gone"]

    folder = spoilt(autoawq_of("spm_llama"), tmp_path / "toy", settings=ignore)
    found = findings("integrity", case("spm_llama", folder, output="given/toy"))
    assert regressions(found) == {"layers", "ignore"}
    assert "matches no layer: 'gone'" in found["ignore"].detail
    assert f"{LAYER} is quantized, although" in found["layers"].detail


@pytest.mark.parametrize(
    ("name", "given"),
    [("generation_config.json", True), ("chat_template.jinja", True), ("tokenizer.model", False)],
)
def test_missing_companion(tmp_path: Path, name: str, given: bool) -> None:
    """What a run made has every file; of what others made a tokenizer in another form is enough."""
    folder = spoilt(fp8_of("spm_llama")[0], tmp_path / "toy-FP8-dynamic")
    (folder / name).unlink()
    found = findings("integrity", fp8(folder=folder))["companions"]
    assert found.verdict == Verdict.REGRESSION
    assert f"missing: {name}" in found.detail
    found = findings("integrity", case("spm_llama", folder))["companions"]
    assert (found.verdict == Verdict.REGRESSION) == given


def test_companion_with_other_content(tmp_path: Path) -> None:
    folder = spoilt(fp8_of("spm_llama")[0], tmp_path / "toy-FP8-dynamic")
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")  # says the same
    assert not regressions(findings("integrity", fp8(folder=folder)))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = findings("integrity", fp8(folder=folder))["companions"]
    assert found.verdict == Verdict.REGRESSION
    assert "not the source's: chat_template.jinja" in found.detail
    found = findings("integrity", case("spm_llama", folder))["companions"]
    assert found.verdict == Verdict.PASS  # other checks judge what it says
    assert "chat_template.jinja" in str(found.measured)


def test_unreadable(tmp_path: Path) -> None:
    folder = spoilt(fp8_of("spm_llama")[0], tmp_path / "toy")
    (folder / "config.json").write_text("{")
    found = findings("integrity", case("spm_llama", folder))
    assert regressions(found) == {"headers"}
    folder = spoilt(fp8_of("spm_llama")[0], tmp_path / "other")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "truncated" in findings("integrity", case("spm_llama", folder))["headers"].detail


def test_method_that_is_not_known(tmp_path: Path) -> None:
    def other(config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "hqq"}

    folder = spoilt(fp8_of("spm_llama")[0], tmp_path / "toy", settings=other)
    found = findings("integrity", case("spm_llama", folder))
    assert found["layers"].verdict == Verdict.SKIPPED
    assert "'hqq'" in found["layers"].detail


@pytest.mark.parametrize("whole", [True, False])
def test_runs_of_a_tensor(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fp8_of("spm_llama")[0]
    stored = check_index(folder)
    tensor = stored[f"{LAYER}.weight"]
    read = _scales._read(folder, tensor, whole=whole)
    assert len(read) == (tensor.bytes if whole else _scales.RUNS * _scales.RUN)
    monkeypatch.setattr(_scales, "WHOLE", 0)
    monkeypatch.setattr(_scales, "RUN", 16)
    (found,) = _scales.judge_scales(folder, stored, FindingBuilder("integrity"))
    assert found.verdict == Verdict.PASS
    count, total = str(found.measured).split(" scales")[0].split(" of ")
    assert 0 < int(count) < int(total)


def cache(stored: set[str], promised: Numbers | None, asked: object) -> list[Finding]:
    headers = {name: TensorHeader(name, "BF16", (1,), "f", 0, 2) for name in stored}
    return _scales.judge_cache(headers, promised, asked, 1, FindingBuilder("integrity"))


def test_scales_of_the_cache() -> None:
    attention = "model.layers.0.self_attn"
    projection, scales = f"{attention}.k_proj.weight", {f"{attention}.{part}_scale" for part in "kv"}
    static, dynamic = Numbers(8, "float", "tensor"), Numbers(8, "float", "tensor", dynamic=True)
    assert cache({projection}, None, None) == []
    assert cache({projection, *scales}, static, "fp8")[0].verdict == Verdict.PASS
    assert cache({projection}, dynamic, "fp8")[0].verdict == Verdict.PASS
    head = "model.layers.1.self_attn.k_proj.weight"  # for multi-token prediction, behind the only layer
    assert cache({projection, *scales, head}, static, "fp8")[0].verdict == Verdict.PASS
    for stored, promised, asked, word in (
        ({projection}, static, "fp8", f"no {attention}.k_scale, {attention}.v_scale"),
        ({projection}, None, "fp8", "the plan asks for kv_cache: fp8"),
        ({projection, *scales}, None, None, "but there are scales"),
    ):
        (found,) = cache(stored, promised, asked)
        assert found.verdict == Verdict.REGRESSION
        assert word in found.detail
