from __future__ import annotations

import pytest

from quantool.errors import ConfigError, SourceError
from quantool.methods._compressed.mappings import (
    AWQ_REGISTRIES,
    SMOOTHQUANT_REGISTRIES,
    check,
    known_architectures,
)
from quantool.methods.awq import Options

MODULES = ["model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj"]
PAIR = ["re:.*input_layernorm$", ["re:.*q_proj$"]]


@pytest.mark.parametrize("registries", [AWQ_REGISTRIES, SMOOTHQUANT_REGISTRIES])
def test_architectures_are_read_from_llmcompressors_source(registries: tuple[tuple[str, str], ...]) -> None:
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "Qwen3_5ForCausalLM"} <= known_architectures(
        registries
    )


@pytest.mark.parametrize(
    "written",
    [PAIR, PAIR[::-1], {"smooth_layer": PAIR[0], "balance_layers": PAIR[1]}],
    ids=["pair", "0.2.0", "keys"],
)
def test_spellings_of_a_mapping_mean_the_same(written: object) -> None:
    (mapping,) = Options.model_validate({"mappings": [written]}).mappings or ()
    assert (mapping.smooth_layer, mapping.balance_layers) == (PAIR[0], ("re:.*q_proj$",))
    check((mapping,), "UnheardOfForCausalLM", MODULES, AWQ_REGISTRIES)


def test_an_architecture_without_mappings_is_refused() -> None:
    with pytest.raises(SourceError, match="UnheardOfForCausalLM"):
        check(None, "UnheardOfForCausalLM", MODULES, AWQ_REGISTRIES)
    check(None, "LlamaForCausalLM", MODULES, AWQ_REGISTRIES)


def test_a_mapping_that_matches_nothing_is_refused() -> None:
    mappings = Options.model_validate({"mappings": [[PAIR[0], ["re:.*qkv_proj$"]]]}).mappings
    with pytest.raises(ConfigError, match="qkv_proj"):
        check(mappings, "LlamaForCausalLM", MODULES, AWQ_REGISTRIES)
