"""Headers of GGUF files: what a sound one says, and that a damaged one costs neither time nor memory."""

from __future__ import annotations

import random
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from quantool.errors import SourceError
from quantool.formats import gguf_header
from quantool.formats.gguf_header import MOST_STRINGS, read_header, read_shards, shard_names
from tests.gguf_bytes import array, gguf, i32, string, text, u16, u32, write_shards

HUGE = (1 << 64) - 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model-F32.gguf"


def refused(path: Path, content: bytes, reason: str) -> None:
    """The file is refused with one line, within a second and 64 MB."""
    path.write_bytes(content)
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(SourceError, match=reason) as caught:
        read_header(path)
    assert time.process_time() - begun < 1
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert path.name in caught.value.message
    assert str(path.parent) not in caught.value.message  # findings are published
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_what_a_writer_of_the_field_wrote_is_read_back(path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    written = {"a.flag": True, "a.text": "Gràcies \N{GRINNING FACE}"}
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", str(written["a.text"]))
    writer.add_float64("a.float", 0.5)
    writer.add_int64("a.negative", -(1 << 40))
    writer.add_array("tokenizer.tokens", ["<s>", "", "ñ"])
    writer.add_array("a.scores", [0.5, -1.0])
    data = np.arange(3 * 5 * 32, dtype=np.float32).reshape(3, 5, 32)
    writer.add_tensor("x.weight", data)
    writer.add_tensor("odd.weight", np.ones(3, np.float32))
    blocks = np.arange(2 * 34, dtype=np.uint8).reshape(2, 34)
    writer.add_tensor("y.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(path)
    assert {key: header.value(key) for key in written} == written
    assert (header.value("a.float"), header.value("a.negative")) == (0.5, -(1 << 40))
    assert header.value("tokenizer.tokens") == ["<s>", "", "ñ"]
    assert header.value("a.scores") == [0.5, -1.0]
    assert (header.value("none"), header.value("none", 7)) == (None, 7)
    assert header.keys(without=("tokenizer.", "a.")) == {"general.architecture": "llama"}
    first, odd, second = header.tensors
    assert (first.name, first.type, first.shape, first.block) == ("x.weight", "f32", (3, 5, 32), 1)
    assert (odd.bytes, odd.elements) == (12, 3)
    assert (second.type, second.number, second.shape, second.bytes) == ("q8_0", 8, (2, 32), 68)
    assert first.start == header.data
    assert np.array_equal(header.read_data(first).view(np.float32).reshape(first.shape), data)
    assert np.array_equal(header.read_data(second), blocks.reshape(-1))


NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000))
DAMAGED = {
    "nothing": (b"", "is not a GGUF file"),
    "magic": (b"GGUG" + gguf()[4:], "is not a GGUF file"),
    "version 1": (gguf(version=1), "is of GGUF version 1"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "tensors": (gguf(counts=(HUGE, 0)), "18446744073709551615 tensors"),
    "keys": (gguf(counts=(1, HUGE)), "18446744073709551615 keys"),
    "more keys than there are": (gguf(counts=(1, 100_000)), "damaged"),
    "array of 10^9 bytes": (gguf({"k": array(0, 10**9)}), "wants 1000000000 bytes"),
    "array of 2^64 numbers": (gguf({"k": array(4, HUGE)}), "wants 73786976294838206460 bytes"),
    "array of 10^9 strings": (gguf({"k": array(8, 10**9)}), "'k' is said to have 1000000000 strings"),
    "array of strings that are not there": (gguf({"k": array(8, MOST_STRINGS)}), "the file has"),
    "nested arrays": (gguf({"k": struct.pack("<I", 9) + NESTED}), "'k' is an array of arrays"),
    "array of an unknown type": (gguf({"k": array(13, 1)}), "unknown type 13"),
    "unknown type": (gguf({"k": struct.pack("<I", 77)}), "'k' has the unknown type 77"),
    "long string": (gguf({"k": struct.pack("<IQ", 8, HUGE)}), "wants 18446744073709551615 bytes"),
    "key that is not UTF-8": (gguf().replace(b"a" + struct.pack("<I", 1), b"\xff" + struct.pack("<I", 1)), "UTF-8"),
    "key of 100 kB": (gguf({"k" * 100_000: struct.pack("<I", 77)}), "unknown type 77"),
    "key twice": (gguf([("k", u32(1)), ("k", u32(2))]), "the key 'k' occurs twice"),
    "key without a name": (gguf({"": u32(1)}), "a key has no name"),
    "dimension 0": (gguf(infos=[("a", (32, 0), 0, 0)]), r"'a' has a dimension of 0: \[32, 0\]"),
    "dimensions": (gguf(infos=[("a", (1,) * 5, 0, 0)]), "'a' has 5 dimensions"),
    "2^32 dimensions": (gguf(infos=[])[:-128] + text("a") + struct.pack("<I", 0xFFFFFFFF), "cut off"),
    "elements": (gguf(infos=[("a", (HUGE, HUGE, HUGE, HUGE), 0, 0)]), "'a' ends at byte"),
    "type": (gguf(infos=[("a", (32,), 250, 0)]), "'a' has the type 250, which this llama.cpp does not know"),
    "one number in blocks": (gguf(infos=[("a", (), 8, 0)]), "rows of 1 weights, no multiple of q8_0's 32"),
    "rows": (gguf(infos=[("a", (33,), 8, 0)]), "rows of 33 weights, no multiple of q8_0's 32"),
    "offset": (gguf(infos=[("a", (32,), 0, HUGE)]), "the data of 'a' begins at 18446744073709551615, expected 0"),
    "hole": (gguf(infos=[("a", (32,), 0, 0), ("b", (32,), 0, 160)]), "'b' begins at 160, expected 128"),
    "twice": (gguf(infos=[("a", (32,), 0, 0), ("a", (32,), 0, 128)]), "the tensor 'a' occurs twice"),
    "name": (gguf(infos=[("a" * 64, (32,), 0, 0)]), "a tensor's name has 64 bytes"),
    "data cut off": (gguf(data=127), "'a' ends at byte"),
    "alignment 0": (gguf({"general.alignment": u32(0)}), "alignment is not a power of two"),
    "alignment 48": (gguf({"general.alignment": u32(48)}), "alignment is not a power of two"),
    "alignment of another type": (gguf({"general.alignment": u16(64)}), "alignment is not a power of two"),
    "alignment, last": (gguf({"general.alignment": struct.pack("<IB", 0, 32)}), "alignment is not a power"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused_at_once(path: Path, case: str) -> None:
    content, reason = DAMAGED[case]
    if case == "2^32 dimensions":
        content = content.replace(struct.pack("<IQQ", 3, 0, 0), struct.pack("<IQQ", 3, 1, 0))
    refused(path, content, reason)


def test_a_header_has_a_limit_however_large_the_file_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MOST_BYTES", 1 << 16)
    path.write_bytes(gguf({"k": array(0, 1 << 30)}))
    with path.open("r+b") as file:
        file.truncate(1 << 34)  # sparse: the array fits into the file
    with pytest.raises(SourceError, match="wants 1073741824 bytes"):
        read_header(path)


def test_text_that_is_not_utf8_is_found_when_asked_for(path: Path) -> None:
    path.write_bytes(gguf({"k": struct.pack("<IQ", 8, 2) + b"\xff\xfe"}))
    header = read_header(path)
    with pytest.raises(SourceError, match="k is not UTF-8"):
        header.value("k")


def test_alignments_of_their_own_are_kept(path: Path) -> None:
    path.write_bytes(gguf({"general.alignment": u32(64)}, [("a", (1,), 0, 0), ("b", (1,), 0, 64)], 128))
    header = read_header(path)
    assert header.data % 64 == 0
    assert [tensor.start - header.data for tensor in header.tensors] == [0, 64]


def test_no_flip_of_bits_is_a_traceback(path: Path) -> None:
    """Every byte of a header changed at random: read, or refused with an error of ours."""
    sound = gguf(
        {"general.architecture": string("llama"), "tokens": array(8, 3, text("a") + text("b") + text("")), "n": i32(-1)},
        [("a", (32, 2), 8, 0), ("b", (4,), 0, 96)], 128,
    )  # fmt: skip
    path.write_bytes(sound)
    assert len(read_header(path).tensors) == 2
    chosen = random.Random(0)
    refusals = 0
    for at in range(len(sound) - 128):
        content = bytearray(sound)
        content[at] = chosen.choice((0, 1, 0x7F, 0x80, 0xFF, content[at] ^ (1 << chosen.randrange(8))))
        path.write_bytes(content)
        try:
            header = read_header(path)
            header.keys()
        except SourceError:
            refusals += 1
    assert refusals > 100


def test_shards_are_named_as_llama_cpp_names_them() -> None:
    assert shard_names("m-Q8_0.gguf", 1) == ["m-Q8_0.gguf"]
    assert shard_names("m-Q8_0.gguf", 2) == ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]


def test_shards_that_belong_together(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path, "m", [["a", "b"], ["c"]])
    headers = read_shards(first)
    assert [header.path for header in headers] == [first, second]
    assert [tensor.name for header in headers for tensor in header.tensors] == ["a", "b", "c"]
    with pytest.raises(SourceError, match="is not the first shard") as caught:
        read_shards(second)
    assert caught.value.hint == f"give {first.name}"
    second.unlink()
    with pytest.raises(SourceError, match=f"there is no {second.name}"):
        read_shards(first)


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf"])
def test_shard_numbers_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gguf())
    with pytest.raises(SourceError, match="no file is number"):
        read_shards(tmp_path / name)


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path, "m", [["a", "b"], ["c"]])
    shutil.copyfile(first, second)
    with pytest.raises(SourceError, match=r"is number 2 of 2 by its name, but its split\.no is 0 \(from 0\)"):
        read_shards(first)
    other = write_shards(tmp_path / "..", "other", [["a", "x"], ["a"]])[1]
    shutil.move(other, second)
    with pytest.raises(SourceError, match="both hold the tensor 'a'"):
        read_shards(first)
    other = write_shards(tmp_path / "..", "other", [["a"], ["c", "d"]])[1]
    shutil.move(other, second)
    with pytest.raises(SourceError, match=r"4 tensors in all shards, split\.tensors\.count is 3"):
        read_shards(first)


def test_a_model_of_99999_shards_is_not_listed_whole(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-99999.gguf").write_bytes(gguf())
    with pytest.raises(SourceError, match="and 99995 more") as caught:
        read_shards(tmp_path / "m-00001-of-99999.gguf")
    assert len(caught.value.message) < 300
