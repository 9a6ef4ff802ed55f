"""What a plan says of checkpoints of every structure: each tensor and file has a line that explains it, or it is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import ledger_structures
import pytest

from quantool import pipeline
from quantool.config.schema import Config
from quantool.errors import ConfigError, SourceError
from quantool.formats.safetensors import check_index
from quantool.ledger import Fate, Ledger, names
from quantool.records import Plan
from quantool.runtime.progress import Progress

FP8 = {"method": "fp8", "quant_level": "FP8_DYNAMIC"}
CAST = {"method": "fp16", "quant_level": "BF16", "quantization_config": {"format": "safetensors"}}
SECONDS = 5
"""Processor time that a plan from headers may take, the processes that it starts and waits for among it."""

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gemma3": (FP8, r"vision \(\d+ tensors, [\d,]+ weights\), which nothing here judges", r"drop: \[vision\]"),
    "qwen3_vl": (FP8, "qwen3_vl cannot be judged: transformers loads Qwen3VLForConditionalGeneration", "language model"),
    "qwen3_5": (CAST, "holds more than a language model: vision", r"drop: \[vision\]"),
    "llama4": (CAST, "holds more than a language model: vision", r"drop: \[vision\]"),
    "mistral3": (CAST, "mistral3 cannot be judged", "language model"),
    "vision promised": (CAST, "config.json has a section for vision, but no tensor", "fetch the rest"),
    "drafting head promised": (CAST, r"promises 1 layer of multi-token .* neither model\.layers\.2\.eh_proj", r"drop: \[mtp\]"),
    "relative encoder": (CAST, "max_position_embeddings is None", "a model of type t5 keeps it elsewhere"),
    "audio": (CAST, "audio cannot be judged", "language model"),
    "eyes and ears": (CAST, "vision .*, audio .*, which nothing here judges", r"drop: \[vision, audio\]"),
    "voice": (CAST, "voice cannot be judged", "language model"),
    "already quantized": (CAST, "already quantized", "bf16"),
    "fused experts": (FP8, "hold all experts of a layer in one tensor", "a tensor per expert"),
}  # fmt: skip
"""Structure to method, message and hint."""
EXPLAINED = [
    (name, method)
    for name in ledger_structures.STRUCTURES
    for method in ("fp8", "fp16")
    if name not in REFUSED or (name, method) == ("fused experts", "fp16")
]  # fmt: skip


def spent() -> float:
    """Processor seconds of this process and of those that it has waited for: a busy machine does not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def planned(folder: Path, method: dict[str, Any], **keys: Any) -> Plan:
    started = spent()
    wanted = {
        "output_path": str(folder.parent / "out"),
        "validation": {"checks": ["ledger"]},
        **method,
        **keys,
    }
    config = Config.model_validate({"model_id": str(folder), **wanted})
    made = pipeline.plan(config, Progress(quiet=True))
    assert spent() - started < SECONDS
    return made


def ledger(plan: Plan) -> Ledger:
    found = plan.outputs[0].ledger
    assert found is not None
    return found


def test_there_are_25() -> None:
    assert len(ledger_structures.STRUCTURES) >= 25


@pytest.mark.parametrize(("name", "method"), EXPLAINED)
def test_every_line_is_explained(tmp_path: Path, name: str, method: str) -> None:
    folder = ledger_structures.write(name, tmp_path / name.replace(" ", "-"))
    found = ledger(planned(folder, FP8 if method == "fp8" else CAST))
    listed = sorted(name for line in found.tensors for name in names(line.name) if line.name)
    assert listed == sorted(check_index(folder))
    for line in found.tensors:
        assert line.to or line.reason or line.fate is Fate.TIED, line
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {line.name for line in found.files} == files
    for file in found.files:
        assert file.fate is Fate.COPIED or file.reason, file


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_judged_is_refused(tmp_path: Path, name: str) -> None:
    method, message, hint = REFUSED[name]
    folder = ledger_structures.write(name, tmp_path / name.replace(" ", "-"))
    with pytest.raises(SourceError, match=message) as refused:
        planned(folder, method)
    assert re.search(hint, refused.value.hint)


def test_half_of_the_shards_is_missing(tmp_path: Path) -> None:
    folder = ledger_structures.write("dense", tmp_path / "half", shards=4)
    for number in (2, 4):
        (folder / f"model-{number:05d}-of-00004.safetensors").unlink()
    with pytest.raises(SourceError, match="2 of 4 shards are missing"):
        planned(folder, FP8)


