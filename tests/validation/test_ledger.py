"""Losses planted in finished artifacts: the ledger's check finds each, by name."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ledger_structures
import numpy as np
import pytest

from quantool import pipeline
from quantool.config.schema import Config
from quantool.formats.safetensors import INDEX, SINGLE, check_index
from quantool.formats.safetensors_layout import Stored, encode_in_order
from quantool.ledger import ArtifactTensor, Fate, FileLine, Ledger, TensorLine
from quantool.plugins.contract import Case
from quantool.records import Finding, Gates, OutputPlan, PlannedFile, Verdict
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace
from quantool.validation.ledger import judge
from tests.gguf_bytes import text

QUIET = Progress(quiet=True)
LAYER = "model.layers.1.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.2"
RANDOM = np.random.default_rng(7)

Content = dict[Stored, bytes]


def noise(size: int) -> bytes:
    return RANDOM.integers(1, 256, size, np.uint8).tobytes()


def write(path: Path, content: Content) -> None:
    head, _ = encode_in_order(content)
    path.write_bytes(head + b"".join(content.values()))


def read(path: Path) -> Content:
    data = path.read_bytes()
    return {
        Stored(tensor.name, tensor.dtype, tensor.shape): data[tensor.start : tensor.end]
        for tensor in check_index(path.parent).values()
        if tensor.file == path.name
    }


def planned(folder: Path, structure: str, **keys: Any) -> tuple[Config, Any]:
    """A structure with random weights, and the plan for FP8 of it."""
    ledger_structures.write(structure, folder / "toy")
    source = folder / "toy" / SINGLE
    write(source, {stored: noise(stored.bytes) for stored in read(source)})
    (folder / "toy" / "chat_template.jinja").write_text("{{ messages }}")
    wanted = {"method": "fp8", "quant_level": "FP8_DYNAMIC", "validation": {"checks": ["ledger"]}, **keys}
    config = Config.model_validate(
        {"model_id": str(folder / "toy"), "output_path": str(folder / "out"), **wanted}
    )
    return config, pipeline.plan(config, QUIET)


def finished(folder: Path, structure: str = "experts") -> Case:
    """An artifact with random numbers that is what the ledger of its plan says."""
    config, plan = planned(folder, structure)
    (output,) = plan.outputs
    made = folder / "out" / output.repo
    made.mkdir(parents=True)
    promised = [tensor for line in output.ledger.tensors for tensor in line.stored()]
    stored = [Stored(tensor.name, tensor.dtype, tensor.shape) for tensor in promised]
    write(made / SINGLE, {tensor: noise(tensor.bytes) for tensor in stored})
    for line in output.ledger.files:
        if line.fate is Fate.COPIED:
            (made / line.name).parent.mkdir(exist_ok=True)
            (made / line.name).write_bytes((folder / "toy" / line.name).read_bytes())
    return case_of(made, plan.source, config, output)


def case_of(artifact: Path, source: Any, config: Config, output: OutputPlan) -> Case:
    workspace = Workspace(config.output_path)
    return Case(artifact, output.engine, output.id, source, config, Gates(), workspace, output)


def findings(case: Case) -> dict[str, Finding]:
    return {finding.metric: finding for finding in judge.judge(case, QUIET)}


def lost(case: Case) -> dict[str, str]:
    return {metric: finding.detail for metric, finding in findings(case).items() if finding.verdict.fails}


@pytest.mark.parametrize(
    "structure", ["dense", "experts", "drafting head", "tied", "embedding", "biases", "hybrid"]
)
def test_what_the_ledger_says_is_there(tmp_path: Path, structure: str) -> None:
    found = findings(finished(tmp_path, structure))
    assert {finding.verdict for finding in found.values()} == {Verdict.PASS}, found
    assert " in" in str(found["tensors"].measured)


def without(*ends: str) -> Callable[[Content], Content]:
    """Leave out all tensors whose names contain one of ``ends``."""
    return lambda content: {
        stored: data for stored, data in content.items() if not any(end in stored.name for end in ends)
    }


def changed(name: str, /, **how: Any) -> Callable[[Content], Content]:
    """Another name, dtype or shape for the tensor ``name``, of random numbers."""

    def change(content: Content) -> Content:
        made: Content = {}
        for stored, data in content.items():
            if stored.name == name:
                fields = {"name": stored.name, "dtype": stored.dtype, "shape": stored.shape} | how
                other = Stored(**fields)
                made[other] = noise(other.bytes)
            else:
                made[stored] = data
        assert made != content
        return made

    return change


def filled(name: str, value: int) -> Callable[[Content], Content]:
    """One value throughout."""

    def fill(content: Content) -> Content:
        assert any(stored.name == name for stored in content)
        return {
            stored: bytes([value]) * len(data) if stored.name == name else data
            for stored, data in content.items()
        }

    return fill


def added(name: str) -> Callable[[Content], Content]:
    return lambda content: content | {Stored(name, "BF16", (4, 4)): noise(32)}


HIDDEN, QUERIES = ledger_structures.HIDDEN, ledger_structures.HEADS * ledger_structures.HEAD
LOSSES: dict[str, tuple[str, Callable[[Content], Content], str, str]] = {
    "a layer": ("dense", without(LAYER), "tensors", f"missing: {LAYER}.weight"),
    "a scale": ("dense", without(f"{LAYER}.weight_scale"), "tensors", f"missing: {LAYER}.weight_scale"),
    "all scales": ("dense", without(".weight_scale"), "tensors", "and 10 more"),
    "a norm": ("dense", without("model.norm"), "tensors", "missing: model.norm.weight"),
    "the embedding": ("dense", without("embed_tokens"), "tensors", "missing: model.embed_tokens.weight"),
    "the head": ("dense", without("lm_head"), "tensors", "missing: lm_head.weight"),
    "a bias": ("biases", without("layers.0.self_attn.q_proj.bias"), "tensors", "model.layers.0.self_attn.q_proj.bias"),
    "an expert": ("experts", without(f"{EXPERT}."), "tensors", f"missing: {EXPERT}.down_proj.weight"),
    "a router": ("experts", without("layers.0.mlp.gate."), "tensors", "missing: model.layers.0.mlp.gate.weight"),
    "the last layer": ("dense", without("layers.1."), "tensors", "missing: model.layers.1"),
    "the drafting head": ("drafting head", without("mtp."), "tensors", "missing: mtp.fc.weight"),
    "a tensor of the drafting head": ("drafting head", without("mtp.norm"), "tensors", "missing: mtp.norm.weight"),
    "a state": ("hybrid", without("layers.2.linear_attn.A_log"), "tensors", "missing: model.layers.2.linear_attn.A_log"),
    "quantization": ("dense", changed(f"{LAYER}.weight", dtype="BF16"), "tensors", f"{LAYER}.weight is BF16"),
    "a scale's dtype": ("dense", changed(f"{LAYER}.weight_scale", dtype="F32"), "tensors", "weight_scale is F32"),
    "rows": ("dense", changed(f"{LAYER}.weight", shape=(QUERIES - 1, HIDDEN)), "tensors", "is F8_E4M3 [63, 64], not F8_E4M3 [64, 64]"),
    "channels of a scale": ("dense", changed(f"{LAYER}.weight_scale", shape=(1,)), "tensors", "weight_scale is BF16 [1]"),
    "a name": ("dense", changed(f"{LAYER}.weight", name="model.layers.1.attn.q.weight"), "tensors", "not accounted for: model.layers.1.attn.q.weight"),
    "order": ("dense", added("model.layers.9.mlp.up_proj.weight"), "tensors", "not accounted for: model.layers.9"),
    "words about a tower": ("dense", added("vision_tower.blocks.0.weight"), "tensors", "not accounted for: vision_tower"),
    "the head's values": ("dense", filled("lm_head.weight", 0), "values", "lm_head.weight is zero throughout"),
    "a layer's values": ("dense", filled(f"{LAYER}.weight", 0), "values", f"{LAYER}.weight (of model.layers"),
    "a norm's values": ("dense", filled("model.norm.weight", 0), "values", "model.norm.weight is zero"),
    "a scale's values": ("dense", filled(f"{LAYER}.weight_scale", 0), "values", f"{LAYER}.weight_scale"),
    "an expert's differences": ("experts", filled(f"{EXPERT}.up_proj.weight", 56), "values", "is one value throughout"),
    "a router's values": ("experts", filled("model.layers.0.mlp.gate.weight", 0), "values", "model.layers.0.mlp.gate.weight"),
    "the drafting head's values": ("drafting head", filled("mtp.fc.weight", 0), "values", "mtp.fc.weight is zero"),
}  # fmt: skip
"""What is lost: structure, how, the finding that fails, a part of its words."""


@pytest.mark.parametrize("name", LOSSES)
def test_a_planted_loss_is_found_by_name(tmp_path: Path, name: str) -> None:
    structure, plant, metric, words = LOSSES[name]
    case = finished(tmp_path, structure)
    write(case.artifact / SINGLE, plant(read(case.artifact / SINGLE)))
    found = lost(case)
    assert found.keys() == {metric}
    assert words in found[metric]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_a_lost_file_is_found(tmp_path: Path, name: str) -> None:
    case = finished(tmp_path)
    (case.artifact / name).unlink()
    assert lost(case) == {"files": f"missing: {name}"}


def test_a_lost_shard_is_found(tmp_path: Path) -> None:
    case = finished(tmp_path)
    (case.artifact / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors" in lost(case)["tensors"]


def test_what_is_zero_in_the_source_may_be_zero(tmp_path: Path) -> None:
    case = finished(tmp_path, "biases")
    name = "model.layers.0.self_attn.q_proj.bias"
    for folder in (case.artifact, tmp_path / "toy"):
        write(folder / SINGLE, filled(name, 0)(read(folder / SINGLE)))
    assert lost(case) == {}


@pytest.mark.parametrize("structure", ["experts in one tensor", "fused experts"])
def test_an_expert_in_one_tensor_with_the_others(tmp_path: Path, structure: str) -> None:
    """Cast to float16: found where the source's differs, and not where it is zero too."""
    method = {"method": "fp16", "quant_level": "F16", "quantization_config": {"format": "safetensors"}}
    config, plan = planned(tmp_path, structure, **method)
    made = tmp_path / "out" / plan.outputs[0].repo
    shutil.copytree(tmp_path / "toy", made)
    whole = {Stored(s.name, "F16", s.shape): data for s, data in read(made / SINGLE).items()}
    name = "model.layers.1.mlp.experts.down_proj"

    def zeroed(content: Content) -> Content:
        size = next(stored.bytes for stored in content if stored.name == name) // 4
        return {
            s: data[:size] + bytes(size) + data[2 * size :] if s.name == name else data
            for s, data in content.items()
        }

    write(made / SINGLE, zeroed(whole))
    case = case_of(made, plan.source, config, plan.outputs[0])
    assert lost(case) == {
        "values": f"{name} (of model.layers.{{0-1}}.mlp.experts.down_proj): expert 1 is zero throughout, the source's is not"
    }
    write(tmp_path / "toy" / SINGLE, zeroed(read(tmp_path / "toy" / SINGLE)))
    assert lost(case) == {}


