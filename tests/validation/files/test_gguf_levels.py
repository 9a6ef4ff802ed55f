"""Types of a GGUF's tensors against its level, its options and its plan."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import making
import pytest
import tampering
from tampering import case

from quantool.records import Finding, Gates, OutputPlan, PlannedFile, Verdict
from quantool.runtime import process
from quantool.validation._files import gguf_file, gguf_levels
from quantool.validation._files.gguf_file import Header, InspectedTensor
from quantool.validation._findings.builder import FindingBuilder

BUILD = FindingBuilder("integrity")


def tensor(name: str, kind: str, *shape: int) -> InspectedTensor:
    """A tensor of a type, as a header has it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    wide = shape or (256, 256)
    elements = wide[0] * (wide[1] if len(wide) > 1 else 1)
    return InspectedTensor(name, kind, wide, elements // block * size, block)


def header(*tensors: InspectedTensor, level: str = "Q4_K_M") -> Header:
    return Header(
        keys={},
        tensors=tensors,
        level=level,
        levels=tuple(gguf_file.levels()),
        blocks=1,
        read=1,
        broken=(),
        twins=None,
        matrix=None,
        matrix_keys={},
    )


SOUND = (
    tensor("token_embd.weight", "Q4_K"),
    tensor("blk.0.attn_norm.weight", "F32", 256),
    tensor("blk.0.attn_q.weight", "Q4_K"),
    tensor("blk.0.attn_k.weight", "Q4_K"),
    tensor("blk.0.attn_v.weight", "Q6_K"),
    tensor("blk.0.ffn_gate_inp.weight", "F32"),
    tensor("blk.0.ffn_down_exps.weight", "Q6_K"),
    tensor("output.weight", "Q6_K"),
)


def judged(*changed: InspectedTensor, level: str = "Q4_K_M", **options: Any) -> dict[str, Finding]:
    """Findings on ``SOUND`` with other tensors in the place of those of the same name."""
    names = {one.name for one in changed}
    tensors = [one for one in SOUND if one.name not in names] + list(changed)
    chosen = case("qwen3", Path(f"toy-{level}.gguf"), output=f"gguf/{level}")
    chosen = replace(
        chosen,
        config=chosen.config.model_copy(update={"quantization_config": options}),
    )
    found = gguf_levels.judge_level(chosen, header(*tensors, level=level), BUILD)
    return {one.metric: one for one in found}


@cache
def headers_of_every_level() -> dict[str, list[dict[str, Any]]]:
    plain, weighed = making.every_level()
    paths = [str(path) for path in (*plain.values(), *weighed.values())]
    found: dict[str, list[dict[str, Any]]] = process.call(
        tampering.headers, {"paths": paths}, log=making.room() / "headers.log"
    )
    return found


@pytest.mark.e2e
def test_every_level_that_llama_cpp_makes_passes() -> None:
    plain, weighed = making.every_level()
    names = [*plain, *weighed]
    source = tampering.source_of(making.model(making.SMALL))
    failed: dict[str, str] = {}
    for level, found in zip(names, headers_of_every_level()["headers"], strict=True):
        read = Header(
            **found
            | {
                "tensors": tuple(
                    InspectedTensor(**one | {"shape": tuple(one["shape"])}) for one in found["tensors"]
                ),
                "levels": tuple(found["levels"]),
                "broken": tuple(found["broken"]),
            }
        )
        assert read.broken == (), level
        assert read.read == read.blocks  # small enough to be read whole
        if level == "COPY":
            continue
        chosen = replace(case("spm_llama", Path(f"x-{level}.gguf"), output=f"gguf/{level}"), source=source)
        wrong = [one for one in gguf_levels.judge_level(chosen, read, BUILD) if one.verdict != Verdict.PASS]
        failed |= {f"{level} {one.metric}": one.detail for one in wrong}
    assert len(names) > 50
    assert failed == {}


def test_sound() -> None:
    found = judged()
    assert {one.verdict for one in found.values()} == {Verdict.PASS}
    shown = str(found["tensor_types"].measured)
    for words in ("embedding 4.5", "attention v 6.56", "experts 6.56", "router 32", "norm 32", "output 6.56"):
        assert words in shown


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (tensor("blk.0.attn_norm.weight", "F16", 256), "norm weights must be F32"),
        (tensor("blk.0.ffn_gate_inp.weight", "Q8_0"), "router weights must be kept"),
        (tensor("blk.0.ffn_down_exps.weight", "F16"), "experts: 1 F16"),
        (tensor("blk.0.attn_k.weight", "Q2_K"), "attention k: 1 Q2_K"),
        (tensor("token_embd.weight", "F32"), "embedding: 1 F32"),
        (tensor("output.weight", "Q3_K"), "output: 1 Q3_K"),
    ],
)
def test_a_class_of_another_type(changed: InspectedTensor, word: str) -> None:
    found = judged(changed)["tensor_types"]
    assert found.verdict == Verdict.REGRESSION
    assert word in found.detail
    assert changed.name in found.detail


def test_nothing_was_quantized() -> None:
    floats = [
        tensor(one.name, "BF16", *one.shape)
        for one in SOUND
        if "norm" not in one.name and "gate_inp" not in one.name
    ]
    found = judged(*floats)
    assert {"bits_per_weight", "tensor_types"} == {
        metric for metric, one in found.items() if one.verdict == Verdict.REGRESSION
    }


