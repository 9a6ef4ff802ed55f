"""Preparing tensors ahead of the writer changes no byte, holds no more than it may, and fails as upstream does."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any, cast

import gguf
import making
import numpy as np
import pytest
import torch

from quantool.methods._llama_cpp import base_file, convert, convert_ahead
from quantool.methods.gguf import Options
from quantool.runtime import process, toolchain
from quantool.runtime.progress import Progress
from quantool.source.resolve import resolve
from tests.upstream_conversion import convert_as_upstream


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "kind"),
    [("moe", "f16"), ("gemma3", "bf16"), ("spm_llama", "f16"), ("spm_llama", "f32"), ("tiny", "bf16")],
)
def test_bytes_are_those_of_upstream(name: str, kind: str, tmp_path: Path) -> None:
    folder = making.TINY if name == "tiny" else making.model(name)
    source = resolve(making.config(folder, tmp_path, "Q8_0"), weights=True, progress=Progress(quiet=True))
    options = Options(pre_tokenizer=None if name in ("spm_llama", "gemma3") else "qwen2")
    tools = toolchain.locate()
    hashes = []
    for number, work in enumerate((convert_as_upstream, convert.convert)):
        request = base_file.conversion(source, options, kind, tools, tmp_path / "metadata.json")
        request |= {"model": str(folder), "output": str(tmp_path / f"{number}.gguf"), "threads": 3}
        (file,) = process.call(work, request, log=tmp_path / "log")["files"]
        hashes.append(hashlib.sha256(Path(file).read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


def lazy(array: np.ndarray[Any, Any], made: Any = None) -> Any:
    """A lazy tensor that ``made`` (by default the array itself) is the value of."""
    meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape(array.dtype, array.shape)
    return gguf.LazyNumpyTensor(meta=meta, args=(), func=cast("Any", made or (lambda: array)))


def writer_of(path: Path, tensors: dict[str, Any]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    return writer


def test_no_more_is_prepared_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_ahead, "SLACK", 0)
    alive, most, lock = 0, 0, threading.Lock()

    def made(number: int) -> np.ndarray[Any, Any]:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.005)
        with lock:
            alive -= 1
        return np.full((64, 32), number, np.float32)

    tensors = {
        f"t{number}": lazy(np.zeros((64, 32), np.float32), lambda number=number: made(number))
        for number in range(24)
    }
    writer = writer_of(tmp_path / "a.gguf", tensors)
    with convert_ahead.prepared_ahead(writer, gguf, 8):
        writer.write_tensors_to_file()
    writer.close()
    assert most == 2  # eight threads, and room for two tensors
    read = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    assert [float(tensor.data[0, 0]) for tensor in read] == [*map(float, range(24))]


def test_what_preparing_raises_is_raised_by_the_writer(tmp_path: Path) -> None:
    def broken() -> Any:
        raise ValueError("a shard is missing")

    zeros = np.zeros((4, 32), np.float32)
    tensors = {"a": lazy(zeros), "b": lazy(zeros, broken), **{f"c{n}": lazy(zeros) for n in range(9)}}
    writer = writer_of(tmp_path / "a.gguf", tensors)
    with (
        pytest.raises(ValueError, match="a shard is missing"),
        convert_ahead.prepared_ahead(writer, gguf, 2),
    ):
        writer.write_tensors_to_file()
    writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]


def test_a_writer_with_another_order_is_noticed(tmp_path: Path) -> None:
    zeros = np.zeros((4, 32), np.float32)
    writer = writer_of(tmp_path / "a.gguf", {"a": lazy(zeros), "b": lazy(zeros)})
    with convert_ahead.prepared_ahead(writer, gguf, 2):
        second = cast("Any", writer.tensors[0]["b"].tensor)
        with (tmp_path / "b").open("wb") as file, pytest.raises(AssertionError, match="another order"):
            second.tofile(file)
    writer.close()


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_torch_rounds_as_upstream_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bf16 numbers, and a million others, among them ties, subnormal numbers and the largest."""
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    more = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    ties = (np.arange(1 << 17, dtype=np.uint32) << 12) + np.uint32(0x38000000)
    values = np.concatenate([patterns, more, ties]).view(np.float32)
    values = values[np.isfinite(values)]
    values = values[: len(values) // 32 * 32].reshape(-1, 32)
    wanted = getattr(gguf.GGMLQuantizationType, kind)
    with np.errstate(over="ignore"):
        expected = gguf.quants.quantize(values, wanted)
    monkeypatch.setattr(gguf.quants, "quantize", gguf.quants.quantize)
    convert_ahead.round_with_torch(gguf)
    found = gguf.LazyNumpyTensor.to_eager(gguf.quants.quantize(lazy(values), wanted))
    assert found.tobytes() == expected.tobytes()


def test_widening_alone_is_skipped_and_nothing_else() -> None:
    class Lazy(gguf.LazyBase):
        """A lazy torch tensor, as upstream's converter has it."""

        _tensor_type = torch.Tensor

        @classmethod
        def meta_with_dtype_and_shape(cls, dtype: Any, shape: Any) -> Any:
            return torch.empty(tuple(shape), dtype=dtype, device="meta")

    def as_numpy(tensor: Any) -> Any:
        meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape(np.float32, tuple(tensor.shape))
        return gguf.LazyNumpyTensor(meta=meta, args=(tensor,), func=lambda t: t.numpy())

    short = Lazy.from_eager(torch.arange(64, dtype=torch.float32).reshape(2, 32).to(torch.bfloat16))
    widened = as_numpy(short.to(torch.float32))
    assert convert_ahead._before_widening(widened) is short
    moved = as_numpy(short.to(torch.float32) + 1)
    assert convert_ahead._before_widening(moved) is moved
    reread = as_numpy(short.view(torch.float32))
    assert convert_ahead._before_widening(reread) is reread


def test_conversion_is_remembered_by_the_code_that_rounds(tmp_path: Path) -> None:
    source = resolve(
        making.config(making.TINY, tmp_path, "Q8_0"), weights=True, progress=Progress(quiet=True)
    )
    recipe = json.dumps(base_file.recipe(source, Options(), toolchain.locate(), "f16"), default=str)
    for module in (convert, convert_ahead):
        assert hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() in recipe
