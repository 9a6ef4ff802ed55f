"""Splitting a GGUF: the parts are upstream's byte for byte, planned to the byte, and survive an interruption."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from quantool.errors import QuantizationError
from quantool.formats.gguf_header import padded
from quantool.methods._llama_cpp import split as _shards
from quantool.runtime import process

SHAPES = {
    "a.weight": (64, 96),
    "b.weight": (3,),
    "c.weight": (5, 96),
    "d.weight": (2, 2, 40),
    "e.weight": (33,),
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A GGUF with keys of many types and five tensors of odd sizes."""
    path = tmp_path / "whole.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_float64("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "Gràcies \N{GRINNING FACE}")
    writer.add_array("a.tokens", ["<s>", "", "ñ"])
    writer.add_array("a.scores", [0.5, -1.0])
    for number, (name, shape) in enumerate(SHAPES.items()):
        writer.add_tensor(name, np.full(shape, number + 0.25, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def infos() -> tuple[list[int], list[int]]:
    """Bytes of the entries and of the padded data."""
    entries = [_shards.info_bytes(name, len(shape)) for name, shape in SHAPES.items()]
    return entries, [padded(4 * int(np.prod(shape))) for shape in SHAPES.values()]


def names(count: int) -> list[str]:
    return [f"m-F32-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def split(whole: Path, count: int, limit: int, size: int | None = None) -> list[Path]:
    folder = whole.parent / "parts"
    request = {"file": str(whole), "folder": str(folder), "names": names(count), "limit": limit,
               "bytes": whole.stat().st_size if size is None else size}  # fmt: skip
    _shards.split(request, lambda done, total: None)
    return [folder / name for name in names(count)]


def tensors(paths: list[Path]) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for path in paths for t in GGUFReader(path).tensors}


def test_parts_hold_what_the_file_held(whole: Path) -> None:
    before, reader = tensors([whole]), GGUFReader(whole)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    header = reader.data_offset
    found = split(whole, 3, 2500)
    assert not whole.exists()
    assert tensors(found) == before
    for number, path in enumerate(found):
        made = {n: f.contents() for n, f in GGUFReader(path).fields.items() if not n.startswith("GGUF.")}
        own = {"split.no": number, "split.count": 3, "split.tensors.count": len(SHAPES)}
        assert made == own | (keys if number == 0 else {})
    entries, sizes = infos()
    exact = header - 31  # padding hides the header's own length: any of the last 32 bytes
    planned = [_shards.part_bytes(exact + extra, entries, sizes, 2500) for extra in range(32)]
    assert [path.stat().st_size for path in found] in planned
    assert [size[1:] for size in planned].count([path.stat().st_size for path in found[1:]]) == 32


def test_a_tensor_above_the_limit_gets_a_part_of_its_own() -> None:
    assert _shards.parts([100, 10, 10, 90, 90], 100) == [range(1), range(1, 3), range(3, 4), range(4, 5)]
    assert _shards.parts([300, 10], 100) == [range(1), range(1, 2)]
    assert _shards.parts([50, 50], 100) == [range(2)]
    assert _shards.parts([50, 50, 50], 0) == [range(3)]


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_an_interrupted_split_goes_on(
    whole: Path, monkeypatch: pytest.MonkeyPatch, parts: int, cut: bool
) -> None:
    """A part is whole under its name before the file is cut; dead between the two, it is written again."""
    size, before, truncate, calls = whole.stat().st_size, tensors([whole]), os.truncate, []

    def dying(path: Path, length: int) -> None:
        calls.append(length)
        if cut or len(calls) < parts:
            truncate(path, length)
        if len(calls) == parts:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "truncate", dying)
    with pytest.raises(KeyboardInterrupt):
        split(whole, 3, 2500)
    monkeypatch.undo()
    assert whole.stat().st_size == (size if not cut and parts == 1 else calls[-1] if cut else calls[-2])
    made = {path: path.stat().st_mtime_ns for path in (whole.parent / "parts").iterdir()}
    assert len(made) == parts
    found = split(whole, 3, 2500, size)
    assert tensors(found) == before
    again = [path for path, stamp in made.items() if path.stat().st_mtime_ns != stamp]
    assert again == ([] if cut else [found[3 - parts]])


def test_what_was_not_planned_is_refused(whole: Path) -> None:
    with pytest.raises(QuantizationError, match=r"whole\.gguf makes 3 parts, 2 were planned"):
        split(whole, 2, 2500)
    assert whole.is_file()


def test_another_alignment_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_tensor("a.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QuantizationError, match="alignment of its own"):
        split(tmp_path / "odd.gguf", 1, 0)


def test_a_file_that_was_cut_off(whole: Path) -> None:
    size = whole.stat().st_size
    os.truncate(whole, size - 32)
    with pytest.raises(QuantizationError, match="tensors go on to"):
        split(whole, 3, 2500, size)
    assert not (whole.parent / "parts" / names(3)[2]).exists()


def test_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model at all, just text")
    with pytest.raises(QuantizationError, match="is not a GGUF file"):
        split(tmp_path / "text.gguf", 1, 0)


@pytest.mark.upstream
@pytest.mark.parametrize("limit", ["2M", "4M"])
def test_parts_are_those_of_llama_gguf_split(tmp_path: Path, limit: str) -> None:
    tool = making.upstream("llama-gguf-split")
    with making.own_cache():
        base = making.made("tiny-chat").base
    command = [str(tool), "--split", "--split-max-size", limit, str(base), str(tmp_path / "theirs")]
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=process.environment())
    theirs = sorted(tmp_path.glob("theirs-*.gguf"))
    if not theirs:  # upstream does not split where the first tensor is above the limit
        assert "0 tensors" in said.stderr
        return
    whole = Path(shutil.copy(base, tmp_path / "whole.gguf"))
    ours = split(whole, len(theirs), int(limit[:-1]) * 10**6)
    assert len(theirs) > 1
    for our, their in zip(ours, theirs, strict=True):
        assert our.read_bytes() == their.read_bytes()


@pytest.mark.upstream
def test_llama_gguf_split_merges_the_parts(tmp_path: Path) -> None:
    tool = making.upstream("llama-gguf-split")
    with making.own_cache():
        one = making.made("tiny-chat")
    file = one.folder / one.artifacts[0].files[0].name
    whole = Path(shutil.copy(file, tmp_path / "whole.gguf"))
    sizes = [padded(int(tensor.n_bytes)) for tensor in GGUFReader(file).tensors]
    found = split(whole, len(_shards.parts(sizes, 10**6)), 10**6)
    merged = tmp_path / "merged.gguf"
    subprocess.run(
        [str(tool), "--merge", str(found[0]), str(merged)],
        capture_output=True, text=True, check=True, env=process.environment(),
    )  # fmt: skip
    assert tensors([merged]) == tensors([file])
    before: dict[str, Any] = making.keys(file)
    assert {k: v for k, v in making.keys(merged).items() if not k.startswith("split.")} == before
