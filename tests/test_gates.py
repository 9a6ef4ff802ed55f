import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from quantool.errors import ConfigError
from quantool.gates import default_gates, over, resolve, stock_level
from quantool.plugins import find
from quantool.records import Gates

LLAMA_QUANTIZE = [
    "Q1_0",
    "Q2_0",
    "Q4_0",
    "Q4_1",
    "MXFP4_MOE",
    "Q5_0",
    "Q5_1",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "IQ1_S",
    "IQ1_M",
    "TQ1_0",
    "TQ2_0",
    "Q2_K",
    "Q2_K_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ3_M",
    "Q3_K",
    "IQ3_XS",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "IQ4_NL",
    "IQ4_XS",
    "Q4_K",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
    "F16",
    "BF16",
    "F32",
    "COPY",
]
COMPRESSED = ["FP8_DYNAMIC", "FP8", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "W8A16", "W8A8"]

PUBLISHED = {
    # ln(PPL ratio), mean KLD, same-top-p of LLaMA-3-8B (llama.cpp, tools/perplexity/README.md), all without a matrix
    "Q8_0": (0.000425, 0.001355, 0.97674),
    "Q6_K": (0.003484, 0.005452, 0.96031),
    "Q5_K_M": (0.009101, 0.010762, None),
    "Q5_0": (0.020898, 0.022239, None),
    "Q4_K_M": (0.027771, 0.031273, 0.91901),
    "Q4_K_S": (0.042244, 0.043136, None),
    "Q4_0": (0.072493, 0.071940, None),
    "Q3_K_M": (0.100218, 0.101913, None),
    "Q3_K_S": (0.232625, 0.228217, None),
    "Q2_K": (0.447785, 0.445132, 0.71138),
}


def limits(level: str) -> tuple[float, float, float]:
    gates = default_gates(level)
    assert gates.max_ln_ppl_ratio is not None
    assert gates.max_mean_kld is not None
    assert gates.min_same_top_p is not None
    return gates.max_ln_ppl_ratio, gates.max_mean_kld, gates.min_same_top_p


@pytest.mark.parametrize("level", LLAMA_QUANTIZE + COMPRESSED)
def test_every_level_fails_garbage_and_passes_rounding(level: str) -> None:
    """Equal odds over 4,096 tokens, for a model of perplexity 30: ln ratio 4.9, KLD no smaller, 1 in 4,096 equal."""
    ratio, divergence, agreement = limits(level)
    assert 0.001 <= ratio <= 3.0
    assert 0.001 < divergence <= 3.2
    assert 0.2 <= agreement <= 0.98


def test_levels_of_the_installed_library_have_gates() -> None:
    spec = find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "llama_cpp.py").read_text(encoding="utf-8")
    known = set(re.findall(r"^LLAMA_FTYPE_MOSTLY_(\w+) = ", text, re.MULTILINE))
    assert {"Q4_K_M", "IQ1_S", "BF16"} <= known
    for level in known - {"NVFP4"}:  # llama-quantize does not offer it
        default_gates(level)


@pytest.mark.parametrize("method", find.names("methods"))
def test_levels_of_every_method_have_gates(method: str) -> None:
    for level in find.find_method(method).levels():
        default_gates(level)


@pytest.mark.parametrize("level", PUBLISHED)
def test_published_results_pass_with_room(level: str) -> None:
    ratio, divergence, agreement = limits(level)
    published = PUBLISHED[level]
    assert published[0] * 1.25 <= ratio
    assert published[1] * 1.4 <= divergence
    assert published[2] is None or published[2] >= agreement


def test_published_results_of_the_next_lower_level_fail() -> None:
    order = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q3_K_S", "Q2_K"]
    for better, worse in pairwise(order):
        ratio, divergence, _ = limits(better)
        assert PUBLISHED[worse][0] > ratio or PUBLISHED[worse][1] > divergence


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("Q8_0", (0.002, 0.004, 0.97)),
        ("Q6_K", (0.006, 0.010, 0.95)),
        ("Q5_K_M", (0.012, 0.020, 0.935)),
        ("Q4_K_M", (0.045, 0.055, 0.90)),
        ("Q3_K_M", (0.13, 0.15, 0.84)),
        ("FP8_BLOCK", (0.01, 0.01, 0.95)),
        ("W4A16_ASYM", (0.06, 0.08, 0.88)),
        ("F32", (0.001, 0.002, 0.98)),
    ],
)
def test_fixed_values(level: str, expected: tuple[float, float, float]) -> None:
    assert limits(level) == expected


