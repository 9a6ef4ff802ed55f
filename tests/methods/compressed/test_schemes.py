from __future__ import annotations

import pytest

from quantool.errors import ConfigError, SourceError
from quantool.formats.safetensors import TensorHeader
from quantool.methods._compressed.schemes import (
    FP8,
    W4A16,
    W4A16_ASYM,
    W8A8,
    check_fusion,
    check_shapes,
    linears,
    planned,
    select,
)


def headers(**shapes: tuple[int, ...]) -> dict[str, TensorHeader]:
    return {
        name.replace("__", "."): TensorHeader(
            name.replace("__", "."), "BF16", shape, "model.safetensors", 0, 0
        )
        for name, shape in shapes.items()
    }


DENSE = headers(
    model__embed_tokens__weight=(300, 256),
    model__layers__0__input_layernorm__weight=(256,),
    model__layers__0__self_attn__q_proj__weight=(256, 256),
    model__layers__0__self_attn__q_proj__bias=(256,),
    model__layers__0__mlp__down_proj__weight=(256, 512),
    lm_head__weight=(300, 256),
)
EXPERTS = headers(
    model__layers__0__mlp__gate__weight=(8, 256),
    model__layers__0__mlp__experts__0__gate_proj__weight=(128, 256),
    model__layers__0__mlp__shared_expert_gate__weight=(1, 256),
    lm_head__weight=(300, 256),
)


def test_only_matrices_that_are_no_embeddings_are_linear() -> None:
    assert list(linears(DENSE)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "lm_head",
    ]


def test_the_head_and_routers_are_left_alone_by_default() -> None:
    chosen = select(EXPERTS, ["Linear"], None, tied=False)
    assert [layer.name for layer in chosen.layers] == ["model.layers.0.mlp.experts.0.gate_proj.weight"]
    assert chosen.ignore == ("lm_head", r"re:.*mlp\.gate$", "re:.*shared_expert_gate$")
    assert not chosen.warnings


def test_routers_stay_out_of_an_ignore_list_without_them_and_the_plan_says_so() -> None:
    chosen = select(EXPERTS, ["Linear"], ["lm_head"], tied=False)
    assert "model.layers.0.mlp.gate" in chosen.left
    assert "routers" in chosen.warnings[0]


def test_targets_can_be_names_and_patterns() -> None:
    chosen = select(DENSE, [r"re:.*\.q_proj$"], None, tied=False)
    assert [layer.name for layer in chosen.layers] == ["model.layers.0.self_attn.q_proj.weight"]
    assert chosen.left == ("model.layers.0.mlp.down_proj", "lm_head")


@pytest.mark.parametrize(
    ("targets", "ignore", "lost"),
    [(["Linear"], ["lm_heat"], "lm_heat"), (["re:.*qkv$"], None, "qkv"), (["Conv1d"], None, "Conv1d")],
)
def test_patterns_that_match_nothing_are_refused(
    targets: list[str], ignore: list[str] | None, lost: str
) -> None:
    with pytest.raises(ConfigError, match=lost):
        select(DENSE, targets, ignore, tied=False)


def test_nothing_left_to_quantize_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave no layer"):
        select(DENSE, ["Linear"], ["re:.*"], tied=False)


def test_a_tied_head_may_be_ignored_but_not_quantized() -> None:
    tied = {name: tensor for name, tensor in DENSE.items() if name != "lm_head.weight"}
    assert select(tied, ["Linear"], ["lm_head"], tied=True).ignore == ("lm_head",)
    with pytest.raises(ConfigError, match="shares its weights"):
        select(tied, ["Linear"], [], tied=True)


def test_experts_in_one_tensor_are_refused() -> None:
    fused = headers(model__layers__0__mlp__experts__gate_up_proj=(8, 256, 256))
    with pytest.raises(SourceError, match="all experts"):
        select(DENSE | fused, ["Linear"], None, tied=False)


