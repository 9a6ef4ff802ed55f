"""Small random checkpoints, and the way from a configuration to an artifact, for the compressed methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structures
from safetensors.torch import load_file, save_file

from quantool.config.schema import Config
from quantool.plan import make as plan
from quantool.plan.depends import depends_of
from quantool.plugins import contract, find
from quantool.records import Artifact, Finding, Plan
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace
from quantool.source import resolve

Planned = Callable[..., Plan]
Made = Callable[..., Artifact]

TEXT = {"dataset_id": "python-docs", "sample_size": 4, "calibration_config": {"max_seq_length": 48}}
WIDE = {"gates": {"*": {"max_ln_ppl_ratio": 9, "max_mean_kld": 9, "min_same_top_p": 0}}}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in three shards, with a generation configuration, a template and a license."""
    folder = structures.write_spm_llama(tmp_path_factory.mktemp("checkpoints") / "toy-llama")
    (folder / "LICENSE").write_text("Do as you like.\n", encoding="utf-8")
    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    weight_map: dict[str, str] = {}
    for number in range(3):
        names = sorted(tensors)[number::3]
        shard = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of two layers with eight experts."""
    return structures.write_moe(tmp_path_factory.mktemp("checkpoints") / "toy-moe")


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 whose output head is its embedding."""
    return structures.write_qwen3(tmp_path_factory.mktemp("checkpoints") / "toy-qwen3")


def _config(
    checkpoint: Path, output: Path, method: str | None, level: str | list[str] | None, **keys: Any
) -> Config:
    asked = {} if method is None else {"method": method, "quant_level": level}
    return Config.model_validate(
        {"model_id": str(checkpoint), "output_path": str(output), "validation": WIDE, **asked, **keys}
    )


def _plan(config: Config) -> Plan:
    found = resolve.resolve(config, weights=True, progress=Progress(quiet=True))
    return plan.make_plan(config, found, Workspace(config.output_path))


@pytest.fixture(scope="session")
def planned() -> Planned:
    """``planned(checkpoint, output, method, level, **keys of the configuration)``: the plan."""
    return lambda *args, **keys: _plan(_config(*args, **keys))


@pytest.fixture(scope="session")
def made() -> Made:
    """The same arguments: the artifact of the first level, calibrated on Python's docstrings."""

    def make(*args: Any, **keys: Any) -> Artifact:
        config = _config(*args, **{**TEXT, **keys})
        drawn = _plan(config)
        wanted = config.requested()[0]
        method = find.find_method(wanted.method)
        workspace = Workspace(config.output_path)
        with workspace.lock():
            job = contract.Job(config, drawn, drawn.outputs[0], workspace, depends_of(method))
            return method.quantize(job, plan.options_of(wanted, method), Progress(quiet=True))

    return make


@pytest.fixture(scope="session")
def logits() -> Callable[[Path], Any]:
    """``logits(folder)``: what transformers computes from a folder for fixed ids, float32 [tokens, vocabulary]."""

    def compute(folder: Path) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        ids = torch.arange(3, 67).view(1, -1)
        with torch.no_grad():
            return model(ids).logits[0].float()

    return compute


@pytest.fixture(scope="session")
def served() -> Callable[[Path], list[Finding]]:
    """``served(folder)``: what the check of the same meaning finds in an artifact."""
    from quantool.validation.serving import judge

    def look(folder: Path) -> list[Finding]:
        facts = SimpleNamespace(heads=4, kv_heads=2, layers=2)
        case = SimpleNamespace(artifact=folder, source=SimpleNamespace(facts=facts))
        return list(judge.judge(cast("contract.Case", case), Progress(quiet=True)))

    return look
