from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantool.formats.fused_experts import split_experts
from quantool.formats.safetensors import TensorHeader, check_index

JOINED, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def test_each_expert_lies_where_its_header_says(tmp_path: Path) -> None:
    joined, down = torch.randn(3, 8, 6), torch.randn(3, 6, 4)
    save_file(
        {JOINED: joined, DOWN: down, "model.norm.weight": torch.ones(6)}, tmp_path / "model.safetensors"
    )
    found = split_experts(check_index(tmp_path))
    assert len(found) == 1 + 3 * 3
    data = (tmp_path / "model.safetensors").read_bytes()
    for number in range(3):
        wanted = {"gate_proj": joined[number, :4], "up_proj": joined[number, 4:], "down_proj": down[number]}
        for part, matrix in wanted.items():
            header = found[f"model.layers.0.mlp.experts.{number}.{part}.weight"]
            stored = torch.frombuffer(bytearray(data[header.start : header.end]), dtype=torch.float32)
            assert header.shape == tuple(matrix.shape)
            assert torch.equal(stored.view(matrix.shape), matrix)


def pair(joined: tuple[int, ...], down: tuple[int, ...], *more: str) -> dict[str, TensorHeader]:
    shapes = {JOINED: joined, DOWN: down, **dict.fromkeys(more, (3, 8))}
    return {
        name: TensorHeader(name, "BF16", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    "headers",
    [
        pair((3, 6, 8), (3, 4, 6)),  # gpt-oss, Llama 4: the axes the other way round
        pair((3, 8, 8), (3, 4, 8)),  # the same where the shape of the first tells nothing
        pair((3, 8, 6), (3, 6, 4), f"{JOINED}_bias", f"{DOWN}_bias"),
        {JOINED: pair((3, 8, 6), (3, 6, 4))[JOINED]},
    ],
)
def test_other_layouts_stay_as_they_are(headers: dict[str, TensorHeader]) -> None:
    assert split_experts(headers) == headers


def test_a_head_is_kept_as_it_is_stored() -> None:
    headers = pair((3, 8, 6), (3, 6, 4))
    assert split_experts(headers, (JOINED, DOWN)) == headers