def test_a_part_that_is_not_there_cannot_be_left_out(tmp_path: Path) -> None:
    folder = ledger_structures.write("dense", tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"drop: vision, but the checkpoint has no such part"):
        planned(folder, FP8, drop=["vision"])


@pytest.mark.parametrize(("name", "part"), [("gemma3", "vision"), ("drafting head", "mtp")])
def test_a_method_that_keeps_a_part_cannot_leave_it_out(tmp_path: Path, name: str, part: str) -> None:
    folder = ledger_structures.write(name, tmp_path / "model")
    with pytest.raises(ConfigError, match=rf"drop: {part}, but fp16 keeps it"):
        planned(folder, CAST, drop=[part])


@pytest.mark.parametrize("method", [FP8, CAST])
def test_a_head_that_only_config_json_has_can_be_left_out(tmp_path: Path, method: dict[str, Any]) -> None:
    folder = ledger_structures.write("drafting head promised", tmp_path / "model")
    plan = planned(folder, method, drop=["mtp"])
    assert "left out" not in ledger(plan).statement()
    assert any("mtp left out: config.json promises it" in note for note in plan.warnings)


@pytest.mark.parametrize("ignore", [None, ["re:.*experts.*"]])
def test_integers_beside_experts_cannot_be_judged(tmp_path: Path, ignore: list[str] | None) -> None:
    """transformers joins experts of FP8 or packed ones alone, also where they are left alone."""
    folder = ledger_structures.write("experts", tmp_path / "model")
    method = {"method": "smoothquant", "quant_level": "W8A8", "quantization_config": {"ignore": ignore}}
    with pytest.raises(
        SourceError, match=r"W8A8 cannot be judged: transformers .* joins no experts"
    ) as refused:
        planned(folder, method)
    assert "FP8_DYNAMIC" in refused.value.hint


@pytest.mark.parametrize("tag", ["text-ranking", "text-generation"])
def test_a_reranker_that_answers_in_words_is_said_to_be_judged_as_text(tmp_path: Path, tag: str) -> None:
    folder = ledger_structures.write("dense", tmp_path / "model")
    (folder / "README.md").write_text(f"---\npipeline_tag: {tag}\n---\n")
    noted = any("orders of passages are not compared" in note for note in planned(folder, FP8).warnings)
    assert noted == (tag == "text-ranking")


def test_parts(tmp_path: Path) -> None:
    folder = ledger_structures.write("drafting layer", tmp_path / "model")
    found = ledger(planned(folder, CAST))
    assert {line.name for line in found.tensors if line.part == "mtp"} >= {
        "model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight",
    }  # fmt: skip
    assert {line.part for line in found.tensors if "layers.{0-1}" in line.name} == {"text"}


def test_what_becomes_of_files(tmp_path: Path) -> None:
    folder = ledger_structures.write("extra files", tmp_path / "model")
    plan = planned(folder, CAST)
    lines = {line.name: line for line in ledger(plan).files}
    assert lines["tokenizer.json"].fate is Fate.COPIED
    dropped = {name: line.reason for name, line in lines.items() if line.fate is Fate.DROPPED}
    for name, word in {
        "pytorch_model.bin": "pickle", "consolidated.00.pth": "pickle", "consolidated.safetensors": "another layout",
        "onnx/model.onnx": "another engine", "other-Q4_K_M.gguf": "somebody else", "adapter_model.safetensors": "not merged",
        "vision.safetensors": "no loader reads", "modeling_llama.py": "Python code", "assets/logo.png": "documentation",
        "training_args.bin": "pickle", "strange.dat": "no loader",
    }.items():  # fmt: skip
        assert word in dropped[name], name
    assert any("strange.dat" in note and "modeling" not in note for note in plan.warnings)


def test_buffers_and_a_tied_head_that_calibrated_levels_do_not_save(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.\n")
    method = {"method": "smoothquant", "quant_level": "W8A8", "dataset_path": str(text)}
    buffers = ledger(planned(ledger_structures.write("buffers", tmp_path / "buffers"), method))
    assert {line.name: line.fate for line in buffers.tensors}[
        "model.layers.{0-1}.self_attn.rotary_emb.inv_freq"
    ] is Fate.DROPPED
    tied = ledger(planned(ledger_structures.write("tied, head saved too", tmp_path / "tied"), method))
    assert {line.name: line.fate for line in tied.tensors}["lm_head.weight"] is Fate.TIED
    assert "1 tied" in tied.summary()
