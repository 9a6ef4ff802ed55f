"""The canary at its release and replayed: sound files pass in other threads and batches, others do not.

Noise measured with tiny-chat (mean divergence in nats of 256 tokens; quantization itself costs 0.0004, 0.015 and 0.17):

=====================================  ========  ========  ========
\\                                      Q8_0      Q4_K_M    Q2_K
=====================================  ========  ========  ========
other threads, same batch              1.0e-9    1.1e-9    0.7e-9
llama.cpp for AVX2 against AVX-512     4.6e-6    2.1e-4    2.8e-4
batches of 24 against one of 256       1.4e-4    5.2e-4    4.5e-4
=====================================  ========  ========  ========

(one and two threads; ``GGML_NATIVE=OFF`` for AVX2.) A folder in float32 differs by 1e-8 between batches; in bfloat16 it
would be 1.9e-3 away, which is why it is not replayed so.
"""

import json
import math
from pathlib import Path
from typing import Any

import making
import pytest

from quantool.plugins.contract import Download
from quantool.records import FileRecord, Verdict, file_record
from quantool.validation import canary
from quantool.validation._engines import llama_cpp
from quantool.validation._engines.head import Unsound
from quantool.validation._score import canary_replay
from quantool.validation._score.canary_keys import changed_keys, keys_of, media_tokens, window
from tests.attest.releases import FOLDER, GGUF, released


def log_probs(probabilities: list[list[float]]) -> Any:
    import torch

    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_what_is_kept_is_the_most_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary_replay, "TOP", 2)
    kept = canary_replay.kept(log_probs([[0.1, 0.6, 0.3]]))
    assert kept == [[[1, round(math.log(0.6), 4)], [2, round(math.log(0.3), 4)]]]


def test_the_divergence_takes_the_rest_together() -> None:
    top = [[[0, math.log(0.5)], [1, math.log(0.25)]]]
    after = log_probs([[0.25, 0.25, 0.25, 0.25]])
    wanted = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.25 / 0.5)
    assert canary_replay.divergences(top, after) == [pytest.approx(wanted, abs=1e-9)]
    assert canary_replay.divergences(top, log_probs([[0.5, 0.25, 0.2, 0.05]])) == [pytest.approx(0, abs=1e-9)]
    with pytest.raises(Unsound, match="another vocabulary"):
        canary_replay.divergences([[[4, -0.1]]], after)


def test_the_window_has_text_special_tokens_and_all_of_the_vocabulary() -> None:
    ids = window(range(1000, 1400), range(10, 30), 9600)
    assert len(ids) == 256
    assert ids[:140] == list(range(1000, 1140))
    assert ids[140:160] == list(range(10, 30))
    assert ids[160:] == list(range(0, 9600, 100))
    assert len(window(range(1000, 1400), range(10, 60), 9600, 64)) == 64
    assert max(window(range(5), [], 9600)) == 9500


