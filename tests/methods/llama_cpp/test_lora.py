"""Adapters that stay files of their own: which ones llama.cpp's format holds, and with what factor."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import adapters
import ledger_structures
import pytest
import torch

from quantool import pipeline
from quantool.config.schema import Config
from quantool.errors import ConfigError, DependencyError, SourceError
from quantool.methods._llama_cpp import lora
from quantool.records import Source
from quantool.runtime.progress import Progress
from quantool.runtime.toolchain import Toolchain
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve

QUIET = Progress(quiet=True)
QUERY = {
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.1.self_attn.q_proj.weight": (64, 64),
}


def config(folder: Path, *, structure: str = "dense", method: str = "gguf", **keys: Any) -> Config:
    """An adapter for a structure, not merged; ``keys`` are the adapter's settings and further tensors."""
    base = ledger_structures.write(structure, folder / "base")
    adapters.write(folder / "tuned", QUERY, **keys)
    level = {"gguf": "Q8_0", "fp8": "FP8_DYNAMIC"}[method]
    named = {"model_id": str(base), "adapter": str(folder / "tuned"), "merge": False}
    return Config.model_validate(
        named | {"method": method, "quant_level": level, "output_path": str(folder / "out")}
    )


def source(folder: Path, **keys: Any) -> Source:
    return resolve(config(folder, **keys), weights=False, progress=QUIET)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 16),
        ({"use_rslora": True}, 32),  # alpha / sqrt(rank), which llama.cpp divides by the rank
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, 16),
        ({"alpha_pattern": {"q_proj": 8}}, 8),
    ],
)
def test_the_alpha_by_which_llama_cpp_scales(tmp_path: Path, settings: dict[str, Any], alpha: float) -> None:
    made = source(tmp_path, **settings)
    prepared = lora.apart(made)
    assert prepared is not None
    adapter = lora.require_separable(made, prepared)
    assert lora.alpha_of(adapter) == alpha
    assert lora.kind_of(adapter) == "F32"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 8}}, "2 values of alpha, a GGUF adapter holds one"),
        (
            {"use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 2}},
            "2 values of alpha, a GGUF adapter holds one",
        ),
        (
            {
                "more": {"lm_head.modules_to_save.weight": torch.zeros(256, 64)},
                "modules_to_save": ["lm_head"],
            },
            r"changes lm_head\.weight as a whole",
        ),
        (
            {
                "use_dora": True,
                "more": {name.replace("weight", "lora_magnitude_vector"): torch.ones(64) for name in QUERY},
            },
            "DoRA gives rows a length",
        ),
        ({"structure": "drafting layer"}, "head for further tokens"),
        ({"structure": "embedding"}, "for embedding"),
    ],
)
def test_what_cannot_stay_apart_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    made = source(tmp_path, **keys)
    prepared = lora.apart(made)
    assert prepared is not None
    with pytest.raises(SourceError, match=message) as refused:
        lora.require_separable(made, prepared)
    assert "leave merge out" in refused.value.hint


def test_weights_that_llama_cpp_joins_are_refused(tmp_path: Path) -> None:
    made = source(tmp_path)
    both = [*QUERY]
    with pytest.raises(SourceError, match=r"no tensor of model\.layers\.0\.self_attn\.q_proj\.weight alone"):
        list(lora.lines(made, {"blk.0.attn_qkv.weight": both}, {"blk.0.attn_qkv.weight": (128, 64)}))


def test_a_method_that_makes_no_adapter_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="merge: false, but fp8 makes no file of an adapter") as refused:
        pipeline.plan(config(tmp_path, method="fp8"), QUIET)
    assert "gguf does" in refused.value.hint


def test_a_toolchain_of_an_older_quantool_is_named(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match=r"own has no convert_lora_to_gguf\.py") as refused:
        lora.script_of(Toolchain(tmp_path, None, "own"))
    assert "quantool toolchain install" in refused.value.hint


def test_nothing_to_keep_apart(tmp_path: Path) -> None:
    wanted = config(tmp_path).model_copy(update={"adapter": None})
    with pytest.raises(ConfigError, match="merge: false, but there is no adapter"):
        resolve(wanted, weights=False, progress=QUIET)


def test_a_merged_adapter_and_one_apart_have_other_keys(tmp_path: Path) -> None:
    apart = source(tmp_path)
    merged = resolve(
        config(tmp_path / "again").model_copy(update={"merge": True}), weights=False, progress=QUIET
    )
    assert apart.prepared is not None
    assert merged.prepared is not None
    assert apart.prepared.identity()[-1] == "apart"
    assert "apart" not in merged.prepared.identity()


def test_levels_made_side_by_side_place_the_adapter_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "work" / "base.gguf"
    base.parent.mkdir()
    (base.parent / lora.adapter_file("m")).write_bytes(b"adapter")
    job = Mock(folder=tmp_path / "m-GGUF", workspace=Workspace(tmp_path))
    monkeypatch.setattr(lora, "apart", lambda _: object())
    copied, copyfile = [], shutil.copyfile

    def slowly(source: Path, target: Path) -> None:
        copied.append(target)
        time.sleep(0.2)
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", slowly)
    with ThreadPoolExecutor(2) as threads:
        left, right = threads.map(lambda _: lora.placed(job, base), range(2))
    assert left == right
    assert (job.folder / lora.adapter_file("m")).read_bytes() == b"adapter"
    assert len(copied) == 1
