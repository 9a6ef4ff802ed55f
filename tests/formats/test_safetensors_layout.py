from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantool.formats.safetensors import INDEX, check_index
from quantool.formats.safetensors_layout import Stored, arrange, file_size, index_bytes

TENSORS = {
    "b.weight": torch.rand(8, 4).bfloat16(),
    "a.scale": torch.rand(3),
    "a.weight": torch.rand(8, 4).half(),
}
STORED = {
    "b.weight": Stored("b.weight", "BF16", (8, 4)),
    "a.scale": Stored("a.scale", "F32", (3,)),
    "a.weight": Stored("a.weight", "F16", (8, 4)),
}
TWO = {
    "model-00001-of-00002.safetensors": [STORED["b.weight"], STORED["a.scale"]],
    "model-00002-of-00002.safetensors": [STORED["a.weight"]],
}


def test_tensors_come_into_the_shards_that_were_planned(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    arrange(tmp_path, TWO)
    assert {path.name for path in tmp_path.iterdir()} == {*TWO, INDEX}
    assert (tmp_path / INDEX).read_bytes() == index_bytes(TWO)
    found: dict[str, torch.Tensor] = {}
    for shard, stored in TWO.items():
        assert (tmp_path / shard).stat().st_size == file_size(stored)
        found |= load_file(tmp_path / shard)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_several_shards_become_one_without_an_index(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    arrange(tmp_path, TWO)
    arrange(tmp_path, {"model.safetensors": list(STORED.values())})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_checkpoint_with_other_tensors_is_left_for_the_proof_to_name(tmp_path: Path) -> None:
    save_file(TENSORS | {"stray": torch.rand(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    arrange(tmp_path, TWO)
    assert set(check_index(tmp_path)) == {*TENSORS, "stray"}