def test_a_tied_head_may_be_there_or_not(tmp_path: Path) -> None:
    case = finished(tmp_path, "tied, head saved too")
    assert case.output is not None
    assert case.output.ledger is not None
    lines = [
        line.model_copy(update={"fate": Fate.TIED, "to": ()}) if line.name == "lm_head.weight" else line
        for line in case.output.ledger.tensors
    ]
    ledger = case.output.ledger.model_copy(update={"tensors": tuple(lines)})
    output = case.output.model_copy(update={"ledger": ledger})
    tied = case_of(case.artifact, case.source, case.config, output)
    assert lost(tied) == {}
    write(case.artifact / SINGLE, without("lm_head")(read(case.artifact / SINGLE)))
    assert lost(tied) == {}


# --- GGUF


@dataclass(frozen=True)
class Block:
    """A tensor of a GGUF: ``kind`` in ``enum ggml_type``, bytes."""

    shape: tuple[int, ...]
    kind: int = 8
    data: bytes = b""

    @property
    def bytes(self) -> int:
        elements = math.prod(self.shape)
        return elements // 32 * 34 if self.kind == 8 else elements * {0: 4, 1: 2}[self.kind]


Blocks = dict[str, Block]


def write_gguf(path: Path, blocks: Blocks) -> None:
    head, data = b"GGUF" + struct.pack("<IQQ", 3, len(blocks), 0), b""
    for name, block in blocks.items():
        dimensions = block.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += struct.pack("<IQ", block.kind, len(data))
        content = block.data or noise(block.bytes)
        data += content + bytes(-len(content) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)


