"""The check of multi-token-prediction heads on its own; whole models go through it in tests/e2e/test_mtp.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mtp as models
import numpy as np
import pytest

from quantool.records import Verdict
from quantool.validation._score import drafts_llama_cpp
from quantool.validation._score.drafts import draft
from quantool.validation._score.drafts_transformers import Undraftable
from quantool.validation.mtp import compare


def marks(good: int, total: int = 1000) -> str:
    return "1" * good + "0" * (total - good)


@pytest.mark.parametrize(
    ("reference", "artifact", "verdict"),
    [
        (marks(700), marks(700), Verdict.PASS),
        (marks(700), marks(690), Verdict.PASS),  # one point
        (
            marks(700),
            marks(670),
            Verdict.PASS,
        ),  # three points, of which the error is half a point: within noise
        (marks(700), marks(665), Verdict.REGRESSION),
        (marks(700), marks(0), Verdict.REGRESSION),
        (marks(700), marks(800), Verdict.PASS),
        (marks(40), marks(0), Verdict.SKIPPED),  # the source's own head drafts nothing
    ],
)
def test_two_points_lost_beyond_noise_are_a_regression(
    reference: str, artifact: str, verdict: Verdict
) -> None:
    finding = compare("docs", reference, artifact)
    assert finding.verdict is verdict
    assert finding.corpus == "docs"
    if verdict is Verdict.REGRESSION:
        assert "lost on 1000 positions of docs (limit 2%)" in finding.detail


def test_noise_is_that_of_the_paired_difference() -> None:
    """The same shares as above, but drafts that differ at random: nothing is proven."""
    before = ("10" * 500)[:1000]
    after = ("01" * 500)[:970] + "0" * 30
    finding = compare("docs", before, after)
    assert finding.verdict is Verdict.PASS
    assert finding.error is not None
    assert finding.error > 0.01


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker is asked of the source."""
    folder = models.write_mtp(tmp_path_factory.mktemp("drafts") / "tiny-mtp")
    ids = np.random.default_rng(0).integers(100, 4000, (2, 64)).astype(np.int32)
    np.save(folder.parent / "ids.npy", ids)
    return {
        "engine": "transformers",
        "model": str(folder),
        "windows": [str(folder.parent / "ids.npy")],
        "most": 2,
        "layers": models.LAYERS,
        "dtype": "bfloat16",
        "device": "cpu",
        "trust_remote_code": False,
        "scratch": str(folder.parent / "scratch"),
    }


def test_a_model_that_runs_layer_by_layer_drafts_the_same(question: dict[str, Any]) -> None:
    whole, apart = (draft(question | {"by_layer": by_layer}, lambda *_: None) for by_layer in (False, True))
    assert (whole["unable"], whole["failure"]) == ("", None)
    assert whole["marks"] == apart["marks"]
    assert len(whole["marks"][0]) == 2 * 31


def test_a_head_of_an_unknown_layout_is_said_to_be_unknown(question: dict[str, Any]) -> None:
    answer = draft(question | {"layers": 9}, lambda *_: None)
    assert answer["unable"] == "the layout of this head is not known to quantool"


def test_a_library_without_the_staging_interface_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_llama_cpp, "SWITCH", "llama_set_something_else")
    with pytest.raises(Undraftable, match="does not give a model's hidden states"):
        drafts_llama_cpp.agreements(Path("no.gguf"), [], lambda *_: None, gpu=False)


def test_a_quantized_projection_cannot_be_judged(question: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = models.write_mtp(tmp_path / "tiny-mtp")
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.{models.LAYERS}.eh_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    answer = draft(question | {"model": str(folder)}, lambda *_: None)
    assert answer["unable"] == "what stands before its layer is quantized"