def test_gates_widen_with_fewer_bits() -> None:
    order = [
        "F16",
        "Q8_0",
        "Q6_K",
        "Q5_K_M",
        "Q5_K_S",
        "Q4_K_M",
        "Q4_K_S",
        "Q4_0",
        "Q3_K_L",
        "Q3_K_M",
        "IQ3_S",
    ]
    order += ["IQ3_XS", "IQ3_XXS", "Q3_K_S", "IQ2_M", "Q2_K", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]
    for better, worse in pairwise(order):
        assert limits(better)[0] < limits(worse)[0]
        assert limits(better)[1] < limits(worse)[1]
        assert limits(better)[2] >= limits(worse)[2]


def test_spelling_and_aliases() -> None:
    assert default_gates("q4_k_m") == default_gates("Q4_K") == default_gates("Q4_K_M")
    assert default_gates("Q3_K") == default_gates("Q3_K_M")


def test_unknown_level() -> None:
    with pytest.raises(ConfigError, match="no default gates for level 'Q4_K_X'") as caught:
        default_gates("Q4_K_X")
    assert "validation.gates.Q4_K_X" in caught.value.hint
    assert "did you mean Q4_K_S or Q4_K_M?" in caught.value.hint


def test_fields_come_from_the_nearest() -> None:
    configured = {"Q4_K_M": Gates(max_mean_kld=0.5), "*": Gates(max_mean_kld=0.7, min_same_top_p=0.6)}
    assert resolve("Q4_K_M", configured) == Gates(
        max_ln_ppl_ratio=0.045, max_mean_kld=0.5, min_same_top_p=0.6
    )
    assert resolve("Q4_K", configured) == resolve("Q4_K_M", configured)
    assert resolve("Q8_0", configured) == Gates(max_ln_ppl_ratio=0.002, max_mean_kld=0.7, min_same_top_p=0.6)
    assert resolve("Q8_0", {}) == default_gates("Q8_0")


def test_null_switches_a_gate_off_and_a_level_can_switch_it_on_again() -> None:
    configured = {"*": Gates(max_mean_kld=None), "Q8_0": Gates(max_mean_kld=0.1)}
    assert resolve("Q6_K", configured) == Gates(
        max_ln_ppl_ratio=0.006, max_mean_kld=None, min_same_top_p=0.95
    )
    assert resolve("Q8_0", configured).max_mean_kld == 0.1


def test_a_level_without_defaults_needs_all_limits() -> None:
    with pytest.raises(ConfigError, match="no default gates for level 'PLUGIN'"):
        resolve("PLUGIN", {"*": Gates(max_mean_kld=1, max_ln_ppl_ratio=1)})
    own = {"*": Gates(max_mean_kld=1, max_ln_ppl_ratio=1), "plugin": Gates(min_same_top_p=None)}
    assert resolve("PLUGIN", own) == Gates(max_mean_kld=1, max_ln_ppl_ratio=1, min_same_top_p=None)


def test_over_keeps_what_is_not_set() -> None:
    lower = Gates(max_ln_ppl_ratio=1, max_mean_kld=2)
    assert over(lower, Gates(max_mean_kld=None)) == Gates(max_ln_ppl_ratio=1, max_mean_kld=None)
    assert over(lower, Gates()) == lower


def test_gates_read_back_switch_nothing_off() -> None:
    gates = Gates(max_mean_kld=0.1)
    again = Gates.model_validate_json(gates.model_dump_json())
    assert over(default_gates("Q8_0"), again) == over(default_gates("Q8_0"), gates)


def test_a_fitted_file_has_the_limits_of_the_level_that_it_is_named_after() -> None:
    assert default_gates("Q4_K_M_FITB") == default_gates("Q4_K_M")
    assert stock_level("Q4_K_M") == "Q4_K_M"