WHOLE: Blocks = {
    "token_embd.weight": Block((256, 64)),
    **{f"blk.{n}.attn_q.weight": Block((64, 64)) for n in range(2)},
    **{f"blk.{n}.ffn_up_exps.weight": Block((4, 128, 64)) for n in range(2)},
    **{f"blk.{n}.attn_norm.weight": Block((64,), 0) for n in range(2)},
    "output.weight": Block((256, 64)),
    "rope_freqs.weight": Block((32,), 0),
}
TYPES = {0: "F32", 1: "F16", 8: "Q8_0"}


def gguf_line(source: str, name: str, fate: Fate, shape: tuple[int, ...], part: str = "text") -> TensorLine:
    kind = next(
        (TYPES[block.kind] for made, block in WHOLE.items() if made == name.replace("{0-1}", "0")), ""
    )
    held = next((block.shape for made, block in WHOLE.items() if made == name.replace("{0-1}", "0")), ())
    to = (ArtifactTensor(name=name, dtype=kind, shape=held),) if name else ()
    return TensorLine(name=source, dtype="BF16", shape=shape, part=part, fate=fate, to=to, reason="because")


LINES = (
    gguf_line("model.embed_tokens.weight", "token_embd.weight", Fate.QUANTIZED, (256, 64)),
    gguf_line("model.layers.{0-1}.self_attn.q_proj.weight", "blk.{0-1}.attn_q.weight", Fate.QUANTIZED, (64, 64)),
    gguf_line(
        "model.layers.{0-1}.mlp.experts.{0-3}.up_proj.weight", "blk.{0-1}.ffn_up_exps.weight", Fate.MERGED, (128, 64)
    ),
    gguf_line("model.layers.{0-1}.input_layernorm.weight", "blk.{0-1}.attn_norm.weight", Fate.CONVERTED, (64,)),
    gguf_line("lm_head.weight", "output.weight", Fate.QUANTIZED, (256, 64)),
    gguf_line("", "rope_freqs.weight", Fate.ADDED, ()),
    gguf_line("vision_tower.blocks.{0-2}.weight", "", Fate.DROPPED, (64, 64), "vision"),
)  # fmt: skip


