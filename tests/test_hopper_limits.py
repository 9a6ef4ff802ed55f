"""What tests/hopper.py prints beside the seconds of workers: bounds by the bytes of their own output; its texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import hopper, hopper_limits


def test_a_workers_bound_is_of_the_output_that_its_log_is_named_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(bytes(1000))
    (tmp_path / "records").mkdir()
    sizes = {"fp8-FP8_DYNAMIC": [700], "awq-W4A16": [300, 20], "gguf-Q4_K_M": [250, 50]}
    for name, files in sizes.items():
        made = {"files": [{"name": f"{number}", "bytes": size} for number, size in enumerate(files)]}
        (tmp_path / "records" / f"{name}.artifact.json").write_text(json.dumps(made))
    work = {
        "fp8-FP8_DYNAMIC": "quantool.methods._compressed.stream:quantize",
        "awq-W4A16": "quantool.methods._compressed.torchrun:quantize",
        "quantize-Q4_K_M": "quantool.methods._llama_cpp.quantize:quantize",
        "gptq-W8A8": "quantool.methods._compressed.calibrate:quantize",
    }
    calls = [{"work": worker, "log": log, "begin": 0, "end": 2, "marks": []} for log, worker in work.items()]
    (tmp_path / "calls.jsonl").write_text("\n".join(map(json.dumps, calls)))
    hopper_limits.show(
        tmp_path / "calls.jsonl", tmp_path / "model", tmp_path, hopper_limits.Speeds(write=100.0, read=500.0)
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["7.0", "5.2", "3.0", "nan"]


def test_samples_of_a_long_text_do_not_repeat() -> None:
    text = hopper.long_text(hopper.ROUNDS)
    samples = [text[start : start + 1800] for start in range(0, len(text), 1800)]  # of 512 tokens
    assert len(samples) > 128
    assert [sample for sample in samples if text.count(sample) > 1] == []
    assert text == hopper.long_text(hopper.ROUNDS)
