from quantool.formats.fused_layers import fused


def test_attention_and_mlp_are_joined_and_the_rest_stands_alone() -> None:
    names = [f"l.0.{name}" for name in ("o_proj", "k_proj", "q_proj", "v_proj", "up_proj", "gate_proj")]
    assert fused(names) == {
        "l.0.o_proj": ("l.0.o_proj",),
        "l.0.qkv_proj": ("l.0.q_proj", "l.0.k_proj", "l.0.v_proj"),
        "l.0.gate_up_proj": ("l.0.gate_proj", "l.0.up_proj"),
    }


def test_a_part_without_the_others_stands_alone() -> None:
    assert fused(["a.up_proj", "a.down_proj"]) == {
        "a.up_proj": ("a.up_proj",),
        "a.down_proj": ("a.down_proj",),
    }


def test_experts_are_one_module_and_a_shared_expert_is_not_of_them() -> None:
    names = ["m.experts.0.up_proj", "m.shared_expert.up_proj", "m.experts.1.up_proj"]
    assert fused(names) == {
        "m.experts": ("m.experts.0.up_proj", "m.experts.1.up_proj"),
        "m.shared_expert.up_proj": ("m.shared_expert.up_proj",),
    }