def test_types_that_the_options_name() -> None:
    down = tensor("blk.0.ffn_down_exps.weight", "Q8_0")
    assert "experts: 1 Q8_0" in judged(down)["tensor_types"].detail
    named: dict[str, Any] = {"tensor_types": {r"ffn_down": "q8_0"}, "output_tensor_type": "q8_0"}
    head = tensor("output.weight", "Q8_0")
    assert judged(down, head, **named)["tensor_types"].verdict == Verdict.PASS
    found = judged(head, **named)["tensor_types"]
    assert found.verdict == Verdict.REGRESSION
    assert "blk.0.ffn_down_exps.weight is Q6_K, the options say Q8_0" in found.detail
    found = judged(down, **named)["tensor_types"]
    assert "output.weight is Q6_K, the options say Q8_0" in found.detail
    narrow = tensor("blk.0.attn_q.weight", "Q5_0", 256, 96)  # 96 is no multiple of 256: llama.cpp falls back
    assert judged(narrow, tensor_types={"attn_q": "q4_k"})["tensor_types"].verdict == Verdict.PASS


def test_output_left_as_it_is() -> None:
    head = tensor("output.weight", "F16")
    assert judged(head)["tensor_types"].verdict == Verdict.REGRESSION
    assert judged(head, leave_output_tensor=True)["tensor_types"].verdict == Verdict.PASS


def test_every_matrix_has_a_type_of_its_own() -> None:
    found = judged(tensor_types={"blk": "q4_k"})["bits_per_weight"]
    assert found.verdict == Verdict.SKIPPED


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blk.3.attn_q.weight", "attention q"),
        ("blk.3.attn_q_a.weight", "attention q"),
        ("blk.3.attn_q_norm.weight", "norm"),
        ("blk.3.attn_kv_a_mqa.weight", "attention k"),
        ("blk.3.attn_v_b.weight", "attention v"),
        ("blk.3.attn_qkv.weight", "attention qkv"),
        ("blk.3.attn_output.weight", "attention output"),
        ("blk.3.post_attention_norm.weight", "norm"),
        ("blk.3.ffn_up.weight", "ffn up"),
        ("blk.3.ffn_gate_exps.weight", "experts"),
        ("blk.3.ffn_gate_inp.weight", "router"),
        ("blk.3.ffn_gate_inp_shexp.weight", "router"),
        ("blk.3.ffn_gate_shexp.weight", "ffn gate"),
        ("token_embd.weight", "embedding"),
        ("output.weight", "output"),
        ("output_norm.weight", "norm"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_class_of_a_name(name: str, kind: str) -> None:
    assert gguf_levels.class_of(name) == kind


@pytest.mark.parametrize(
    ("output", "file", "levels"),
    [
        ("gguf/Q4_K_M", "toy-Q4_K_M.gguf", ["Q4_K_M", "Q4_K_M"]),
        ("given/toy.IQ3_XS.gguf", "toy.IQ3_XS.gguf", ["IQ3_XS", "IQ3_XS"]),
        ("gguf/Q4_K", "toy-Q4_K-00001-of-00003.gguf", ["Q4_K_M", "Q4_K_M"]),
        ("fp16/BF16", "toy-F16.gguf", ["BF16", "F16"]),
        ("gguf/COPY", "toy.gguf", []),
    ],
)
def test_level_in_a_name(output: str, file: str, levels: list[str]) -> None:
    chosen = case("qwen3", Path(file), output=output)
    named = gguf_levels.named_levels(chosen, gguf_file.levels())
    assert [name for _, name in named] == levels


@pytest.mark.parametrize(
    ("level", "lowest", "highest"),
    [
        ("F16", 16, 16),
        ("F32", 32, 32),
        ("Q8_0", 8, 10.6),
        ("IQ1_S", 1, 3.6),
        ("TQ2_0", 2, 4.6),
        ("MXFP4_MOE", 4, 8.5),
    ],
)
def test_bounds(level: str, lowest: float, highest: float) -> None:
    assert gguf_levels.bounds(level) == (lowest, highest)


def plan(files: dict[str, int], bits: float) -> OutputPlan:
    return OutputPlan(
        id="gguf/Q4_K_M",
        method="gguf",
        level="Q4_K_M",
        options={},
        engine="llama.cpp",
        repo="toy-GGUF",
        repo_id=None,
        files=tuple(PlannedFile(name=name, bytes=size) for name, size in files.items()),
        bits_per_weight=bits,
        peak_ram=0,
        gates=Gates(),
    )


def test_sizes_against_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "toy-Q4_K_M.gguf"
    file.write_bytes(b"x" * 1000)
    found = header(*SOUND)
    bits = 8 * sum(one.bytes for one in SOUND) / sum(one.elements for one in SOUND)
    chosen = case("qwen3", file)
    assert gguf_levels.judge_plan(chosen, found, [file.name], BUILD) == []  # nobody planned it

    def verdict(files: dict[str, int], bits: float) -> Finding:
        planned = replace(chosen, output=plan(files, bits))
        (one,) = gguf_levels.judge_plan(planned, found, [file.name], BUILD)
        return one

    assert verdict({file.name: 1000}, bits).verdict == Verdict.PASS
    assert "has 1000 bytes, 1001 were planned" in verdict({file.name: 1001}, bits).detail
    assert "bits a weight" in verdict({file.name: 1000}, bits + 0.01).detail
    other = verdict({"toy-Q4_K_M-00001-of-00002.gguf": 1000}, bits).detail
    assert "toy-Q4_K_M-00001-of-00002.gguf is planned and not there" in other
    assert "toy-Q4_K_M.gguf is there and not planned" in other
