from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantool.errors import QuantizationError
from quantool.formats.safetensors import check_index
from quantool.formats.safetensors_layout import file_size
from quantool.methods._compressed.proof import verify
from quantool.methods._compressed.schemes import FP8, Selection, planned, select

SCHEME = FP8["FP8_DYNAMIC"]


def save(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {name.replace("__", "."): value for name, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    weights = {
        "a__q_proj__weight": torch.ones(8, 16),
        "lm_head__weight": torch.ones(4, 16),
        "norm__weight": torch.ones(16),
    }
    return save(tmp_path / "source", **{name: value.bfloat16() for name, value in weights.items()})


@pytest.fixture
def chosen(source: Path) -> Selection:
    return select(check_index(source), ["Linear"], None, tied=False)


def good() -> dict[str, torch.Tensor]:
    return {
        "a__q_proj__weight": torch.ones(8, 16).to(torch.float8_e4m3fn),
        "a__q_proj__weight_scale": torch.ones(8, 1).bfloat16(),
        "lm_head__weight": torch.ones(4, 16).bfloat16(),
        "norm__weight": torch.ones(16).bfloat16(),
    }


def test_a_sound_checkpoint_passes_and_has_the_planned_size(
    tmp_path: Path, source: Path, chosen: Selection
) -> None:
    stored = planned(check_index(source), chosen, SCHEME)
    folder = save(tmp_path / "out", **good())
    verify(folder, stored, chosen, streamed=True)
    assert (folder / "model.safetensors").stat().st_size == file_size(stored)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a__q_proj__weight": torch.ones(8, 16).bfloat16()}, "not quantized as planned: a.q_proj"),
        ({"a__q_proj__weight_scale": None}, "not quantized as planned: a.q_proj"),
        ({"lm_head__weight": torch.ones(4, 16).to(torch.float8_e4m3fn)}, "ignored layers .* lm_head"),
        ({"lm_head__weight_scale": torch.ones(4, 1).bfloat16()}, "ignored layers .* lm_head"),
        ({"norm__weight": None}, "missing or changed: norm.weight"),
        ({"stray": torch.ones(1)}, "unexpected: stray"),
    ],
)
def test_what_differs_from_the_plan_is_named(
    tmp_path: Path, source: Path, chosen: Selection, change: dict[str, torch.Tensor | None], said: str
) -> None:
    tensors = {name: value for name, value in (good() | change).items() if value is not None}
    with pytest.raises(QuantizationError, match=said):
        verify(
            save(tmp_path / "out", **tensors),
            planned(check_index(source), chosen, SCHEME),
            chosen,
            streamed=False,
        )
