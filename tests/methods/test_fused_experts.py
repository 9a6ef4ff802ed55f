"""A mixture of experts whose checkpoint holds all experts of a layer in one tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tampering import source_of

from quantool.config.schema import Config
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Artifact, Gates, Verdict
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace

Made = Callable[..., Artifact]
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def fused(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture with its experts joined as transformers keeps them in memory."""
    folder = tmp_path_factory.mktemp("fused") / "toy-moe"
    shutil.copytree(moe, folder)
    tensors = load_file(moe / "model.safetensors")
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: [tensors.pop(f"{place}.{number}.{part}.weight") for number in range(8)]
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{place}.gate_up_proj"] = torch.stack(
            [torch.cat(both) for both in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
        )
        tensors[f"{place}.down_proj"] = torch.stack(parts["down_proj"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("method", "level", "options"), [
    ("fp8", "FP8_DYNAMIC", {}),
    ("awq", "W4A16", {"group_size": 64, "duo_scaling": False, "n_grid": 2}),
])  # fmt: skip
def test_fused_experts_give_the_tensors_of_single_ones(
    moe: Path, fused: Path, made: Made, tmp_path: Path, method: str, level: str, options: dict[str, object]
) -> None:
    both = [
        made(folder, tmp_path / str(number), method, level, quantization_config=options)
        for number, folder in enumerate((moe, fused))
    ]
    single, joined = (load_file(artifact.folder / "model.safetensors") for artifact in both)
    assert single.keys() == joined.keys()
    for name, tensor in single.items():
        assert torch.equal(tensor.view(torch.uint8), joined[name].view(torch.uint8)), name
    config = Config.model_validate({"model_id": str(fused), "method": method})
    workspace = Workspace(tmp_path / "judged")
    case = Case(
        both[1].folder, "transformers", f"{method}/{level}", source_of(fused), config, Gates(), workspace
    )
    with workspace.lock():
        found = find_check("integrity").judge(case, Progress(quiet=True))
    assert {finding.metric for finding in found if finding.verdict is Verdict.REGRESSION} == set()
