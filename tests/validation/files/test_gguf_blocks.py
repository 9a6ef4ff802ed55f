"""Numbers in the blocks of a GGUF: scales that are no number, weights that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest
from tampering import case, edited, findings, gguf_of, regressions

from quantool.formats.gguf_header import read_header
from quantool.validation._files import gguf_blocks, gguf_file

pytestmark = pytest.mark.e2e
BLOCKS = {"Q8_0": 34, "Q4_K_M": 144, "Q2_K": 84, "IQ4_XS": 136, "TQ1_0": 54, "IQ4_NL": 18}
"""Bytes of a block of blk.1.ffn_up.weight."""
NAN, INFINITE = b"\x00\x7e", b"\x00\x7c"
SCALE = {"Q8_0": 0, "Q4_K_M": 2, "Q2_K": 82, "IQ4_XS": 0, "TQ1_0": 52, "IQ4_NL": 0}
"""Where a scale lies in it (``ggml-common.h``), the second one where there are two."""


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Qwen3 at some levels."""
    folder = tmp_path_factory.mktemp("blocks")
    found = {level: folder / f"toy-{level}.gguf" for level in BLOCKS}
    making.quantized(gguf_of("qwen3"), [making.run(level, path) for level, path in found.items()])
    return found


@pytest.mark.parametrize("level", list(SCALE))
def test_healthy(levels: dict[str, Path], level: str) -> None:
    found = findings("integrity", case("qwen3", levels[level], output=f"gguf/{level}"))
    assert not regressions(found)
    assert "(100%)" in str(found["scales"].measured)


@pytest.mark.parametrize("level", list(SCALE))
@pytest.mark.parametrize("number", [NAN, INFINITE])
def test_scale_that_is_no_number(levels: dict[str, Path], tmp_path: Path, level: str, number: bytes) -> None:
    def spoil(data: Any) -> None:
        blocks = data.view(np.uint8).reshape(-1, BLOCKS[level])
        blocks[3, SCALE[level] : SCALE[level] + 2] = np.frombuffer(number, np.uint8)

    file = edited(levels[level], tmp_path / f"toy-{level}.gguf", "blk.1.ffn_up.weight", spoil)
    found = findings("integrity", case("qwen3", file, output=f"gguf/{level}"))
    assert regressions(found) == {"scales"}
    assert found["scales"].detail.startswith("blk.1.ffn_up.weight: 1 of ")
    assert "NaN or infinite" in found["scales"].detail


def test_weight_that_is_no_number(tmp_path: Path) -> None:
    def spoil(data: Any) -> None:
        data[3] = np.nan

    file = edited(gguf_of("qwen3"), tmp_path / "toy-BF16.gguf", "blk.0.attn_norm.weight", spoil)
    found = findings("integrity", case("qwen3", file))
    assert regressions(found) == {"scales"}
    assert "blk.0.attn_norm.weight: 1 of 256 values" in found["scales"].detail


def test_a_hole_in_the_file(levels: dict[str, Path], tmp_path: Path) -> None:
    def spoil(data: Any) -> None:
        data[:] = 0

    file = edited(levels["Q8_0"], tmp_path / "toy-Q8_0.gguf", "blk.1.ffn_up.weight", spoil)
    found = findings("integrity", case("qwen3", file, output="gguf/Q8_0"))
    assert "every one of" in found["scales"].detail
    assert regressions(found) == {"scales"}


def test_weights_larger_than_the_source_has(levels: dict[str, Path], tmp_path: Path) -> None:
    def spoil(data: Any) -> None:
        blocks = data.view(np.uint8).reshape(-1, 34)
        blocks[:, :2] = (np.ascontiguousarray(blocks[:, :2]).view("<f2") * 100).view(np.uint8)

    file = edited(levels["Q8_0"], tmp_path / "toy-Q8_0.gguf", "blk.1.ffn_up.weight", spoil)
    chosen = case("qwen3", file, output="gguf/Q8_0")
    assert not regressions(findings("integrity", chosen))  # nobody has looked at the source's weights
    found = findings("integrity", replace(chosen, source=chosen.source.model_copy(update={"max_abs": 0.5})))
    assert regressions(found) == {"scales"}
    assert "the source's no more than 0.5" in found["scales"].detail


def test_large_tensors_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "WHOLE", 0)
    monkeypatch.setattr(gguf_blocks, "RUN", 68)
    header = read_header(gguf_of("qwen3"))
    found = gguf_blocks.inspect([gguf_file.stored(header, tensor) for tensor in header.tensors], 1.0)
    assert 0 < found["read"] < found["blocks"] / 3
    assert found["problems"] == []


@pytest.mark.parametrize("bits", [0x3C00, 0x7E00, 0x7C00])
def test_scale_of_iq1_m_is_put_together_from_four_words(bits: int) -> None:
    block = np.zeros((1, 56), np.uint8)
    words = block[:, 48:56].view("<u2")
    words[0] = [(bits & 0xF) << 12, (bits & 0xF0) << 8, (bits & 0xF00) << 4, bits & 0xF000]
    scales = gguf_blocks._scales("IQ1_M", block)
    assert scales is not None
    assert scales.view("<u2")[0, 0] == bits
