from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from quantool.errors import SourceError
from quantool.formats.safetensors import INDEX, check_index, read_headers
from quantool.formats.safetensors_layout import write_skeleton
from tests.checkpoint import tensors, write_checkpoint, write_json, write_shards

SECOND = "model-00002-of-00002.safetensors"


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, *shape: int, dtype: str = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_headers_say_where_the_data_lies(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path) / "model.safetensors"
    headers = read_headers([file])
    content = file.read_bytes()
    assert set(headers) == set(tensors())
    for name, tensor in tensors().items():
        header = headers[name]
        assert content[header.start : header.end] == tensor.tobytes()
        assert (header.shape, header.elements, header.bytes) == (tensor.shape, tensor.size, tensor.nbytes)
        assert header.dtype == {"float16": "F16", "float32": "F32"}[str(tensor.dtype)]
        assert header.file == "model.safetensors"


def test_scalars_empty_tensors_and_half_bytes_are_sound(tmp_path: Path) -> None:
    header = {"s": entry(0, 2), "e": entry(2, 2, 0, 4), "f": entry(2, 4, 4, dtype="F4")}
    headers = read_headers([raw(tmp_path / "a.safetensors", header, b"1234")])
    assert [headers[name].bytes for name in "sef"] == [2, 0, 2]


def test_a_truncated_file_names_expected_and_actual_bytes(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path) / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 10)
    with pytest.raises(
        SourceError, match=rf"model.safetensors is truncated: {size} bytes expected, {size - 10} found"
    ):
        read_headers([file])
    with file.open("r+b") as stream:
        stream.truncate(40)
    with pytest.raises(SourceError, match=r"truncated: at least \d+ bytes expected, 40 found"):
        read_headers([file])


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"", b"", "not a safetensors file"),
        (b"[1]", b"", "not a JSON object"),
        (b'{"a": ', b"", "not sound JSON"),
        (b"\xff\xfe{}", b"", "not sound JSON"),
        (b"[" * 100_000, b"", "not sound JSON"),
        (b'{"a": {}, "a": {}}', b"", "'a' occurs twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "a number of more than 40 digits"),
        (b'{"\\ud800": {}}', b"", "half of a character"),
        ({"a": {"dtype": "F16"}}, b"", "entry for 'a'"),
        ({"a": entry(0, 2, 10**30, 10**30)}, b"12", "entry for 'a'"),
        ({"a": entry(0, 2, *[1] * 100)}, b"12", "entry for 'a'"),
        ({"a": entry(0, 2, 2**62, 2**62)}, b"12", "its offsets give 2"),
        ({"a": {"dtype": "F16", "shape": [True], "data_offsets": [0, 2]}}, b"12", "entry for 'a'"),
        ({"a": entry(0, 1, 3, dtype="F4")}, b"1", "needs 1.5 bytes"),
        ({"a": entry(0, 2, -1)}, b"12", "entry for 'a'"),
        ({"a": entry(0, 2, 1, dtype="Q9")}, b"12", "unknown dtype 'Q9'"),
        ({"a": entry(0, 4, 1)}, b"1234", "needs 2 bytes, its offsets give 4"),
        ({"a": entry(2, 4, 1)}, b"1234", "leaves a hole"),
        ({"a": entry(0, 2, 1), "b": entry(0, 2, 1)}, b"12", "'b' overlaps"),
        ({"a": entry(0, 2, 1)}, b"123", "data that no tensor claims"),
    ],
)
def test_a_header_that_is_not_sane_is_refused(tmp_path: Path, header: Any, data: bytes, said: str) -> None:
    file = raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(SourceError, match=said) as caught:
        read_headers([file])
    assert str(file) in caught.value.message


NUMBERS = st.sampled_from([0, 1, 2, 4, -1, 2**63, 10**38, 0.5, True, None, "1"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "F4", "Q9", 3]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3),
    }
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | NUMBERS), st.binary(max_size=8))
def test_any_header_is_sound_or_a_source_error(header: Any, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(SourceError):
        for tensor in read_headers([raw(Path(folder) / "a.safetensors", header, data)]).values():
            assert 0 <= tensor.start <= tensor.end
            assert tensor.elements * 16 >= tensor.bytes * 4


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"format": "pt"}}, {"a": entry(0, 0, 0, 4)}])
def test_files_without_weights_are_refused(tmp_path: Path, header: Any) -> None:
    raw(tmp_path / "model.safetensors", header)
    with pytest.raises(SourceError, match="the weight files hold no weights"):
        check_index(tmp_path)


