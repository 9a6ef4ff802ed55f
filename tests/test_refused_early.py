"""A run refuses what its plan refuses before a byte of the weights is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ledger_structures
import pytest

from quantool import pipeline
from quantool.config.schema import Config
from quantool.errors import ConfigError, SourceError
from quantool.records import Source
from quantool.run import preparing
from quantool.runtime.progress import Progress
from quantool.source.resolve import resolve

CAST = {"method": "fp16", "quant_level": "BF16", "quantization_config": {"format": "safetensors"}}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether weights were asked for, at each look at a checkpoint that seems to lie on the Hub."""
    asked: list[bool] = []

    def look(config: Config, *, weights: bool, progress: Progress) -> Source:
        asked.append(weights)
        found = resolve(config, weights=weights, progress=progress)
        return found.model_copy(update={"commit": "0" * 40, "model_id": "us/toy"})

    missing: Callable[[Source], int] = lambda _source: 0 if asked[-1] else 12345  # noqa: E731
    monkeypatch.setattr(preparing, "resolve", look)
    monkeypatch.setattr(preparing, "to_fetch", missing)
    return asked


def run(folder: Path, structure: str, **keys: Any) -> None:
    model = ledger_structures.write(structure, folder / "toy")
    wanted = {"output_path": str(folder / "out"), "validation": {"checks": ["ledger"]}, **CAST, **keys}
    pipeline.run(Config.model_validate({"model_id": str(model), **wanted}), Progress(quiet=True))


@pytest.mark.parametrize("structure", ["qwen3_vl", "gemma3", "audio"])
def test_what_cannot_be_judged(tmp_path: Path, fetched: list[bool], structure: str) -> None:
    with pytest.raises(SourceError, match="judge"):
        run(tmp_path, structure)
    assert fetched == [False]


def test_a_part_to_leave_out_that_is_not_there(tmp_path: Path, fetched: list[bool]) -> None:
    with pytest.raises(ConfigError, match="drop: vision"):
        run(tmp_path, "dense", drop=["vision"])
    assert fetched == [False]


def test_a_sound_checkpoint_is_fetched_after_its_plan(tmp_path: Path, fetched: list[bool]) -> None:
    run(tmp_path, "dense")
    assert fetched == [False, True]