def gguf_case(folder: Path, blocks: Blocks, *, shards: int = 1) -> Case:
    config, plan = planned(folder, "experts")
    made = folder / "out" / "toy-GGUF"
    made.mkdir(parents=True)
    names = (
        ["toy-Q8_0.gguf"]
        if shards == 1
        else [f"toy-Q8_0-{n + 1:05d}-of-{shards:05d}.gguf" for n in range(shards)]
    )
    for number, name in enumerate(names):
        write_gguf(made / name, {key: blocks[key] for key in list(blocks)[number::shards]})
    ledger = Ledger(tensors=LINES, files=(FileLine(name="config.json", bytes=1, fate=Fate.CONVERTED),))
    output = OutputPlan(
        id="gguf/Q8_0", method="gguf", level="Q8_0", options={}, engine="llama.cpp", repo="toy-GGUF", repo_id=None,
        files=tuple(PlannedFile(name=name, bytes=1) for name in names), bits_per_weight=8.5, peak_ram=1, gates=Gates(),
        ledger=ledger,
    )  # fmt: skip
    return case_of(made / names[0], plan.source, config, output)


def test_a_gguf_that_is_what_the_ledger_says(tmp_path: Path) -> None:
    found = findings(gguf_case(tmp_path, WHOLE))
    assert {finding.verdict for finding in found.values()} == {Verdict.PASS}, found
    assert found["tensors"].measured == (
        "17 tensors: 14 in, 3 dropped; vision (12,288 weights) left out: this is a text-only file"
    )


