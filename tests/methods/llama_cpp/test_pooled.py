"""Pooling and classifier heads in what the converter writes, for architectures that upstream leaves without."""

import json
import shutil
from pathlib import Path

import making
import pooled_making
import pytest
import tampering

from quantool.errors import SourceError
from quantool.methods._llama_cpp import dry_run
from quantool.methods._llama_cpp.base_file import GgufOptions
from quantool.methods._llama_cpp.dry_run import _check_rehearsal
from quantool.methods._llama_cpp.pooled import gguf_pooling
from quantool.plan.make import make_plan
from quantool.runtime.workspace import Workspace
from quantool.tasks import Task, TaskKind

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def cache() -> object:
    with making.own_cache():
        yield


def embedding(tmp_path: Path, pooling: str) -> Path:
    """The SentencePiece Llama as an embedding model; upstream writes no pooling for its class."""
    folder = shutil.copytree(making.model("spm_llama"), tmp_path / "llama")
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder


@pytest.mark.parametrize(("pooling", "number"), [("lasttoken", 3), ("mean_tokens", 1), ("cls_token", 2)])
def test_every_architecture_gets_its_pooling(tmp_path: Path, pooling: str, number: int) -> None:
    source = tampering.source_of(embedding(tmp_path, pooling))
    rehearsal = dry_run.rehearse(source, GgufOptions(), "f16")
    assert rehearsal.keys["llama.pooling_type"] == number


def test_a_model_that_writes_text_gets_none() -> None:
    rehearsal = dry_run.rehearse(tampering.source_of(making.model("spm_llama")), GgufOptions(), "f16")
    assert "llama.pooling_type" not in rehearsal.keys


def test_a_pooling_that_llama_cpp_does_not_have_is_refused_by_the_plan(tmp_path: Path) -> None:
    source = tampering.source_of(embedding(tmp_path, "max_tokens"))
    with pytest.raises(SourceError, match=r"pools by max_tokens, which llama\.cpp cannot"):
        gguf_pooling(source)


def test_a_pooling_that_nobody_knows_is_refused_by_the_plan(tmp_path: Path) -> None:
    config = pooled_making.settings(pooled_making.EMBEDDING, "fp8", "FP8_DYNAMIC", tmp_path / "out")
    source = tampering.source_of(pooled_making.checkpoint(pooled_making.EMBEDDING))
    facts = source.facts.model_copy(update={"task": Task(kind=TaskKind.EMBEDDING)})
    with pytest.raises(SourceError, match="nothing says how its states are pooled"):
        make_plan(config, source.model_copy(update={"facts": facts}), Workspace(tmp_path / "out"))


def test_berts_pooler_and_labels_reach_the_file() -> None:
    source = tampering.source_of(pooled_making.checkpoint("bert_classifier"))
    rehearsal = dry_run.rehearse(source, GgufOptions(), "f16")
    heads = {name: tensor.shape for name, tensor in rehearsal.tensors.items() if name.startswith("cls")}
    assert heads == {
        "cls.weight": (256, 256), "cls.bias": (256,), "cls.output.weight": (3, 256), "cls.output.bias": (3,),
    }  # fmt: skip
    assert rehearsal.keys["bert.pooling_type"] == 4  # LLAMA_POOLING_TYPE_RANK


def test_a_reranker_that_answers_in_words_is_not_made_into_one_that_gives_scores() -> None:
    """Qwen3-Reranker is a language model that says yes or no; by its name upstream keeps these two rows of the head."""
    source = tampering.source_of(tampering.folder_of("qwen3"))
    keys = {"general.architecture": "qwen3"}
    summary = {"keys": keys, "tokens": 8, "tensors": {"token_embd.weight": {"shape": [8, 4]}}}
    _check_rehearsal(source, summary)
    with pytest.raises(SourceError, match="for a reranker"):
        _check_rehearsal(source, summary | {"keys": keys | {"qwen3.pooling_type": 4}})
