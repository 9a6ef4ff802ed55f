"""What vLLM would refuse of a quantized folder, told from config.json and headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from quantool.formats.safetensors import TensorHeader
from quantool.formats.safetensors_layout import Stored, as_stored, encode
from quantool.methods._compressed import autoawq as _autoawq
from quantool.methods._compressed.schemes import (
    FP8,
    W4A16,
    W4A16_ASYM,
    W8A8,
    W8A16,
    WeightScheme,
    planned,
    select,
)
from quantool.plugins.contract import Case
from quantool.records import Finding, Verdict
from quantool.runtime.progress import Progress
from quantool.validation._findings import rules
from quantool.validation.serving import judge

LEVELS = {**FP8, "W4A16": W4A16, "W4A16_ASYM": W4A16_ASYM, "W8A16": W8A16, "W8A8": W8A8}
HIDDEN, INNER, KEYS = 256, 512, 128
ATTENTION = "model.layers.1.self_attn"
MLP = "model.layers.1.mlp"
Change = Callable[[dict[str, Any], dict[str, Stored]], object]


def checkpoint(*, experts: int = 0, keys: int = KEYS) -> dict[str, TensorHeader]:
    """A Llama or a mixture of experts of two layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (320, HIDDEN), "lm_head": (320, HIDDEN)}
    for layer in range(2):
        place = f"model.layers.{layer}"
        for name, rows in (("q_proj", HIDDEN), ("k_proj", keys), ("v_proj", keys), ("o_proj", HIDDEN)):
            shapes[f"{place}.self_attn.{name}"] = (rows, HIDDEN)
        for mlp in [f".experts.{number}" for number in range(experts)] or [""]:
            shapes |= {f"{place}.mlp{mlp}.{name}": (INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
            shapes[f"{place}.mlp{mlp}.down_proj"] = (HIDDEN, INNER)
        if experts:
            shapes[f"{place}.mlp.gate"] = (experts, HIDDEN)
        shapes[f"{place}.input_layernorm"] = (HIDDEN,)
    return {
        f"{name}.weight": TensorHeader(f"{name}.weight", "BF16", shape, "model.safetensors", 0, 0)
        for name, shape in shapes.items()
    }


def described(scheme: WeightScheme, ignore: list[str]) -> dict[str, Any]:
    """The quantization_config that compressed-tensors itself writes."""
    from compressed_tensors.quantization import (  # type: ignore[import-untyped]
        QuantizationConfig,
        preset_name_to_scheme,
    )

    group = preset_name_to_scheme(scheme.preset, ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=ignore)
    form = {"I32": "pack-quantized", "I8": "int-quantized", "F8_E4M3": "float-quantized"}[scheme.stored]
    found = json.loads(config.model_dump_json()) | {"quant_method": "compressed-tensors", "format": form}
    found["config_groups"]["group_0"]["format"] = form
    if scheme.group:
        found["config_groups"]["group_0"]["weights"]["group_size"] = scheme.group
    return cast("dict[str, Any]", found)


def write(
    folder: Path, scheme: WeightScheme, change: Change | None = None, *, autoawq: bool = False, **kind: int
) -> Path:
    """A checkpoint at ``scheme`` whose quantization_config and tensors went through ``change``."""
    located = checkpoint(**kind)
    selection = select(located, ["Linear"], None, tied=False)
    stored = planned(located, selection, scheme)
    found = described(scheme, list(selection.ignore))
    if autoawq:
        chosen = {layer.name for layer in selection.layers}
        stored = [as_stored(t) for t in located.values() if t.name not in chosen]
        for layer in selection.layers:
            stored += _autoawq.tensors(layer, scheme.group)
        found = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
        found["modules_to_not_convert"] = ["lm_head"]
    named = {tensor.name: tensor for tensor in stored}
    if change:
        change(found, named)
    head, _ = encode(named.values())
    (folder / "model.safetensors").write_bytes(head + bytes(sum(tensor.bytes for tensor in named.values())))
    (folder / "config.json").write_text(json.dumps({"quantization_config": found}))
    return folder


def findings(folder: Path, heads: int = 4, keys: int = 2) -> dict[str, Finding]:
    facts = SimpleNamespace(heads=heads, kv_heads=keys, layers=2)
    case = SimpleNamespace(artifact=folder, source=SimpleNamespace(facts=facts))
    return {one.metric: one for one in judge.judge(cast("Case", case), Progress(quiet=True))}


def refused(folder: Path) -> dict[str, str]:
    return {m: one.detail for m, one in findings(folder).items() if one.verdict is Verdict.REGRESSION}


def plain(named: dict[str, Stored], module: str) -> None:
    """The module as the source has it."""
    shape = named[f"{module}.weight"].shape if f"{module}.weight" in named else ()
    for name in [name for name in named if name.rpartition(".")[0] == module]:
        if name.endswith(("weight_packed", "qweight")):
            shape = (HIDDEN, HIDDEN)
        del named[name]
    named[f"{module}.weight"] = Stored(f"{module}.weight", "BF16", shape)


def group(found: dict[str, Any]) -> dict[str, Any]:
    return cast("dict[str, Any]", found["config_groups"]["group_0"])


def cache(found: dict[str, Any], **changes: Any) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    found["kv_cache_scheme"] = scheme | changes


def with_scales(named: dict[str, Stored], layers: range) -> None:
    for layer in layers:
        for part in "kv":
            name = f"model.layers.{layer}.self_attn.{part}_scale"
            named[name] = Stored(name, "BF16", (1,))


def one_for_all_heads(found: dict[str, Any], named: dict[str, Stored]) -> None:
    cache(found, strategy="attn_head")
    with_scales(named, range(2))


def half_cached(found: dict[str, Any], named: dict[str, Stored]) -> None:
    cache(found)
    with_scales(named, range(1))


@pytest.mark.parametrize("experts", [0, 2], ids=["dense", "experts"])
@pytest.mark.parametrize("level", LEVELS)
def test_what_the_methods_write_is_served(tmp_path: Path, level: str, experts: int) -> None:
    found = findings(write(tmp_path, LEVELS[level], experts=experts))
    assert {one.verdict for one in found.values()} == {Verdict.PASS}, found
    joined = 4  # in two layers: qkv, and gate with up or the experts
    assert found["fused_modules"].measured == f"{joined} joined"
    names = {"W4A16": "Machete", "W4A16_ASYM": "Machete", "W8A16": "Machete", "W8A8": "CUTLASS INT8"}
    assert names.get(level, "FP8") in str(found["kernel"].measured)


@pytest.mark.parametrize("experts", [0, 2], ids=["dense", "experts"])
def test_the_autoawq_layout_is_served(tmp_path: Path, experts: int) -> None:
    def change(found: dict[str, Any], named: dict[str, Stored]) -> None:
        found["modules_to_not_convert"] += [n.removesuffix(".weight") for n in named if ".gate.weight" in n]

    found = findings(write(tmp_path, W4A16, change, autoawq=True, experts=experts))
    assert {one.verdict for one in found.values()} == {Verdict.PASS}, found
    assert "Machete" in str(found["kernel"].measured)


def ignoring(*names: str) -> Change:
    return lambda found, named: found["ignore"].extend(names)


def without(name: str) -> Change:
    return lambda found, named: named.pop(name)


def replaced(name: str, **fields: Any) -> Change:
    return lambda found, named: named.update({name: replace(named[name], **fields)})


def setting(section: str, **values: Any) -> Change:
    return lambda found, named: (group(found)[section] if section else group(found)).update(values)


@pytest.mark.parametrize(
    ("level", "change", "metric", "said"),
    [
        ("W4A16", ignoring(f"{ATTENTION}.q_proj"), "fused_modules", "q_proj are ignored"),
        (
            "FP8",
            lambda found, named: plain(named, f"{ATTENTION}.v_proj"),
            "fused_modules",
            "v_proj are not",
        ),
        (
            "W4A16",
            setting("", targets=["re:.*(q|k)_proj$", "re:.*(gate|up|down|o)_proj$"]),
            "fused_modules",
            "v_proj are not",
        ),
        ("FP8", ignoring(f"{ATTENTION}.o_proj"), "names", "o_proj is quantized, but"),
        ("FP8", lambda found, named: plain(named, f"{MLP}.down_proj"), "names", "no entry of ignore says so"),
        ("FP8", ignoring("model.layers.7.mlp.up_proj"), "names", "'model.layers.7.mlp.up_proj' in targets"),
        ("FP8", setting("", targets=["Linear", "LlamaMLP"]), "names", "'LlamaMLP'"),
        ("FP8_DYNAMIC", without(f"{MLP}.up_proj.weight_scale"), "scales", "up_proj lacks weight_scale"),
        ("FP8", without(f"{MLP}.up_proj.input_scale"), "scales", "up_proj lacks input_scale"),
        ("W4A16_ASYM", without(f"{MLP}.up_proj.weight_zero_point"), "scales", "lacks weight_zero_point"),
        ("W4A16", setting("weights", actorder="group"), "scales", "lacks weight_g_idx"),
        ("W4A16_ASYM", setting("weights", symmetric=True), "scales", "has weight_zero_point, which"),
        ("FP8_DYNAMIC", replaced(f"{MLP}.up_proj.weight_scale", dtype="I32"), "scales", "is I32"),
        (
            "W4A16",
            setting("weights", group_size=64),
            "scales",
            "down_proj.weight_scale has [256, 4], but group means [256, 8]",
        ),
        ("W4A16", setting("weights", group_size=96), "scales", "groups of 96 do not divide"),
        ("FP8_BLOCK", setting("weights", block_structure=[64, 64]), "kernel", "blocks of (64, 64)"),
        ("W4A16", setting("", format="marlin-24"), "kernel", "no scheme for 4-bit int"),
        ("FP8", setting("input_activations", symmetric=False), "kernel", "FP8 weights with float"),
        ("FP8", lambda found, named: cache(found, type="int"), "kv_cache", "8-bit int"),
        (
            "FP8",
            one_for_all_heads,
            "kv_cache",
            "numbers, as scales by attn_head have: model.layers.0.self_attn.k_scale",
        ),
        (
            "FP8",
            half_cached,
            "kv_cache",
            "in model.layers.1.self_attn: vLLM would take 1",
        ),
        (
            "FP8",
            lambda found, named: found.update(sparsity_config={"targets": ["Linear"]}),
            "quantization_config",
            "sparsity_config is set",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, level: str, change: Change, metric: str, said: str) -> None:
    found = refused(write(tmp_path, LEVELS[level], change))
    assert metric in found
    assert said in found[metric]


def test_parts_with_different_schemes_are_refused(tmp_path: Path) -> None:
    def change(found: dict[str, Any], named: dict[str, Stored]) -> None:
        other = json.loads(json.dumps(group(found)))
        other["targets"], other["input_activations"] = ["re:.*k_proj$"], None
        found["config_groups"] = {"group_1": other, "group_0": group(found)}

    (said,) = refused(write(tmp_path, LEVELS["FP8_DYNAMIC"], change)).values()
    assert "qkv_proj: its parts have different schemes" in said


def test_an_expert_that_is_left_out_is_refused(tmp_path: Path) -> None:
    change = ignoring(f"{MLP}.experts.1.down_proj")
    found = refused(write(tmp_path, LEVELS["FP8_DYNAMIC"], change, experts=2))
    assert "experts.1.down_proj are ignored" in found["fused_modules"]


def test_a_quantized_router_is_refused(tmp_path: Path) -> None:
    def change(found: dict[str, Any], named: dict[str, Stored]) -> None:
        for layer in range(2):
            router = f"model.layers.{layer}.mlp.gate"
            named[f"{router}.weight"] = replace(named[f"{router}.weight"], dtype="F8_E4M3")
            named[f"{router}.weight_scale"] = Stored(f"{router}.weight_scale", "BF16", (2, 1))

    found = refused(write(tmp_path, LEVELS["FP8_DYNAMIC"], change, experts=2))
    assert "mlp.gate is quantized, but vLLM" in found["names"]


def test_a_quantized_head_must_be_a_target_by_name(tmp_path: Path) -> None:
    def quantize(found: dict[str, Any], named: dict[str, Stored]) -> None:
        found["ignore"] = []
        named["lm_head.weight"] = replace(named["lm_head.weight"], dtype="F8_E4M3")
        named["lm_head.weight_scale"] = Stored("lm_head.weight_scale", "BF16", (320, 1))

    def name(found: dict[str, Any], named: dict[str, Stored]) -> None:
        quantize(found, named)
        group(found)["targets"].append("lm_head")

    assert "lm_head is quantized" in refused(write(tmp_path, LEVELS["FP8_DYNAMIC"], quantize))["names"]
    assert not refused(write(tmp_path, LEVELS["FP8_DYNAMIC"], name))


@pytest.mark.parametrize(
    ("change", "metric", "said"),
    [
        (lambda found, named: found.update(bits=8), "quantization_config", "8 bits, and only 4"),
        (lambda found, named: found.update(version="gemv"), "quantization_config", "'gemv'"),
        (lambda found, named: found.update(group_size="all"), "quantization_config", "'all'"),
        (lambda found, named: found["modules_to_not_convert"].append("q_proj"), "fused_modules", "q_proj are left"),
        (lambda found, named: found["modules_to_not_convert"].append("up_down"), "names", "'up_down'"),
        (lambda found, named: found.update(modules_to_not_convert=["o_proj"]), "names", "o_proj is quantized"),
        (without(f"{MLP}.up_proj.qzeros"), "scales", "up_proj lacks qzeros"),
        (lambda found, named: plain(named, f"{ATTENTION}.q_proj"), "fused_modules", "q_proj are not"),
    ],
)  # fmt: skip
def test_what_is_refused_of_autoawq(tmp_path: Path, change: Change, metric: str, said: str) -> None:
    found = refused(write(tmp_path, W4A16, change, autoawq=True))
    assert metric in found
    assert said in found[metric]


def test_autoawq_without_a_list_leaves_alone_what_is_not_packed(tmp_path: Path) -> None:
    change: Change = lambda found, named: found.pop("modules_to_not_convert")  # noqa: E731
    assert not refused(write(tmp_path, W4A16, change, autoawq=True))


def test_groups_without_a_kernel_are_refused(tmp_path: Path) -> None:
    assert "no kernel takes groups of 16" in refused(write(tmp_path, W4A16.grouped(16)))["kernel"]
    assert findings(write(tmp_path, W4A16.grouped(32)))["kernel"].measured == "Marlin"


def test_blocks_must_fill_all_but_the_last_part_of_a_fused_module(tmp_path: Path) -> None:
    found = refused(write(tmp_path, LEVELS["FP8_BLOCK"], keys=64))
    assert "k_proj has 64 outputs" in found["kernel"]


def test_over_how_many_gpus_it_can_be_split(tmp_path: Path) -> None:
    found = findings(write(tmp_path, W4A16), heads=8, keys=8)["tensor_parallel"]
    assert (found.verdict, found.measured) == (Verdict.PASS, "1, 2")
    assert "not over 4: o_proj: 256 inputs in 4 parts are no multiples of 128" in found.detail
    assert findings(write(tmp_path, W8A8), heads=8, keys=8)["tensor_parallel"].measured == "1, 2, 4, 8"
    assert findings(write(tmp_path, W8A8), heads=6, keys=2)["tensor_parallel"].measured == "1, 2"


def test_another_quantization_is_skipped(tmp_path: Path) -> None:
    folder = write(tmp_path, W8A8, lambda found, named: found.update(quant_method="bitsandbytes"))
    (found,) = findings(folder).values()
    assert found.verdict is Verdict.SKIPPED
    assert "bitsandbytes" in found.detail


def test_files_that_are_not_quantized_or_are_gguf_are_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").touch()
    for artifact, reason in (
        (tmp_path, "a folder without quantization_config"),
        (tmp_path / "model.gguf", "a GGUF"),
    ):
        (found,) = findings(artifact).values()
        assert found.verdict is Verdict.SKIPPED
        assert reason in found.detail


def test_with_a_newer_vllm_a_broken_rule_is_no_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def partly(found: dict[str, Any], named: dict[str, Stored]) -> None:
        del found
        plain(named, "model.layers.0.self_attn.k_proj")

    folder = write(tmp_path, FP8["FP8_DYNAMIC"], partly)
    assert "fused_modules" in refused(folder)
    monkeypatch.setattr(rules, "version", lambda name: {"vllm": "99.1"}.get(name, "0.0"))
    assert refused(folder) == {}
    skipped = findings(folder)["fused_modules"]
    assert skipped.verdict is Verdict.SKIPPED
    assert "rules of vLLM 0.24, and 99.1 may have others" in skipped.detail


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("model.safetensors", "cut off")])
def test_a_damaged_folder_is_named_without_its_place(tmp_path: Path, name: str, text: str) -> None:
    folder = write(tmp_path, FP8["FP8_DYNAMIC"])
    (folder / name).write_text(text)
    (found,) = findings(folder).values()
    assert found.verdict is Verdict.REGRESSION
    assert name in found.detail
    assert str(tmp_path) not in found.detail
