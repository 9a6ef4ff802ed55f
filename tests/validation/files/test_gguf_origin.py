"""What a GGUF was made from: its importance matrix and its source."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tampering import case, findings, gguf_of, regressions, tampered

from quantool.formats.gguf_keys import COMMIT, UNREAD, WEIGHTS, origin_keys, weights_sha256
from quantool.origins import SourceFile
from quantool.plugins.contract import Case
from quantool.records import Finding, Gates, OutputPlan, Source, Verdict
from quantool.validation._files import gguf_origin
from quantool.validation._files.gguf_file import Header, InspectedTensor
from quantool.validation._findings.builder import FindingBuilder

BUILD = FindingBuilder("integrity")
MATRICES = ("attn_q", "attn_k", "ffn_up", "ffn_down")


def header(matrix: dict[str, int] | None = None, **keys: Any) -> Header:
    """Two layers of four matrices, quantized; ``keys`` are those of quantize.imatrix."""
    tensors = [InspectedTensor("token_embd.weight", "Q4_K", (512, 256), 73728, 256)]
    tensors += [
        InspectedTensor(f"blk.{layer}.{name}.weight", "Q4_K", (256, 256), 36864, 256)
        for layer in (0, 1)
        for name in MATRICES
    ]
    return Header(
        keys={f"quantize.imatrix.{key}": value for key, value in keys.items()},
        tensors=tuple(tensors),
        level="Q4_K_M",
        levels=(),
        blocks=1,
        read=1,
        broken=(),
        twins=None,
        matrix=matrix,
        matrix_keys={"imatrix.datasets": ["calibration.txt"], "imatrix.chunk_count": 12},
    )


OWN = {"file": "toy-imatrix.gguf", "dataset": "calibration.txt", "entries_count": 8, "chunks_count": 12}
COVERED = {f"blk.{layer}.{name}.weight": 256 for layer in (0, 1) for name in MATRICES}


def planned(imatrix: object) -> Case:
    output = OutputPlan(
        id="gguf/Q4_K_M",
        method="gguf",
        level="Q4_K_M",
        options={"imatrix": imatrix},
        engine="llama.cpp",
        repo="toy-GGUF",
        repo_id=None,
        files=(),
        bits_per_weight=None,
        peak_ram=0,
        gates=Gates(),
    )
    chosen = case("qwen3", Path("toy-Q4_K_M.gguf"))
    config = chosen.config.model_copy(update={"dataset_path": Path("texts/calibration.txt")})
    return replace(chosen, output=output, config=config)


def judged(found: Header, chosen: Case) -> Finding:
    (one,) = gguf_origin.judge_matrix(chosen, found, BUILD)
    return one


def test_no_matrix() -> None:
    assert gguf_origin.judge_matrix(planned(False), header(), BUILD) == []
    assert gguf_origin.judge_matrix(case("qwen3", Path("toy.gguf")), header(), BUILD) == []


def test_matrix_of_this_model() -> None:
    for matrix in (None, COVERED):
        for wanted in (True, "toy.gguf"):
            assert judged(header(matrix, **OWN), planned(wanted)).verdict == Verdict.PASS
        assert judged(header(matrix, **OWN), case("qwen3", Path("toy.gguf"))).verdict == Verdict.PASS


@pytest.mark.parametrize(
    ("matrix", "keys", "wanted", "word"),
    [
        (None, {}, True, "has no quantize.imatrix.file"),
        (None, OWN, False, "asks for no importance matrix"),
        (None, OWN | {"entries_count": 28}, "m.gguf", "28 weights, this one has 9 matrices"),
        (None, OWN | {"entries_count": 3}, "m.gguf", "covers 3 weights, 8 are quantized"),
        (None, OWN | {"entries_count": None}, "m.gguf", "entries_count is missing"),
        (None, OWN | {"dataset": "other.txt"}, True, "the calibration text is 'calibration.txt'"),
        (COVERED | {"blk.2.attn_q.weight": 256}, OWN, "m.gguf", "it has blk.2.attn_q.weight"),
        (COVERED | {"blk.1.attn_q.weight": 512}, OWN, "m.gguf", "is of another model: it has blk.1.attn_q"),
        (dict(list(COVERED.items())[:5]), OWN, "m.gguf", "has 5 weights, the file says 8"),
        (
            COVERED,
            OWN | {"chunks_count": 99},
            "m.gguf",
            "chunks_count is 99, the matrix beside the file says 12",
        ),
        (COVERED, OWN | {"dataset": "x.txt"}, "m.gguf", "dataset is 'x.txt'"),
    ],
)
def test_matrix_that_does_not_fit(
    matrix: dict[str, int] | None, keys: dict[str, Any], wanted: object, word: str
) -> None:
    found = judged(header(matrix, **keys), planned(wanted))
    assert found.verdict == Verdict.REGRESSION
    assert word in found.detail


def source(commit: str | None = None, *hashes: str | None) -> Source:
    files = tuple(
        SourceFile(name=f"model-{number}.safetensors", bytes=1, sha256=digest)
        for number, digest in enumerate(hashes)
    )
    return case("qwen3", Path("toy.gguf")).source.model_copy(update={"commit": commit, "files": files})


def test_weights_are_one_number_whatever_their_files_are_called() -> None:
    assert weights_sha256(source(None, "a", None)) is None
    assert weights_sha256(source(None)) is None
    assert weights_sha256(source(None, "a", "b")) == weights_sha256(source(None, "b", "a"))
    assert weights_sha256(source(None, "a", "b")) != weights_sha256(source(None, "a", "c"))
    assert origin_keys(source(None, None)) == {WEIGHTS: UNREAD}
    keys = origin_keys(source("c" * 40, "a"))
    assert keys[COMMIT] == "c" * 40
    assert len(keys[WEIGHTS]) == len(UNREAD)  # a plan counts its bytes before anybody has read the weights


def from_source(keys: dict[str, Any], against: Source) -> Finding:
    return gguf_origin.judge_source(replace(case("qwen3", Path("toy.gguf")), source=against), keys, BUILD)


def test_made_from_the_reference() -> None:
    one, other = source("1" * 40, "a"), source("2" * 40, "b")
    assert from_source(origin_keys(one), one).verdict == Verdict.PASS
    found = from_source(origin_keys(one), other)
    assert found.verdict == Verdict.REGRESSION
    assert f"commit {'1' * 40}, the reference is {'2' * 40}" in found.detail
    assert "another checkpoint, or another commit of it" in found.detail
    local = source(None, "a")  # the same weights, no longer known by a commit
    assert from_source(origin_keys(one), local).verdict == Verdict.PASS
    assert from_source(origin_keys(one), source(None, "b")).verdict == Verdict.REGRESSION
    assert from_source({}, one).verdict == Verdict.SKIPPED
    assert from_source({WEIGHTS: UNREAD}, one).verdict == Verdict.SKIPPED


def test_a_local_checkpoint_is_named_not_placed(tmp_path: Path) -> None:
    made = replace(planned(None), engine="transformers", artifact=tmp_path)
    local = made.source.model_copy(update={"commit": None, "model_id": "/home/me/models/toy", "name": "toy"})
    found = gguf_origin.judge_source(replace(made, source=local), {}, BUILD)
    assert (found.verdict, found.measured, found.detail) == (Verdict.PASS, "toy", "")
    hub = local.model_copy(update={"commit": "1" * 40, "model_id": "org/toy"})
    assert gguf_origin.judge_source(replace(made, source=hub), {}, BUILD).measured == f"org/toy@{'1' * 40}"


def test_source_in_the_record_of_a_packed_folder(tmp_path: Path) -> None:
    against = source("1" * 40, "a")
    chosen = replace(case("qwen3", tmp_path), source=against)

    def write(commit: str | None, digest: str) -> Finding:
        files = [{"name": "model.safetensors", "bytes": 1, "sha256": digest}]
        record = {"plan": {"source": {"commit": commit, "files": files}}}
        (tmp_path / "quantool.json").write_text(json.dumps(record))
        return gguf_origin.judge_source(chosen, {}, BUILD)

    assert write("1" * 40, "a").verdict == Verdict.PASS
    assert write("2" * 40, "a").verdict == Verdict.REGRESSION
    assert write(None, "b").verdict == Verdict.REGRESSION
    (tmp_path / "quantool.json").write_text("[]")
    assert gguf_origin.judge_source(chosen, {}, BUILD).verdict == Verdict.SKIPPED


@pytest.mark.e2e
def test_matrix_beside_the_file_is_read(tmp_path: Path) -> None:
    """A GGUF of the llama structure beside the keys of a matrix, and the matrix of another structure."""
    keys = {f"quantize.imatrix.{key}": value for key, value in OWN.items()} | {
        "quantize.imatrix.entries_count": 14
    }
    file = tampered(gguf_of("spm_llama"), tmp_path / "toy-BF16.gguf", keys)
    found = findings("integrity", case("spm_llama", file))
    assert not regressions(found)
    assert found["imatrix"].measured == "toy-imatrix.gguf: 14 weights, calibration.txt"
    shutil.copy(gguf_of("spm_llama"), tmp_path / "toy-imatrix.gguf")  # a GGUF, but it covers nothing
    assert "has 0 weights" in findings("integrity", case("spm_llama", file))["imatrix"].detail
