"""How much of a large file is read back: the whole header, however long."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantool.publish import verify
from quantool.publish.verify import ends_of, header_bytes
from quantool.records import FileRecord, Upload, sha256_of
from quantool.runtime.toolchain import prefer_own_gguf
from tests.loopback import GGUFS, REPO, edit
from tests.loopback_hub import Fault, sha256
from tests.pushing import WritableHub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own PUT


def write_gguf(path: Path, tokens: int) -> int:
    """A file with every kind of key; where gguf's own reader finds the data."""
    prefer_own_gguf()
    from gguf import GGUFReader, GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 1)
    writer.add_int64("a.i64", -1)
    writer.add_float64("a.f64", 1.5)
    writer.add_bool("a.bool", True)
    writer.add_array("a.ints", [1, 2, 3])
    writer.add_token_list([f"token {number}" for number in range(tokens)])
    writer.add_string("a.text", "é" * 9)
    for name in ("one", "two"):
        writer.add_tensor(name, np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return int(GGUFReader(path).data_offset)


@pytest.mark.parametrize("tokens", [3, 100_000])
def test_the_header_of_a_gguf_is_measured(tmp_path: Path, tokens: int) -> None:
    data = write_gguf(tmp_path / "x.gguf", tokens)
    with (tmp_path / "x.gguf").open("rb") as file:
        found = header_bytes(file)
    assert data - 32 < found <= data  # the data is aligned to 32 bytes
    if tokens > 3:
        assert found > verify.HEAD


def test_the_header_of_safetensors_is_measured(tmp_path: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("rb") as file:
        assert header_bytes(file) == (tmp_path / "x.safetensors").stat().st_size - 16
    for content in (b"", b"0.0001\n", b"some other text, long enough for a header"):
        (tmp_path / "other").write_bytes(content)
        with (tmp_path / "other").open("rb") as file:
            assert header_bytes(file) == 0


def test_all_of_a_long_header_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "HEAD", 100)
    monkeypatch.setattr(verify, "TAIL", 10)
    data = write_gguf(tmp_path / "x.gguf", 500)
    content = (tmp_path / "x.gguf").read_bytes()
    head, tail = ends_of(tmp_path / "x.gguf")
    assert (head.start, tail.start, tail.bytes) == (0, len(content) - 10, 10)
    assert data - 32 < head.bytes <= data
    assert (head.sha256, tail.sha256) == (sha256(content[: head.bytes]), sha256(content[-10:]))


def test_damage_far_into_a_header_is_found(
    publish: Callable[..., Any], folder: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes beyond the first megabyte differ on the Hub, which claims the right hash."""
    monkeypatch.setattr(verify, "HEAD", 100)
    monkeypatch.setattr(verify, "TAIL", 10)
    path = folder / GGUFS[0]
    before = path.read_bytes()
    write_gguf(path, 500)
    _renew(folder, before)
    right = path.read_bytes()
    middle = 4000
    wrong = right[:middle] + b"?" + right[middle + 1 :]

    def serve_wrong() -> None:
        hub.repositories[REPO].files[GGUFS[0]] = wrong

    hub.faults = [Fault(f"GET .*/resolve/.*{GGUFS[0]}", "none", before=serve_wrong)]
    ended = publish()
    assert (ended.code, f"{GGUFS[0]}: the bytes read back differ" in ended.err) == (6, True), ended.err


def _renew(folder: Path, before: bytes) -> None:
    """Let records and sums name the file as it is now."""
    path = folder / GGUFS[0]

    def change(record: dict[str, Any]) -> None:
        text = json.dumps(record).replace(sha256(before), sha256_of(path))
        record.clear()
        record.update(json.loads(text))

    edit(folder, change)
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(sha256(before), sha256_of(path)))


def test_an_upload_tells_what_will_be_read_back(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", 3)
    file = FileRecord(name="x.gguf", bytes=1, sha256="0" * 64)
    upload = Upload(file=file, sample="", ends=ends_of(tmp_path / "x.gguf"))
    assert Upload.model_validate_json(upload.model_dump_json()) == upload