def test_pictures_have_no_place_in_it(tmp_path: Path) -> None:
    config = {
        "image_token_id": 7,
        "eos_token_id": 1,
        "text_config": {"audio_token_index": 9, "boi_token_id": None},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert media_tokens(tmp_path) == {7, 9}


def test_changed_keys_are_named() -> None:
    long = {"entries": 3, "sha256": "ab" * 32}
    before = {"a": 1, "b": long, "c": True, "d": 1.0}
    after = {"a": 2, "b": long | {"sha256": "cd" * 32}, "c": 1, "e": 0, "d": 1.0}
    assert list(changed_keys(before, after)) == [
        "a is 2, was 1",
        "b is #cdcdcdcd, was #abababab",
        "c is 1, was True",
        "e is new",
    ]
    assert list(changed_keys({"a": 1}, {})) == ["a is gone"]


@pytest.fixture(scope="module")
def left() -> dict[str, Any]:
    kept = {
        name: json.loads((released() / name / "canary.json").read_text())["canary"] for name in (GGUF, FOLDER)
    }
    return {output: entry for folder in kept.values() for output, entry in folder.items()}


def download(left: dict[str, Any], output: str, scratch: Path, **changes: Any) -> Download:
    folder = released() / (GGUF if output.startswith("gguf") else FOLDER)
    level = output.partition("/")[2]
    path = next(folder.glob(f"*-{level}.gguf")) if output.startswith("gguf") else folder
    names = [path.name] if path.is_file() else list(left[output]["files"])
    files: tuple[FileRecord, ...] = tuple(file_record(folder, name) for name in names)
    return Download(path, left[output]["engine"], output, left[output] | changes, files, scratch)


@pytest.mark.e2e
@pytest.mark.parametrize("output", ["gguf/Q8_0", "gguf/Q4_K_M", "fp16/BF16-safetensors"])
def test_a_sound_file_passes(output: str, left: dict[str, Any], tmp_path: Path) -> None:
    found = {
        finding.metric: finding for finding in canary.replay(download(left, output, tmp_path), making.QUIET)
    }
    assert {metric: finding.verdict for metric, finding in found.items()} == dict.fromkeys(
        ("metadata", "tokens", "template", "divergence"), Verdict.PASS
    )
    assert len(left[output]["ids"]) == len(left[output]["top"]) == 256
    assert len(left[output]["chats"]) >= 12
    assert 0 <= float(found["divergence"].measured or 0) < 2e-6
    assert float(left[output]["noise"]) < (1e-6 if output.startswith("fp16") else 2e-3)


@pytest.mark.e2e
def test_threads_and_batches_are_within_the_limit(
    left: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, with the sizes that a worker would not be told."""
    entry, path = left["gguf/Q4_K_M"], next((released() / GGUF).glob("*-Q4_K_M.gguf"))
    request = {
        "model": str(path),
        "engine": "llama.cpp",
        "device": "cpu",
        "ids": entry["ids"],
        "top": entry["top"],
    }
    limit = max(canary.FLOOR, canary.FACTOR * entry["noise"])
    seen = []
    for threads, ubatch in ((1, 512), (2, 16), (3, 1)):
        monkeypatch.setattr(canary_replay, "cores", lambda threads=threads: threads)
        monkeypatch.setattr(llama_cpp, "UBATCH_TOKENS", ubatch)
        result = canary_replay.measure(request, lambda *_: None)
        seen.append(sum(result["divergences"]) / 256)
    assert max(seen) < limit, seen
    assert seen[0] < 1e-6 < seen[1]


@pytest.mark.e2e
def test_what_was_left_of_another_file_fails_by_name(left: dict[str, Any], tmp_path: Path) -> None:
    entry = left["gguf/Q8_0"]
    texts = [
        [text, add, ids[:-1] if number == 3 else ids]
        for number, (text, add, ids) in enumerate(entry["texts"])
    ]
    chats = [[chat, (text or "") + "!", ids] for chat, text, ids in entry["chats"]]
    top = left["gguf/Q4_K_M"]["top"]
    keys = entry["keys"] | {"general.name": "another"}
    changed = download(left, "gguf/Q8_0", tmp_path, texts=texts, chats=chats, top=top, keys=keys)
    found = {finding.metric: finding for finding in canary.replay(changed, making.QUIET)}
    assert {finding.verdict for finding in found.values()} == {Verdict.REGRESSION}
    assert (
        found["metadata"].detail == "general.name is 'tiny 5.2M Chat', was 'another'"
        or "was 'another'" in found["metadata"].detail
    )
    assert "limit" in found["divergence"].detail
    assert found["template"].detail.startswith("one question differs")


@pytest.mark.e2e
def test_a_file_that_does_not_load_fails(left: dict[str, Any], tmp_path: Path) -> None:
    sound = download(left, "gguf/Q8_0", tmp_path)
    cut = tmp_path / "cut-Q8_0.gguf"
    cut.write_bytes(sound.artifact.read_bytes()[:-4096])
    broken = Download(cut, sound.engine, sound.name, sound.left, sound.files, tmp_path)
    (finding,) = canary.replay(broken, making.QUIET)
    assert (finding.metric, finding.verdict) == ("metadata", Verdict.REGRESSION)
    assert str(tmp_path) not in finding.detail


def test_the_keys_of_a_folder_are_its_files_entries() -> None:
    keys = keys_of(
        making.TINY,
        "transformers",
        ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"],
    )
    assert keys["config.json: hidden_size"] == 256
    assert keys["tokenizer.json: model"].keys() == {"entries", "sha256"}
    assert keys["chat_template.jinja"]["bytes"] == (making.TINY / "chat_template.jinja").stat().st_size
    assert not any("safetensors" in key for key in keys)
