"""The importance matrix is llama-imatrix's, comes from the text as the model sees it, and is published."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest

from quantool.config.schema import Config
from quantool.errors import ConfigError
from quantool.methods._llama_cpp.importance import imatrix_collect
from quantool.methods._llama_cpp.importance.imatrix_file import read_matrix
from quantool.runtime import process
from quantool.texts import corpus

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def _cache() -> Iterator[None]:
    with making.own_cache():
        yield


@pytest.mark.upstream
@pytest.mark.parametrize("name", ["tiny-chat", "moe"])
def test_matrix_is_that_of_llama_imatrix(name: str, tmp_path: Path) -> None:
    one = making.made(name)
    command = [
        str(making.upstream("llama-imatrix")), "-m", str(one.base), "-f", str(making.CALIBRATION), "-o", "theirs.gguf",
        "--chunks", "12", "-c", "512", "-t", "2", "-ngl", "0", "--no-ppl",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=process.environment()
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = read_matrix(one.matrix), read_matrix(tmp_path / "theirs.gguf")
    assert ours.chunks == theirs.chunks == 12
    assert ours.entries.keys() == theirs.entries.keys()
    for weight, (sums, counts) in ours.entries.items():
        expected, expected_counts = theirs.entries[weight]
        np.testing.assert_array_equal(counts, expected_counts, weight)
        np.testing.assert_allclose(sums, expected, rtol=1e-3, atol=1e-6 * expected.max(), err_msg=weight)
    experts = [counts for _, counts in ours.entries.values() if len(counts) > 1]
    assert bool(experts) == (name == "moe")
    assert {int(counts.sum()) for counts in experts} <= {12 * 512 * 2}  # two experts a token


def test_matrix_is_published_beside_the_files() -> None:
    one = making.made("tiny-chat")
    (record,) = one.artifacts[0].shared
    assert record.name == "tiny-5.2M-chat-imatrix.gguf"
    assert record.bytes == one.matrix.stat().st_size
    assert record.sha256 == hashlib.sha256(one.matrix.read_bytes()).hexdigest()
    found = making.keys(one.matrix)
    assert found["general.type"] == "imatrix"
    assert found["imatrix.datasets"] == ["calibration.txt"]
    assert "general.architecture" not in found


def test_path_reuses_a_matrix(tmp_path: Path) -> None:
    one = making.made("tiny-chat")
    given = tmp_path / "given.gguf"
    given.write_bytes(one.matrix.read_bytes())
    wanted = making.config(
        making.TINY, tmp_path / "out", ["Q4_K_M", "IQ2_XXS"], quantization_config={"imatrix": str(given)}
    )
    made, artifacts = making.make(wanted)
    folder = artifacts[0].folder
    assert not (tmp_path / "out/logs/imatrix.log").exists()
    assert (folder / one.matrix.name).read_bytes() == given.read_bytes()
    name = one.artifacts[0].files[0].name
    assert (folder / name).read_bytes() == (one.folder / name).read_bytes()
    assert [output.files[0].bytes for output in made.outputs] == [artifact.bytes() for artifact in artifacts]
    given.write_bytes(b"changed afterwards")
    assert (
        hashlib.sha256((folder / one.matrix.name).read_bytes()).hexdigest() == artifacts[0].shared[0].sha256
    )


def ids_of(tmp_path: Path, model: Path, **keys: Any) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    config = making.config(model, tmp_path, "Q4_K_M", **keys)
    request = {
        "config": config.model_dump(mode="json"),
        "model": str(model),
        "context": 128,
        "max_tokens": 4 * 128,
        "output": str(tmp_path / "ids.npy"),
    }
    said = process.call(imatrix_collect.tokenize, request, log=tmp_path / "log")
    return np.load(tmp_path / "ids.npy"), said


def test_conversations_are_rendered_through_the_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = making.TEXT / "calibration.jsonl"
    table, said = ids_of(tmp_path, making.TINY, dataset_path=path)
    assert table.shape == (4, 128)
    assert said["sha256"] == hashlib.sha256(table.tobytes()).hexdigest()
    tokenizer: Any = AutoTokenizer.from_pretrained(making.TINY)
    documents = corpus.calibration(Config(model_id=str(making.TINY), dataset_path=path))
    expected: list[int] = []
    for document in documents:
        expected += tokenizer.apply_chat_template(
            list(document.messages), tools=list(document.tools) or None, return_dict=False
        )
    assert table.reshape(-1).tolist() == expected[: table.size]
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in table
    assert json.loads(path.read_text().splitlines()[0])["messages"] != list(documents[0].messages)


def test_windows_begin_with_bos_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    table, _ = ids_of(tmp_path, making.model(making.SMALL), dataset_path=making.CALIBRATION)
    assert set(table[:, 0].tolist()) == {1}


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.\n")
    with pytest.raises(ConfigError, match=r"has \d+ tokens, fewer than one window of 128"):
        ids_of(tmp_path, making.TINY, dataset_path=tmp_path / "short.txt")
