"""Token ids of a GGUF are compared with the source's tokenizer, not with another GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tampering
from tampering import altered, case, findings, gguf_of, regressions, tampered

from quantool.records import Verdict
from quantool.validation._engines import hf_tokenizer
from quantool.validation._engines.probe_texts import PROBES
from quantool.validation._engines.vocabulary import ProbeText, differing, explain
from quantool.validation.tokenizer import AROUND, BEGINNINGS, TokenizedText

SAID = "Gaur euria ari du. Avui plou a Girona.\n\nHoxe chove en Lugo: 12,5 mm."


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "text.txt").write_text(SAID * 20)
    chat = {"messages": [{"role": "user", "content": SAID}, {"role": "assistant", "content": "Bai."}]}
    (folder / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    return [
        {"name": "text", "path": str(folder / "text.txt")},
        {"name": "chat", "path": str(folder / "chat.jsonl")},
    ]


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_healthy(name: str, corpora: list[dict[str, Any]]) -> None:
    found = findings("tokenizer", case(name, corpora=corpora))
    assert not regressions(found)
    assert {"probe_ids", "special_ids", "bos_count", "corpus_ids:text", "corpus_ids:chat"} <= set(found)
    assert all(one.verdict == Verdict.PASS for metric, one in found.items() if metric != "nfc")


@pytest.mark.e2e
def test_a_hundred_thousand_tokens_are_compared(corpora: list[dict[str, Any]]) -> None:
    """However short the corpora are."""
    found = findings("tokenizer", case("qwen3", corpora=corpora))
    counts = [
        int(one.detail.split(" tokens")[0].split("; ")[-1])
        for metric, one in found.items()
        if metric.startswith("corpus_ids")
    ]
    assert len(counts) == 3
    assert sum(counts) >= 100_000


@pytest.mark.e2e
def test_nfc_is_skipped_but_visible(corpora: list[dict[str, Any]]) -> None:
    found = findings("tokenizer", case("qwen3", corpora=corpora))
    assert found["nfc"].verdict == Verdict.SKIPPED
    assert "'combining marks'" in found["nfc"].detail
    assert "nfc" not in findings("tokenizer", case("gemma3", corpora=corpora))
    plain = len(PROBES) + len(BEGINNINGS) - 1  # less the one that is skipped
    assert found["probe_ids"].reference == f"{plain} of {plain}"


@pytest.mark.e2e
def test_changed_pre_tokenizer(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    other = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {"tokenizer.ggml.pre": "gpt-2"})
    found = findings("tokenizer", case("qwen3", other, corpora=corpora))
    assert "probe_ids" in regressions(found)
    assert "expected" in found["probe_ids"].detail


@pytest.mark.e2e
def test_doubled_bos(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    added = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {"tokenizer.ggml.add_bos_token": True})
    found = findings("tokenizer", case("qwen3", added, corpora=corpora))
    assert regressions(found) == {"bos_count", "probe_ids"}
    assert (found["bos_count"].measured, found["bos_count"].reference) == (1, 0)


@pytest.mark.e2e
def test_missing_bos(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    dropped = tampered(gguf_of("gemma3"), tmp_path / "t.gguf", {"tokenizer.ggml.add_bos_token": False})
    found = findings("tokenizer", case("gemma3", dropped, corpora=corpora))
    assert "bos_count" in regressions(found)
    assert (found["bos_count"].measured, found["bos_count"].reference) == (0, 1)


@pytest.mark.e2e
def test_another_models_tokenizer(corpora: list[dict[str, Any]]) -> None:
    found = findings("tokenizer", case("qwen3", gguf_of("gemma3"), corpora=corpora))
    assert {"probe_ids", "special_ids", "corpus_ids:text", "corpus_ids:chat"} <= regressions(found)


@pytest.mark.e2e
def test_special_token_that_became_ordinary(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    from gguf import GGUFReader

    field = GGUFReader(gguf_of("qwen3")).get_field("tokenizer.ggml.token_type")
    assert field is not None
    types = [1 if kind == 3 else kind for kind in field.contents()]
    plain = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {"tokenizer.ggml.token_type": types})
    assert "special_ids" in regressions(findings("tokenizer", case("qwen3", plain, corpora=corpora)))


@pytest.mark.e2e
def test_spaces_of_sentencepiece(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    chosen = case("spm_llama", corpora=corpora)
    found = findings("tokenizer", chosen)
    assert regressions(found) == {"probe_ids", "special_ids"}
    assert "add_space_prefix" in found["special_ids"].detail
    base = findings("tokenizer", altered(chosen, chat_template=None))
    assert not regressions(base)
    assert base["space_prefix"].verdict == Verdict.SKIPPED

    key = "tokenizer.ggml.add_space_prefix"
    mended = case(
        "spm_llama", tampered(gguf_of("spm_llama"), tmp_path / "m.gguf", {key: False}), corpora=corpora
    )
    found = findings("tokenizer", mended)
    assert not regressions(found)
    assert found["corpus_ids:text"].verdict == Verdict.PASS
    assert found["space_prefix"].verdict == Verdict.SKIPPED


@pytest.mark.e2e
def test_file_that_does_not_load(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_of("qwen3").read_bytes()[:2000])
    found = findings("tokenizer", case("qwen3", cut, corpora=corpora))
    assert regressions(found) == {"loads"}
    assert "failed to load model" in found["loads"].detail


@pytest.mark.e2e
def test_folder_for_transformers(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    folder = tampering.tokenizer_folder("qwen3", tmp_path / "artifact")
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["merges"] = saved["model"]["merges"][:50]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    found = findings("tokenizer", case("qwen3", folder, corpora=corpora))
    assert {"probe_ids", "corpus_ids:text"} <= regressions(found)
    assert found["bos_count"].verdict in (Verdict.PASS, Verdict.SKIPPED)


def test_a_limit_explains_only_what_it_explains_alone() -> None:
    text = ProbeText("x", "e\u0301")
    assert TokenizedText(text, [1], [1], [2], [2]).limit() == ""
    assert TokenizedText(text, [1], [2, 3], [1], None).limit() == "nfc"
    assert TokenizedText(text, [1], [2, 3], [4], None).limit() == ""
    assert TokenizedText(text, [1], [2], None, [2]).limit() == "space_prefix"


def test_first_difference() -> None:
    assert differing([1, 2], [1, 2]) is None
    assert differing([1, 2, 3], [1, 4, 3]) == 1
    assert differing([1, 2], [1]) == 1
    shown = explain([0, 1, 2], [0, 2, 2], ["a", "b", "c"])
    assert shown == "at token 1: expected 'a':0 'b':1 'c':2; found 'a':0 'c':2 'c':2"
    assert explain([5], [], ["a"]) == "at token 0: expected '?':5; found nothing"


def test_probes_have_names_of_their_own() -> None:
    texts = [*BEGINNINGS, *PROBES, *AROUND]
    assert len({probe.name for probe in texts}) == len(texts)


def test_what_a_template_prints_is_tried_before_other_special_tokens() -> None:
    tokenizer = hf_tokenizer.load_tokenizer(str(tampering.folder_of("qwen3")), trust_remote_code=False)
    facts = hf_tokenizer.describe(tokenizer)
    assert set(tokenizer.all_special_tokens) <= set(facts["special"])
    printed = [token in facts["templates"]["default"] for token in facts["special"]]
    assert printed == sorted(printed, reverse=True)
    assert printed[0]
