"""Importance matrices as files: what is read of a sound one, and what is none."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from quantool.errors import ConfigError
from quantool.methods._llama_cpp.importance.imatrix_file import check_matrix, read_matrix
from tests.gguf_bytes import Info, array, gguf, string, text, u32

KEYS = {"imatrix.datasets": array(8, 1, text("docs.txt")), "imatrix.chunk_count": u32(7)}
TWO: list[Info] = [
    ("blk.0.ffn_up.weight.in_sum2", (4, 2), 0, 0),
    ("blk.0.ffn_up.weight.counts", (1, 2), 0, 32),
]
"""Sums of four columns and counts of two experts, in float32."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "imatrix.gguf"


def test_sums_and_counts_are_read(path: Path) -> None:
    values = np.arange(10, dtype="<f4")
    path.write_bytes(gguf(KEYS, TWO, 0) + values[:8].tobytes() + values[8:].tobytes())
    found = read_matrix(path)
    assert (found.label, found.chunks) == ("docs.txt", 7)
    sums, counts = found.entries["blk.0.ffn_up.weight"]
    assert np.array_equal(sums, values[:8].reshape(2, 4))
    assert np.array_equal(counts, values[8:].reshape(2, 1))
    check_matrix(path, {"blk.0.ffn_up.weight": (2, 16, 4)})
    with pytest.raises(
        ConfigError, match=r"it has 8 columns for blk\.0\.ffn_up\.weight, this one has \[16, 5\]"
    ):
        check_matrix(path, {"blk.0.ffn_up.weight": (16, 5)})
    with pytest.raises(ConfigError, match="has no such tensor"):
        check_matrix(path, {})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a GGUF file"),
        (b"imatrix of the old format", "is not a GGUF file"),
        (gguf(KEYS, [], 0), "is not an importance matrix"),
        (gguf({}, TWO, 64), "is not an importance matrix"),
        (gguf(KEYS, TWO[:1], 32), "is not an importance matrix"),
        (gguf(KEYS | {"imatrix.datasets": string("docs.txt")}, TWO, 64), "is not an importance matrix"),
        (gguf(KEYS | {"imatrix.datasets": array(8, 0)}, TWO, 64), "is not an importance matrix"),
        (gguf(KEYS | {"imatrix.chunk_count": string("7")}, TWO, 64), "is not an importance matrix"),
        (gguf(KEYS, [TWO[0], (TWO[1][0], (3,), 0, 32)], 64), "has 8 sums for 3 counts"),
        (gguf(KEYS, [TWO[0], (TWO[1][0], (1, 2), 1, 32)], 64), "is not an importance matrix"),
        (gguf(KEYS, TWO, 39), "ends at byte"),
        (gguf(KEYS | {"x": struct.pack("<IIQ", 9, 4, 1 << 60)}, TWO, 64), "damaged or cut off"),
    ],
)
def test_what_is_no_matrix_is_refused(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_matrix(path)
    assert str(path) in caught.value.message
