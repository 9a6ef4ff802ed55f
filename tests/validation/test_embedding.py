"""Embeddings: sound artifacts pass, and every loss is found by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pooled_making as made
import pytest
import tampering

from quantool.errors import SourceError
from quantool.plugins.find import find_check
from quantool.records import Verdict
from quantool.tasks import Task, TaskKind
from quantool.validation import embedding
from quantool.validation._pooled import vectors

pytestmark = pytest.mark.e2e
POOLING = "qwen3.pooling_type"
ADD_EOS = "tokenizer.ggml.add_eos_token"


def judged(artifact: Path) -> dict[str, Any]:
    return dict(made.findings("embedding", made.EMBEDDING, artifact))


def test_a_sound_gguf_passes() -> None:
    found = judged(made.gguf(made.EMBEDDING))
    assert tampering.regressions(found) == set()
    assert found["pooling"].measured == "lasttoken"
    assert found["cosine"].measured > 0.9995
    assert found["cosine"].threshold == 0.999
    assert found["recall_at_10"].measured > 0.95
    assert found["token_ids"].verdict is Verdict.PASS


def test_a_sound_folder_passes() -> None:
    found = judged(made.fp8(made.EMBEDDING))
    assert tampering.regressions(found) == set()
    assert found["modules"].measured == "Transformer Pooling Normalize"
    assert (found["pooling"].measured, found["normalization"].measured) == ("lasttoken", "length 1")
    assert 0.998 < found["cosine"].measured < 1


def test_the_file_names_the_pooling_of_the_source() -> None:
    from gguf import GGUFReader

    fields = GGUFReader(made.gguf(made.EMBEDDING)).fields
    assert fields[POOLING].contents() == 3  # LLAMA_POOLING_TYPE_LAST
    assert fields[ADD_EOS].contents() is True


@pytest.mark.parametrize(
    ("change", "drop", "broken", "detail"),
    [
        ({}, [POOLING], {"pooling", "cosine"}, "gives no embeddings of this file, whose pooling is none"),
        ({POOLING: 1}, [], {"pooling", "cosine", "recall_at_10"}, "pooling_type of the file is not the source's"),
        ({POOLING: 2}, [], {"pooling", "cosine", "recall_at_10"}, "pooling_type of the file is not the source's"),
        ({ADD_EOS: False}, [], {"token_ids", "cosine", "recall_at_10"}, "token 4089 is missing at the end of a text (EOS)"),
        (
            {"tokenizer.ggml.eos_token_id": 4091}, [], {"token_ids", "cosine", "recall_at_10"},
            "a text ends with token 4091, the source's with 4089",
        ),
    ],
)  # fmt: skip
def test_a_loss_in_a_gguf_is_named(
    tmp_path: Path, change: dict[str, Any], drop: list[str], broken: set[str], detail: str
) -> None:
    damaged = tampering.tampered(made.gguf(made.EMBEDDING), tmp_path / "m.gguf", change, drop)
    found = judged(damaged)
    assert tampering.regressions(found) == broken
    assert any(detail in found[metric].detail for metric in broken)


def test_a_layer_of_zeros_is_found(tmp_path: Path) -> None:
    def clear(data: Any) -> None:
        data[:] = 0

    damaged = tampering.edited(made.gguf(made.EMBEDDING), tmp_path / "m.gguf", "blk.1.ffn_down.weight", clear)
    assert "cosine" in tampering.regressions(judged(damaged))


def rewritten(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        value = change(json.loads((folder / name).read_text()))
        (folder / name).write_text(json.dumps(value))

    return damage


def deleted(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def without_end(settings: Any) -> Any:
    single = [part for part in settings["post_processor"]["single"] if "Sequence" in part]
    return settings | {"post_processor": settings["post_processor"] | {"single": single}}


@pytest.mark.parametrize(
    ("damage", "broken", "metric", "detail"),
    [
        (deleted("modules.json"), {"modules", "cosine", "recall_at_10"}, "modules", "modules.json is missing"),
        (
            deleted("1_Pooling/config.json"), {"modules", "cosine"}, "modules",
            "1_Pooling/config.json is missing: modules.json names it",
        ),
        (
            rewritten("1_Pooling/config.json", lambda _: {"pooling_mode_mean_tokens": True}),
            {"pooling", "cosine", "recall_at_10"}, "pooling", "it is not the source's pooling",
        ),
        (
            rewritten("modules.json", lambda modules: modules[:2]), {"normalization"}, "normalization",
            "vectors are not given the length",
        ),
        (
            deleted("config_sentence_transformers.json"), {"prompts"}, "prompts",
            "config_sentence_transformers.json is missing",
        ),
        (
            rewritten("config_sentence_transformers.json", lambda known: known | {"prompts": {}}), {"prompts"}, "prompts",
            "prompts and the longest text are lost",
        ),
        (
            rewritten("tokenizer.json", without_end), {"token_ids", "cosine", "recall_at_10"}, "token_ids",
            "token 4089 is missing at the end of a text (EOS)",
        ),
    ],
)  # fmt: skip
def test_a_loss_in_a_folder_is_named(
    tmp_path: Path, damage: Callable[[Path], None], broken: set[str], metric: str, detail: str
) -> None:
    folder = made.copied(made.fp8(made.EMBEDDING), tmp_path / "model")
    damage(folder)
    found = judged(folder)
    assert tampering.regressions(found) == broken
    assert detail in found[metric].detail


def test_a_lost_scale_is_found(tmp_path: Path) -> None:
    def lose(tensors: dict[str, Any]) -> None:
        del tensors["layers.0.mlp.down_proj.weight_scale"]

    folder = tampering.spoilt(made.fp8(made.EMBEDDING), tmp_path / "model", lose)
    found = judged(folder)
    assert "cosine" in tampering.regressions(found)


def test_bert_is_pooled_by_the_mean_in_both_engines() -> None:
    for artifact in (made.gguf("bert_embedding"), made.fp8("bert_embedding")):
        found = dict(made.findings("embedding", "bert_embedding", artifact))
        assert tampering.regressions(found) == set()
        assert found["pooling"].measured == "mean"


def test_a_word_piece_tokenizer_passes_but_for_known_limits() -> None:
    found = dict(made.findings("tokenizer", "bert_embedding", made.gguf("bert_embedding")))
    assert tampering.regressions(found) == set()
    assert found["word_pieces"].verdict is Verdict.SKIPPED
    assert "control characters" in found["word_pieces"].detail


def test_a_model_without_a_pooling_is_refused_by_the_plan() -> None:
    case = made._case(made.EMBEDDING)
    source = tampering.altered(case, task=Task(kind=TaskKind.EMBEDDING)).source
    with pytest.raises(SourceError, match="nothing says how its states are pooled") as caught:
        vectors.require_task(case.config, source)
    assert "modules.json" in (caught.value.hint or "")
    source = tampering.altered(case, task=Task(kind=TaskKind.EMBEDDING, pooling="weird")).source
    with pytest.raises(SourceError, match="pools by weird"):
        vectors.require_task(case.config, source)


def test_it_judges_embedding_models_alone() -> None:
    assert find_check(embedding.NAME).tasks == {TaskKind.EMBEDDING}
    assert TaskKind.EMBEDDING not in find_check("perplexity").tasks
