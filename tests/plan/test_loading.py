"""What transformers would fill in or pass over when it loads the reference is refused by the plan, by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ledger_structures
import pytest

from quantool import pipeline
from quantool.config.schema import Config
from quantool.errors import SourceError
from quantool.records import Plan
from quantool.runtime.progress import Progress


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing kept by an earlier run counts."""
    monkeypatch.setattr("quantool.runtime.toolchain.cache_folder", lambda: tmp_path / "cache")
    yield
    assert not list((tmp_path / "cache").rglob("*.log"))


def planned(folder: Path, **keys: Any) -> Plan:
    wanted = {
        "method": "fp16",
        "quant_level": "BF16",
        "quantization_config": {"format": "safetensors"},
        **keys,
    }
    config = Config.model_validate(
        {"model_id": str(folder), "output_path": str(folder.parent / "out"), **wanted}
    )
    return pipeline.plan(config, Progress(quiet=True))


CHECKS = {"validation": {"checks": ["perplexity", "ledger"]}}


@pytest.mark.parametrize(
    ("name", "check"),
    [
        *((name, "perplexity") for name in ("dense", "tied", "tied, head saved too", "buffers", "experts")),
        ("embedding", "embedding"), ("reranker", "classification"), ("classifier", "classification"),
    ],
)  # fmt: skip
def test_a_whole_checkpoint_is_planned(tmp_path: Path, name: str, check: str) -> None:
    checks = {"validation": {"checks": [check, "ledger"]}}
    plan = planned(ledger_structures.write(name, tmp_path / "toy"), **checks)
    assert plan.outputs[0].ledger is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "a tensor nobody knows",
            "1 tensors are nothing that LlamaForCausalLM has.*model.layers.0.secret.weight",
        ),
        (
            "biases",
            r"the weights lack 4 tensors of Qwen2ForCausalLM: model.layers.\{0-1\}.self_attn.k_proj.bias",
        ),
        ("hybrid", r"the weights lack \d+ tensors of Qwen3NextForCausalLM: .*shared_expert"),
        ("fused experts", r"the weights lack \d+ tensors of GptOssForCausalLM"),
        ("state space", "transformers cannot load toy: StrictDataclassClassValidationError"),
    ],
)
def test_what_the_reference_lacks_or_passes_over(tmp_path: Path, name: str, message: str) -> None:
    folder = ledger_structures.write(name, tmp_path / "toy")
    with pytest.raises(SourceError, match=message):
        planned(folder, **CHECKS)
    assert planned(folder, validation={"checks": ["ledger"]}).outputs  # nothing loads it


def test_a_shape_that_config_json_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = ledger_structures.STRUCTURES["experts"]
    wrong = ledger_structures.Structure(
        structure.config, structure.tensors | {"model.layers.1.mlp.gate.weight": (5, 64)}
    )
    monkeypatch.setitem(ledger_structures.STRUCTURES, "wrong", wrong)
    with pytest.raises(SourceError, match=r"other shapes have 1 tensors .*model.layers.1.mlp.gate.weight"):
        planned(ledger_structures.write("wrong", tmp_path / "toy"), **CHECKS)


def test_it_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ledger_structures.write("dense", tmp_path / "toy")
    planned(folder, **CHECKS)
    monkeypatch.setattr(
        "quantool.source.reference_names.process.call", lambda *_args, **_keys: pytest.fail("asked again")
    )
    planned(folder, **CHECKS)
