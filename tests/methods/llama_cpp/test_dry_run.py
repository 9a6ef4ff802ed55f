"""What a rehearsal notes of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantool.config.schema import Config
from quantool.methods._llama_cpp.dry_run import Rehearsal, notes
from quantool.runtime.progress import Progress
from quantool.source.resolve import resolve
from tests.checkpoint import write_checkpoint

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 150000.0}


@pytest.mark.parametrize(
    ("config", "differs"),
    [
        ({}, False),
        ({"rope_parameters": YARN}, False),
        ({"rope_parameters": YARN | {"truncate": True}}, False),
        ({"rope_parameters": YARN | {"truncate": False}}, True),
        ({"rope_scaling": YARN | {"truncate": False}}, True),
    ],
)
def test_positions_that_llama_cpp_rounds_are_noted(
    tmp_path: Path, config: dict[str, Any], differs: bool
) -> None:
    folder = write_checkpoint(tmp_path / "model", **config)
    wanted = Config.model_validate({"model_id": str(folder), "method": "gguf", "quant_level": "Q8_0"})
    source = resolve(wanted, weights=False, progress=Progress(quiet=True))
    found = notes(Rehearsal(tmp_path, (), {}, {}, {}), source)
    assert any("truncate: false: llama.cpp rounds" in note for note in found) == differs
