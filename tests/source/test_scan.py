from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantool.source.scan
from quantool.errors import SourceError
from quantool.formats.safetensors import check_index
from quantool.runtime.process import call
from quantool.source.scan import require_finite, scan, scan_worker
from tests.checkpoint import write_shards
from tests.formats.test_safetensors import entry, raw


def ignore(done: float, total: float) -> None:
    """No progress wanted."""


def scanned(folder: Path, **values: np.ndarray[Any, Any]) -> dict[str, Any]:
    save_file(values, folder / "model.safetensors")
    return scan_worker({"folder": str(folder)}, ignore)


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    result = scan_worker({"folder": str(folder)}, ignore)
    files = sorted(folder.glob("*.safetensors"))
    assert list(result["files"]) == [file.name for file in files]
    for file in files:
        assert result["files"][file.name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert result["files"][file.name]["bytes"] == file.stat().st_size
    assert result["bytes"] == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_magnitude_is_found_whatever_its_sign(tmp_path: Path, dtype: Any, sign: int) -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype(dtype)
    values[617] = sign * 60000
    result = scanned(tmp_path, small=values[:500], big=values[500:])
    assert (result["max_abs"], result["max_abs_tensor"]) == (60000.0, "big")
    assert result["not_finite"] == []
    assert scanned(tmp_path, one=np.full(3, sign * 0.5, dtype))["max_abs"] == 0.5


def test_bf16_beyond_the_range_of_f16_is_seen(tmp_path: Path) -> None:
    bits = np.array([-3.0e38, 2.0, 1e-40], np.float32).view(np.uint32) >> 16
    raw(tmp_path / "model.safetensors", {"a": entry(0, 6, 3, dtype="BF16")}, bits.astype("<u2").tobytes())
    result = scan_worker({"folder": str(tmp_path)}, ignore)
    assert result["max_abs"] == pytest.approx(3.0e38, rel=0.01)


def test_nan_and_inf_are_counted_and_refused(tmp_path: Path) -> None:
    values = np.array([1, np.nan, -np.inf, np.inf, -np.nan, -7, np.nan], np.float32)
    result = scanned(tmp_path, sound=np.ones(4, np.float32), broken=values)
    assert result["not_finite"] == [{"name": "broken", "nan": 3, "inf": 2}]
    assert (result["max_abs"], result["max_abs_tensor"]) == (7.0, "broken")
    with pytest.raises(SourceError, match=r"broken \(3 NaN, 2 Inf\)"):
        require_finite(result)
    require_finite(scanned(tmp_path, sound=np.ones(4, np.float32)))


def test_nothing_but_nan_has_no_larger_magnitude(tmp_path: Path) -> None:
    result = scanned(tmp_path, a=np.full(5, np.nan, np.float16))
    assert (result["max_abs"], result["not_finite"]) == (0.0, [{"name": "a", "nan": 5, "inf": 0}])


def test_dtypes_that_are_not_scanned_are_named(tmp_path: Path) -> None:
    header = {"f8": entry(0, 2, 2, dtype="F8_E4M3"), "n": entry(2, 10, 1, dtype="I64")}
    raw(tmp_path / "model.safetensors", header, b"\xff" * 10)
    result = scan_worker({"folder": str(tmp_path)}, ignore)
    assert result["not_scanned"] == {"f8": "F8_E4M3", "n": "I64"}
    assert (result["max_abs"], result["max_abs_tensor"]) == (None, None)


def test_values_are_found_across_buffers_and_progress_ends_at_the_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantool.source.scan, "BUFFER", 64)
    values = np.arange(1000, dtype=np.float32)
    values[[15, 16, 999]] = [np.nan, np.inf, -5000]
    save_file({"a": values, "b": np.ones(3, np.float16)}, tmp_path / "model.safetensors")
    moves: list[tuple[float, float]] = []
    result = scan(tmp_path, check_index(tmp_path), lambda done, total: moves.append((done, total)))
    assert result["not_finite"] == [{"name": "a", "nan": 1, "inf": 1}]
    assert result["max_abs"] == 5000.0
    assert moves == sorted(moves)
    assert moves[-1] == (result["bytes"], result["bytes"])
    assert (
        result["files"]["model.safetensors"]["sha256"]
        == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(("change", "said"), [(-4, "shrank"), (4, "grew")])
def test_a_file_that_changes_under_the_scan_is_refused(tmp_path: Path, change: int, said: str) -> None:
    headers = check_index(write_shards(tmp_path))
    file = tmp_path / "model-00001-of-00002.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + change)
    with pytest.raises(SourceError, match=said):
        scan(tmp_path, headers, ignore)


def test_it_runs_as_a_worker_in_flat_memory(tmp_path: Path) -> None:
    size = 1 << 29
    file = raw(tmp_path / "model.safetensors", {"a": entry(0, size, size // 4, dtype="F32")})
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + size)
    request = {"folder": str(tmp_path)}
    result = call(measured_worker, request, log=tmp_path / "log")
    assert result["max_abs"] == 0.0
    assert result["peak_rss"] < 200e6


def measured_worker(request: dict[str, Any], report: Any) -> dict[str, Any]:
    result = scan_worker(request, report)
    # Not getrusage: its maximum includes what the parent held when it forked.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {**result, "peak_rss": 1024 * int(status.partition("VmHWM:")[2].split()[0])}