def with_expert(number: int, data: bytes) -> bytes:
    """Four experts of 128 x 64 in Q8_0, of which that with the ``number`` is ``data``."""
    return b"".join(data if expert == number else noise(128 * 68) for expert in range(4))


GGUF_LOSSES: dict[str, tuple[Blocks, str, str]] = {
    "a layer": ({k: v for k, v in WHOLE.items() if k != "blk.1.attn_q.weight"}, "tensors",
                "missing: blk.1.attn_q.weight (of model.layers.{0-1}.self_attn.q_proj.weight)"),
    "the head": ({k: v for k, v in WHOLE.items() if k != "output.weight"}, "tensors", "output.weight (of lm_head.weight)"),
    "frequencies": ({k: v for k, v in WHOLE.items() if k != "rope_freqs.weight"}, "tensors", "missing: rope_freqs.weight"),
    "an expert": (WHOLE | {"blk.0.ffn_up_exps.weight": Block((3, 128, 64))}, "tensors",
                  "blk.0.ffn_up_exps.weight is Q8_0 [3, 128, 64], not Q8_0 [4, 128, 64]"),
    "the type": (WHOLE | {"output.weight": Block((256, 64), 1)}, "tensors", "output.weight is F16"),
    "honesty about a tower": (WHOLE | {"v.blk.0.weight": Block((64, 64))}, "tensors", "not accounted for: v.blk.0.weight"),
    "an expert's values": (WHOLE | {"blk.1.ffn_up_exps.weight": Block((4, 128, 64), data=with_expert(2, bytes(128 * 68)))}, "values",
                           "blk.1.ffn_up_exps.weight (of model.layers.{0-1}.mlp.experts.{0-3}.up_proj.weight): expert 2 is zero"),
    "an expert's differences": (WHOLE | {"blk.0.ffn_up_exps.weight": Block((4, 128, 64), data=with_expert(3, b"ab" * 17 * 256))},
                                "values", "{0-3}.up_proj.weight): expert 3 is one value throughout"),
    "the head's values": (WHOLE | {"output.weight": Block((256, 64), data=bytes(256 * 68))}, "values",
                          "output.weight (of lm_head.weight) is zero throughout"),
    "experts' values": (WHOLE | {"blk.1.ffn_up_exps.weight": Block((4, 128, 64), data=b"\x01\x02" * (1024 * 17))}, "values",
                        "blk.1.ffn_up_exps.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_LOSSES)
def test_a_loss_planted_in_a_gguf_is_found_by_name(tmp_path: Path, name: str) -> None:
    blocks, metric, words = GGUF_LOSSES[name]
    found = lost(gguf_case(tmp_path, blocks))
    assert found.keys() == {metric}
    assert words in found[metric]


def test_a_lost_shard_of_a_gguf_is_found(tmp_path: Path) -> None:
    case = gguf_case(tmp_path, WHOLE, shards=3)
    assert lost(case) == {}
    (case.artifact.parent / "toy-Q8_0-00002-of-00003.gguf").unlink()
    assert "toy-Q8_0-00002-of-00003.gguf" in lost(case)["tensors"]
