"""Classifiers and rerankers: sound artifacts pass, and every loss is found by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pooled_making as made
import pytest
import tampering

from quantool.errors import SourceError

pytestmark = pytest.mark.e2e


def judged(name: str, artifact: Path) -> dict[str, Any]:
    return dict(made.findings("classification", name, artifact))


def test_a_sound_classifier_passes() -> None:
    found = judged("bert_classifier", made.gguf("bert_classifier"))
    assert tampering.regressions(found) == set()
    assert found["labels"].measured == "sport, law, weather"
    assert found["head"].measured == "cls.bias cls.output.bias cls.output.weight cls.weight"
    assert found["same_label"].measured > 0.95
    assert 0 < found["logit_error"].measured < 0.01


def test_a_sound_reranker_passes() -> None:
    found = judged("roberta_reranker", made.gguf("roberta_reranker"))
    assert tampering.regressions(found) == set()
    assert found["rank_correlation"].measured > 0.9
    assert found["token_ids"].measured == "320 of 320"


@pytest.mark.parametrize(
    ("name", "metric"), [("qwen3_classifier", "same_label"), ("qwen3_reranker", "rank_correlation")]
)
def test_a_sound_folder_passes(name: str, metric: str) -> None:
    found = judged(name, made.fp8(name))
    assert tampering.regressions(found) == set()
    assert found[metric].measured > 0.9


def cleared(data: Any) -> None:
    data[:] = 0


def reversed_rows(data: Any) -> None:
    data[:] = data[::-1].copy()


def test_a_head_of_zeros_in_a_gguf_is_named(tmp_path: Path) -> None:
    damaged = tampering.edited(
        made.gguf("bert_classifier"), tmp_path / "m.gguf", "cls.output.weight", cleared
    )
    found = judged("bert_classifier", damaged)
    assert {"logit_error", "same_label"} & tampering.regressions(found)
    assert "every text gets the same logits: the classifier is lost or zero" in found["logit_error"].detail


def test_a_lost_pooler_is_found(tmp_path: Path) -> None:
    """As llama.cpp's own converter loses it."""
    damaged = tampering.tampered(
        made.gguf("bert_classifier"), tmp_path / "m.gguf", without=("cls.weight", "cls.bias")
    )
    assert "logit_error" in tampering.regressions(judged("bert_classifier", damaged))


def test_a_lost_head_in_a_gguf_is_named(tmp_path: Path) -> None:
    lost = ("cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias")
    damaged = tampering.tampered(made.gguf("bert_classifier"), tmp_path / "m.gguf", without=lost)
    found = judged("bert_classifier", damaged)
    assert found["head"].detail == "the file has no tensors of a classifier"
    assert {"head", "logit_error"} <= tampering.regressions(found)


def test_permuted_labels_in_a_gguf_are_named(tmp_path: Path) -> None:
    names = {"bert.classifier.output_labels": ["law", "sport", "weather"]}
    damaged = tampering.tampered(made.gguf("bert_classifier"), tmp_path / "m.gguf", names)
    found = judged("bert_classifier", damaged)
    assert tampering.regressions(found) == {"labels"}
    assert (found["labels"].measured, found["labels"].reference) == (
        "law, sport, weather",
        "sport, law, weather",
    )


def test_another_pooling_in_a_gguf_is_named(tmp_path: Path) -> None:
    damaged = tampering.tampered(made.gguf("bert_classifier"), tmp_path / "m.gguf", {"bert.pooling_type": 1})
    found = judged("bert_classifier", damaged)
    assert tampering.regressions(found) == {"pooling", "logit_error"}
    assert "the classifier is not computed" in found["pooling"].detail


def lost(tensors: dict[str, Any]) -> None:
    del tensors["score.weight"]


def zeroed(tensors: dict[str, Any]) -> None:
    tensors["score.weight"].zero_()


def permuted(tensors: dict[str, Any]) -> None:
    tensors["score.weight"] = tensors["score.weight"][[2, 0, 1]].clone()


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        (lost, "lacks weights of Qwen3ForSequenceClassification: score.weight"),
        (zeroed, "every text gets the same logits: the classifier is lost or zero"),
        (permuted, "its labels stand in another order: weather, sport, law"),
    ],
)
def test_a_damaged_head_in_a_folder_is_named(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], detail: str
) -> None:
    folder = tampering.spoilt(made.fp8("qwen3_classifier"), tmp_path / "model", damage)
    found = judged("qwen3_classifier", folder)
    assert "logit_error" in tampering.regressions(found)
    assert detail in found["logit_error"].detail


def test_permuted_labels_in_a_folder_are_named(tmp_path: Path) -> None:
    def permute(settings: dict[str, Any]) -> None:
        settings["id2label"] = {"0": "law", "1": "sport", "2": "weather"}

    folder = tampering.spoilt(made.fp8("qwen3_classifier"), tmp_path / "model", settings=permute)
    found = judged("qwen3_classifier", folder)
    assert tampering.regressions(found) == {"labels"}


def test_a_reranker_upside_down_is_found(tmp_path: Path) -> None:
    def negate(tensors: dict[str, Any]) -> None:
        tensors["score.weight"].neg_()

    folder = tampering.spoilt(made.fp8("qwen3_reranker"), tmp_path / "model", negate)
    found = judged("qwen3_reranker", folder)
    assert tampering.regressions(found) == {"logit_error", "rank_correlation"}
    assert found["rank_correlation"].measured < -0.9


def test_a_reranker_that_needs_types_of_tokens_is_refused_as_a_gguf(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"by 2 types of tokens, and llama\.cpp gives all of them the first"
    ):
        made.gguf("bert_reranker")
    assert json.loads((made.checkpoint("bert_reranker") / "config.json").read_text())["type_vocab_size"] == 2
