"""Ledgers of sources that are rewritten first: quantized ones, and a base with its adapter. Lines are those of what is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import ledger_structures
import pytest
import quantized_sources
import torch
from safetensors.torch import load_file, save_file

from quantool import pipeline
from quantool.config.schema import Config
from quantool.formats.safetensors import SINGLE
from quantool.ledger import Ledger, names
from quantool.runtime.progress import Progress


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A dense checkpoint with random weights."""
    folder = ledger_structures.write("dense", tmp_path / "plain")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.02 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in load_file(folder / SINGLE).items()
    }
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def ledger(model: Path, **keys: Any) -> Ledger:
    wanted = {
        "model_id": str(model), "output_path": str(model.parent / "out"), "method": "fp8", "quant_level": "FP8_DYNAMIC",
        "validation": {"checks": ["perplexity", "ledger"]}, **keys,
    }  # fmt: skip
    found = pipeline.plan(Config.model_validate(wanted), Progress(quiet=True)).outputs[0].ledger
    assert found is not None
    return found


def test_there_are_six() -> None:
    assert len(quantized_sources.FORMS) >= 6


@pytest.mark.parametrize("form", quantized_sources.FORMS)
def test_a_quantized_source_has_the_lines_of_what_is_read_from_it(
    form: str, plain: Path, tmp_path: Path
) -> None:
    quantized_sources.write(form, plain, tmp_path / "model")
    found = ledger(tmp_path / "model")
    assert sorted(name for line in found.tensors for name in names(line.name)) == sorted(
        ledger_structures.STRUCTURES["dense"].tensors
    )
    assert all(line.to for line in found.tensors)
    assert found.summary() == "21 tensors: 21 in"


def test_an_adapter_is_merged_before(plain: Path, tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (64, 64) for n in range(2)}
    adapters.write(tmp_path / "adapter", shapes, target_modules=["q_proj"])
    assert ledger(plain, adapter=str(tmp_path / "adapter")).summary() == "21 tensors: 21 in"