def test_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(SourceError, match="Git LFS pointer"):
        read_headers([file])


def test_a_missing_file_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read .*none.safetensors"):
        read_headers([tmp_path / "none.safetensors"])


def test_shards_that_agree_with_their_index_pass(tmp_path: Path) -> None:
    headers = check_index(write_shards(tmp_path))
    assert set(headers) == set(tensors())
    assert headers["lm_head.weight"].file == SECOND


def drop_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def drop_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        write_json(folder / INDEX, content)

    return edit


def duplicate(folder: Path) -> None:
    save_file({**load_file(folder / SECOND), "model.embed_tokens.weight": np.zeros(2)}, folder / SECOND)


def add_single(folder: Path) -> None:
    save_file(tensors(), folder / "model.safetensors")


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def nothing(folder: Path) -> None:
    only_pickles(folder)
    (folder / "pytorch_model.bin").unlink()


def adapter(folder: Path) -> None:
    nothing(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"")


def misnamed(folder: Path) -> None:
    nothing(folder)
    (folder / "consolidated.safetensors").write_bytes(b"")


def gguf(folder: Path) -> None:
    nothing(folder)
    (folder / "a-Q8_0.gguf").write_bytes(b"")


def index_text(text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / INDEX).write_text(text)

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop_shard, f"1 of 2 shards are missing: {SECOND}"),
        (drop_index, f"shards without {INDEX}"),
        (
            edit_index(lambda m: m.update({"ghost": SECOND})),
            f"puts tensor 'ghost' in {SECOND}, but no shard has it",
        ),
        (
            edit_index(lambda m: m.update({"model.embed_tokens.weight": SECOND})),
            "but it is in model-00001-of-00002",
        ),
        (edit_index(lambda m: m.pop("lm_head.weight")), "'lm_head.weight', which .* does not name"),
        (edit_index(lambda m: m.update({"x": "../other.safetensors"})), "no safetensors file beside it"),
        (duplicate, "'model.embed_tokens.weight' is in model-00001.* and again in"),
        (add_single, "model.safetensors beside shards"),
        (only_pickles, "weights are pickles .pytorch_model.bin"),
        (nothing, "no weights"),
        (adapter, "is an adapter"),
        (misnamed, "consolidated.safetensors found"),
        (gguf, "holds GGUF"),
        (index_text("{"), "index.json:1:2: not JSON"),
        (index_text('{"weight_map": {}}'), "no weight_map"),
    ],
)
def test_an_index_that_disagrees_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(write_shards(tmp_path))
    with pytest.raises(SourceError, match=said):
        check_index(tmp_path)


def test_pickles_say_how_to_convert(tmp_path: Path) -> None:
    only_pickles(write_shards(tmp_path))
    with pytest.raises(SourceError) as caught:
        check_index(tmp_path)
    assert "safetensors" in caught.value.hint


def test_pickles_beside_safetensors_are_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert set(check_index(tmp_path)) == set(tensors())


@pytest.mark.parametrize("write", [write_checkpoint, write_shards])
def test_a_skeleton_has_the_same_headers_and_no_data(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    headers = check_index(write(tmp_path / "whole"))
    write_skeleton(headers, tmp_path / "skeleton")
    shape = {name: (h.dtype, h.shape, h.file, h.bytes) for name, h in headers.items()}
    copied = check_index(tmp_path / "skeleton")
    assert {name: (h.dtype, h.shape, h.file, h.bytes) for name, h in copied.items()} == shape
    for file in (tmp_path / "skeleton").glob("*.safetensors"):
        assert all(not tensor.any() for tensor in load_file(file).values())


def test_a_skeleton_of_a_huge_model_takes_no_space(tmp_path: Path) -> None:
    size = 1 << 36
    (tmp_path / "big").mkdir()
    file = raw(tmp_path / "big" / "model.safetensors", {"a": entry(0, size, size // 2)})
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + size)
    write_skeleton(check_index(tmp_path / "big"), tmp_path / "skeleton")
    status = (tmp_path / "skeleton" / "model.safetensors").stat()
    assert status.st_size > size
    assert status.st_blocks * 512 < 1 << 20