def test_a_group_size_that_does_not_divide_names_the_layer_and_one_that_does() -> None:
    odd = headers(a__q_proj__weight=(64, 192), b__q_proj__weight=(64, 256))
    chosen = select(odd, ["Linear"], None, tied=False)
    with pytest.raises(ConfigError, match=r"a\.q_proj\.weight \(192 inputs") as error:
        check_shapes(chosen, W4A16)
    assert error.value.hint == "quantization_config.group_size: 64 or 32"
    check_shapes(chosen, W4A16.grouped(64))
    with pytest.raises(ConfigError, match="FP8_BLOCK"):
        check_shapes(chosen, FP8["FP8_BLOCK"])
    check_shapes(chosen, W8A8)


def test_planned_tensors_of_a_packed_layer() -> None:
    chosen = select(DENSE, [r"re:.*down_proj$"], None, tied=False)
    found = {t.name: (t.dtype, t.shape) for t in planned(DENSE, chosen, W4A16_ASYM) if "down_proj" in t.name}
    module = "model.layers.0.mlp.down_proj"
    assert found == {
        f"{module}.weight_packed": ("I32", (256, 64)),
        f"{module}.weight_scale": ("BF16", (256, 4)),
        f"{module}.weight_zero_point": ("I32", (32, 4)),
        f"{module}.weight_shape": ("I64", (2,)),
    }


def test_groups_that_no_kernel_multiplies_are_refused() -> None:
    chosen = select(DENSE, ["Linear"], None, tied=False)
    with pytest.raises(ConfigError, match="no kernel of vLLM multiplies groups of 256") as error:
        check_shapes(chosen, W4A16.grouped(256))
    assert error.value.hint == "quantization_config.group_size: 32 or 64 or 128"


def test_a_head_that_is_quantized_becomes_a_target_by_name() -> None:
    assert select(DENSE, ["Linear"], [], tied=False).targets == ("Linear", "lm_head")
    assert select(DENSE, ["Linear"], None, tied=False).targets == ("Linear",)
    assert select(DENSE, ["re:.*"], [], tied=False).targets == ("re:.*",)


ATTENTION = headers(a__q_proj__weight=(256, 256), a__k_proj__weight=(64, 256), a__v_proj__weight=(64, 256))


@pytest.mark.parametrize(
    ("ignore", "left"),
    [(["re:.*q_proj$"], "a.q_proj"), (["a.k_proj", "a.q_proj"], "a.q_proj"), (["a.v_proj"], "a.v_proj")],
)
def test_layers_that_run_as_one_are_quantized_together_or_not_at_all(ignore: list[str], left: str) -> None:
    chosen = select(ATTENTION | DENSE, ["Linear"], ignore, tied=False)
    with pytest.raises(ConfigError, match=f"quantized and {left} would not"):
        check_fusion(chosen, W8A8)
    check_fusion(select(ATTENTION | DENSE, ["Linear"], ["re:a.[qkv]_proj$"], tied=False), W8A8)


def test_experts_of_a_layer_are_quantized_together_or_not_at_all() -> None:
    shapes = {
        f"e__experts__{n}__{part}__weight": (64, 64) for n in range(2) for part in ("up_proj", "down_proj")
    }
    experts = headers(**shapes)
    with pytest.raises(ConfigError, match=r"e\.experts\.1\.down_proj would not"):
        check_fusion(select(experts, ["Linear"], ["e.experts.1.down_proj"], tied=False), W8A8)
    check_fusion(select(experts, ["Linear"], None, tied=False), FP8["FP8_BLOCK"])


def test_blocks_must_fill_all_but_the_last_of_the_layers_that_run_as_one() -> None:
    with pytest.raises(ConfigError, match=r"a\.k_proj has 64 outputs"):
        check_fusion(select(ATTENTION, ["Linear"], None, tied=False), FP8["FP8_BLOCK"])
    wide = ATTENTION | headers(a__k_proj__weight=(128, 256))
    check_fusion(select(wide, ["Linear"], None, tied=False), FP8["FP8_BLOCK"])
