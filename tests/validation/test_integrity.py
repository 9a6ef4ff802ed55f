"""What headers tell: shards, tensors, level, metadata."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tampering
from tampering import case, findings, gguf_of, regressions, tampered

from quantool.methods._llama_cpp import quantize
from quantool.methods.gguf import Options
from quantool.records import Source, Verdict, sha256_of
from quantool.runtime import process
from quantool.validation import integrity


@pytest.mark.e2e
@pytest.mark.parametrize("name", tampering.STRUCTURES)
def test_healthy(name: str) -> None:
    found = findings("integrity", case(name))
    assert not regressions(found)
    skipped = {metric: one.detail for metric, one in found.items() if one.verdict == Verdict.SKIPPED}
    assert skipped.pop("source_commit") == "quantool.json does not say which checkpoint it was made from"
    assert skipped.keys() <= {"hf_resolver"}  # the structures lie in one folder
    assert "hashes" not in found  # nobody has recorded any
    assert found["bits_per_weight"].measured == 16
    assert found["weights"].measured == found["weights"].reference


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("change", "metric"),
    [
        ({"general.file_type": 15}, "file_type"),
        ({"general.name": ""}, "metadata"),
        ({"general.name": "Phi-3-like"}, "name"),
    ],
)
def test_changed_key(tmp_path: Path, change: dict[str, Any], metric: str) -> None:
    found = findings(
        "integrity", case("gemma3", tampered(gguf_of("gemma3"), tmp_path / "t-BF16.gguf", change))
    )
    assert metric in regressions(found)
    assert len(regressions(found) - {"loads"}) == 1


@pytest.mark.e2e
def test_renamed_level(tmp_path: Path) -> None:
    renamed = tmp_path / "model-Q4_K_M.gguf"
    shutil.copy(gguf_of("qwen3"), renamed)
    found = findings("integrity", case("qwen3", renamed, output="given/model-Q4_K_M.gguf"))
    assert regressions(found) == {"file_type", "bits_per_weight", "tensor_types"}
    assert "BF16" in found["file_type"].detail
    assert "not between 4 and 6.6" in found["bits_per_weight"].detail


@pytest.mark.e2e
def test_cut_off(tmp_path: Path) -> None:
    whole = gguf_of("qwen3").read_bytes()
    for size in (len(whole) - 5000, 5000):
        cut = tmp_path / f"cut-{size}-BF16.gguf"
        cut.write_bytes(whole[:size])
        found = findings("integrity", case("qwen3", cut))
        assert regressions(found) == {"loads"}
        assert "damaged or cut off" in found["loads"].detail


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "tensor", "word"),
    [
        ("moe", "blk.1.ffn_down_exps.weight", "layer 1 lacks ffn_down_exps.weight"),
        ("spm_llama", "output.weight", "output.weight is missing"),
        ("qwen3", "token_embd.weight", "token_embd.weight is missing"),
    ],
)
def test_missing_tensor(tmp_path: Path, name: str, tensor: str, word: str) -> None:
    less = tampered(gguf_of(name), tmp_path / "t-BF16.gguf", without=[tensor])
    found = findings("integrity", case(name, less))
    assert {"tensors", "weights"} <= regressions(found)
    assert word in found["tensors"].detail


@pytest.mark.e2e
def test_license_languages_and_origin(tmp_path: Path) -> None:
    chosen = case("gemma3")
    source: Source = chosen.source.model_copy(
        update={
            "card": chosen.source.card.model_copy(update={"license": "mit", "languages": ("ca", "eu")}),
            "commit": "0" * 40,
            "model_id": "someone/model",
        }
    )
    found = findings("integrity", replace(chosen, source=source))
    assert regressions(found) == {"metadata"}
    for word in ("license", "languages", "someone/model"):
        assert word in found["metadata"].detail
    keys = {
        "general.license": "mit",
        "general.languages": ["eu", "ca"],
        "general.source.repo_url": "https://example.org/someone/model",
    }
    complete = tampered(gguf_of("gemma3"), tmp_path / "t-BF16.gguf", keys)
    assert not regressions(findings("integrity", replace(case("gemma3", complete), source=source)))


@pytest.mark.e2e
def test_recorded_hash(tmp_path: Path) -> None:
    file = tmp_path / "model-BF16.gguf"
    shutil.copy(gguf_of("qwen3"), file)
    sums = tmp_path / integrity.SUMS
    sums.write_text(f"{sha256_of(file)}  {file.name}\n")
    assert findings("integrity", case("qwen3", file))["hashes"].verdict == Verdict.PASS
    sums.write_text(f"{'0' * 64}  {file.name}\n")
    assert regressions(findings("integrity", case("qwen3", file))) == {"hashes"}


@pytest.mark.e2e
def test_missing_shard(tmp_path: Path) -> None:
    first = tmp_path / "model-BF16-00001-of-00002.gguf"
    shutil.copy(gguf_of("qwen3"), first)
    found = findings("integrity", case("qwen3", first))
    assert regressions(found) == {"shards"}
    assert "model-BF16-00002-of-00002.gguf" in found["shards"].detail


def test_shards_of_a_folder(tmp_path: Path) -> None:
    assert integrity._judge_index(tmp_path).verdict == Verdict.REGRESSION
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").touch()
    assert "no index" in integrity._judge_index(tmp_path).detail
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    assert integrity._judge_index(tmp_path).verdict == Verdict.PASS
    index.write_text(json.dumps({"weight_map": names | {"c": "model-00003-of-00003.safetensors"}}))
    assert "missing: model-00003" in integrity._judge_index(tmp_path).detail
    index.write_text(json.dumps({"weight_map": {"a": names["a"]}}))
    assert "not in the index: model-00002" in integrity._judge_index(tmp_path).detail


@pytest.mark.e2e
def test_type_that_only_the_own_gguf_package_knows(tmp_path: Path) -> None:
    path = tmp_path / "model-Q2_0.gguf"
    settings = Options().settings()
    request = {"base": str(gguf_of("qwen3")), "output": str(path), "ftype": "MOSTLY_Q2_0", "copy": False}
    process.call(
        quantize.quantize,
        request | {"settings": settings, "imatrix": None},
        log=tmp_path / "log",
    )
    found = findings("integrity", case("qwen3", path, output="given/model-Q2_0.gguf"))
    assert not regressions(found) & {"loads", "tensors", "file_type"}


@pytest.mark.e2e
def test_embeddings_that_are_not_tied_any_more(tmp_path: Path) -> None:
    """qwen3 has its output head in its embeddings: a file with both must have the same numbers twice."""

    def with_head(name: str, factor: int) -> Path:
        def add(writer: Any, tensors: Any) -> None:
            (embedding,) = (tensor for tensor in tensors if tensor.name == "token_embd.weight")
            data = np.roll(embedding.data, factor, axis=0)
            writer.add_tensor("output.weight", data, raw_dtype=embedding.tensor_type)

        return tampered(gguf_of("qwen3"), tmp_path / name, more=add)

    found = findings("integrity", case("qwen3", with_head("same-BF16.gguf", 0)))
    assert found["tensors"].verdict == Verdict.PASS
    found = findings("integrity", case("qwen3", with_head("other-BF16.gguf", 1)))
    assert "output.weight is not token_embd.weight" in found["tensors"].detail
    assert "tensors" in regressions(found)
