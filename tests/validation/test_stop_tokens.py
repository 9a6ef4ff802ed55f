"""A GGUF that would not stop, or stops too early, is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tampering
from tampering import altered, case, findings, gguf_of, regressions, tampered

from quantool.records import Verdict
from quantool.validation import stop_tokens

EOS = "tokenizer.ggml.eos_token_id"

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "spm_llama"])
def test_healthy(name: str) -> None:
    found = findings("stop_tokens", case(name))
    assert not regressions(found)
    assert {"eos", "ends", "turn_end", "eos_lists", "adds_bos", "adds_eos"} <= set(found)
    assert found["eos_lists"].detail == ""
    assert all(one.verdict == Verdict.PASS for one in found.values())


def test_dropped_eos(tmp_path: Path) -> None:
    found = findings(
        "stop_tokens", case("qwen3", tampered(gguf_of("qwen3"), tmp_path / "t.gguf", drop=[EOS]))
    )
    assert "eos" in regressions(found)
    assert found["eos"].measured == "absent"


def test_wrong_eos(tmp_path: Path) -> None:
    wrong = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {EOS: 5})
    found = findings("stop_tokens", case("qwen3", wrong))
    assert regressions(found) == {"eos", "ends"}
    assert "no special token" in found["ends"].detail


def test_turn_end_that_does_not_stop(tmp_path: Path) -> None:
    from gguf import GGUFReader

    field = GGUFReader(gguf_of("gemma3")).get_field("tokenizer.ggml.tokens")
    assert field is not None
    tokens = ["<other>" if piece == "<end_of_turn>" else piece for piece in field.contents()]
    renamed = tampered(
        gguf_of("gemma3"),
        tmp_path / "t.gguf",
        {"tokenizer.ggml.tokens": tokens},
        ["tokenizer.ggml.eot_token_id"],
    )
    found = findings("stop_tokens", case("gemma3", renamed))
    assert regressions(found) == {"ends", "turn_end"}
    assert "would not end" in found["turn_end"].detail


def test_source_that_does_not_name_its_turn_end() -> None:
    found = findings("stop_tokens", altered(case("spm_llama"), eos_token_ids=(2,)))
    assert found["ends"].verdict == Verdict.PASS
    assert "defect of the source" in found["ends"].detail
    assert "<|im_end|>" in found["ends"].detail


def test_lists_of_the_sources_files_are_compared(tmp_path: Path) -> None:
    folder = tampering.tokenizer_folder("gemma3", tmp_path / "source")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 1}))
    chosen = case("gemma3")
    source = chosen.source.model_copy(update={"folder": folder})
    found = findings("stop_tokens", replace(chosen, source=source))
    assert found["eos_lists"].verdict == Verdict.PASS
    assert found["eos_lists"].detail.startswith("defect of the source: generation_config.json")
    assert "<end_of_turn>" in found["eos_lists"].detail


def test_stray_eot(tmp_path: Path) -> None:
    key = b"tokenizer.ggml.eot_token_id"
    stray = tampered(gguf_of("gemma3"), tmp_path / "t.gguf", {key.decode(): 9})
    signed = stray.read_bytes()
    assert signed.count(key + b"\x05\0\0\0") == 1
    stray.write_bytes(signed.replace(key + b"\x05\0\0\0", key + b"\x04\0\0\0"))  # llama.cpp wants it unsigned
    found = findings("stop_tokens", case("gemma3", stray))
    assert "eos_lists" in regressions(found)
    assert "tokenizer.ggml.eot_token_id is 9" in found["eos_lists"].detail


def test_added_bos(tmp_path: Path) -> None:
    added = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {"tokenizer.ggml.add_bos_token": True})
    assert regressions(findings("stop_tokens", case("qwen3", added))) == {"adds_bos"}


def test_other_bos_and_padding(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.padding_token_id": 8}
    found = findings("stop_tokens", case("gemma3", tampered(gguf_of("gemma3"), tmp_path / "t.gguf", keys)))
    assert {"bos", "pad"} <= regressions(found)


def test_folder_for_transformers(tmp_path: Path) -> None:
    folder = tampering.tokenizer_folder("qwen3", tmp_path / "artifact")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [600]}))
    found = findings("stop_tokens", case("qwen3", folder))
    assert regressions(found) == {"eos of generation_config.json"}
    assert found["eos"].verdict == found["eos of config.json"].verdict == Verdict.PASS


def test_eos_of_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert stop_tokens._eos_of(path) is None
    for value, expected in ((2, [2]), ([2, 3], [2, 3]), (None, None)):
        path.write_text(json.dumps({"eos_token_id": value}))
        assert stop_tokens._eos_of(path) == expected
