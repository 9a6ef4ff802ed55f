"""The sampling that the user recommends reaches what is made: the metadata of a GGUF, the folder, and the keys of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import making
import pytest

from quantool.ledger import Fate
from quantool.methods._llama_cpp import base_file
from quantool.source.resolve import resolve

WANTED = {"temperature": "0 to 0.2", "min_p": 0.05}


def made(tmp_path: Path, form: str) -> Any:
    wanted = making.config(
        making.TINY,
        tmp_path / "out",
        "F16",
        method="fp16",
        quantization_config={"format": form},
        validation={"generation": WANTED},
    )
    plan, (artifact,) = making.make(wanted)
    return plan, artifact


def test_a_gguf_carries_it() -> None:
    wanted = making.config(making.TINY, Path("never-written"), "F16", validation={"generation": WANTED})
    source = resolve(wanted, weights=True, progress=making.QUIET)
    options = base_file.GgufOptions()
    found = base_file.metadata(source, options)
    assert {key: value for key, value in found.items() if "sampling" in key} == {
        "general.sampling.temp": 0.2,
        "general.sampling.min_p": 0.05,
    }
    plain = source.model_copy(update={"sampling": {}})
    assert base_file.base_key(source, options, "f16") != base_file.base_key(plain, options, "f16")


@pytest.mark.e2e
def test_a_gguf_that_was_converted_says_it(tmp_path: Path) -> None:
    plan, artifact = made(tmp_path, "gguf")
    found = making.keys(artifact.folder / artifact.files[0].name)
    assert found["general.sampling.temp"] == pytest.approx(0.2)
    assert found["general.sampling.min_p"] == pytest.approx(0.05)
    assert found["general.sampling.top_k"] == 40  # of the source
    assert artifact.files[0].bytes == plan.outputs[0].files[0].bytes


def test_a_folder_carries_it(tmp_path: Path) -> None:
    plan, artifact = made(tmp_path, "safetensors")
    name = "generation_config.json"
    source = making.read_json(making.TINY / name)
    assert making.read_json(artifact.folder / name) == source | {"temperature": 0.2, "min_p": 0.05}
    sizes = {file.name: file.bytes for file in plan.outputs[0].files}
    assert sizes[name] == (artifact.folder / name).stat().st_size
    line = next(line for line in plan.outputs[0].ledger.files if line.name == name)
    assert (line.fate, line.reason) == (
        Fate.CONVERTED,
        "the source's, with the sampling of validation.generation",
    )
