"""What a checkpoint is for, by its small files."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantool.config.schema import Config
from quantool.errors import ConfigError, SourceError
from quantool.plan.make import make_plan
from quantool.plugins import find
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace
from quantool.source import resolve as resolving
from quantool.source.resolve import resolve
from quantool.source.task import labels_of, module_files, read_pooling, task_of
from quantool.tasks import Task, TaskKind
from tests.checkpoint import write_checkpoint, write_json

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 3, "name": "3", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
LAST = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}
QUIET = Progress(quiet=True)


def write_sentences(folder: Path, *modules: dict[str, Any], pooling: dict[str, Any] | None = LAST) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "modules.json", [*modules])
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        write_json(folder / "1_Pooling/config.json", pooling)
    return folder


def found(folder: Path, architecture: str = "LlamaForCausalLM", tag: str | None = None, **top: Any) -> Task:
    return task_of(folder, architecture, top, tag)


def test_sentence_transformers_files_make_an_embedding_model(tmp_path: Path) -> None:
    write_sentences(tmp_path, TRANSFORMER, POOLING, NORMALIZE)
    write_json(tmp_path / "config_sentence_transformers.json", {"prompts": {"query": "q: "}})
    task = found(tmp_path)
    assert task == Task(
        kind=TaskKind.EMBEDDING,
        pooling="lasttoken",
        normalized=True,
        prompts={"query": "q: "},
        files=("modules.json", "1_Pooling/config.json"),
    )
    assert not task.generates
    assert not found(write_sentences(tmp_path, TRANSFORMER, POOLING)).normalized


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8}, "lasttoken"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean_tokens"),
    ],
)
def test_poolings_of_old_and_new_versions(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    write_json(tmp_path / "config.json", settings)
    assert read_pooling(tmp_path / "config.json") == name


@pytest.mark.parametrize("settings", [{}, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}])
def test_a_pooling_that_is_none_or_two_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_json(tmp_path / "config.json", settings)
    with pytest.raises(SourceError, match="ways of pooling"):
        read_pooling(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("architecture", "tag", "top", "kind", "labels"),
    [
        ("LlamaForCausalLM", None, {}, TaskKind.GENERATION, ()),
        ("LlamaForCausalLM", "text-generation", {}, TaskKind.GENERATION, ()),
        ("Qwen3Model", None, {}, TaskKind.EMBEDDING, ()),
        ("LlamaForCausalLM", "sentence-similarity", {}, TaskKind.EMBEDDING, ()),
        ("BertForSequenceClassification", None, {}, TaskKind.CLASSIFICATION, ("LABEL_0", "LABEL_1")),
        ("BertForSequenceClassification", None, {"id2label": {"0": "LABEL_0"}}, TaskKind.RERANKING, ("LABEL_0",)),
        ("Qwen3ForSequenceClassification", None, {"num_labels": 1}, TaskKind.RERANKING, ("LABEL_0",)),
        (
            "BertForSequenceClassification", "text-ranking", {"id2label": {"0": "no", "1": "yes"}}, TaskKind.RERANKING,
            ("no", "yes"),
        ),
    ],
)  # fmt: skip
def test_the_task_by_architecture_and_card(
    tmp_path: Path,
    architecture: str,
    tag: str | None,
    top: dict[str, Any],
    kind: TaskKind,
    labels: tuple[str, ...],
) -> None:
    task = found(tmp_path, architecture, tag, **top)
    assert (task.kind, task.labels) == (kind, labels)


@pytest.mark.parametrize("top", [{"id2label": {"0": "a", "2": "b"}}, {"id2label": ["a"]}, {"num_labels": 0}])
def test_labels_that_are_none(top: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="label"):
        labels_of(top, Path("config.json"))


def test_a_module_that_is_not_carried_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="2_Dense is a Dense, which quantool does not carry"):
        found(write_sentences(tmp_path, TRANSFORMER, POOLING, DENSE))


def test_a_pooling_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"1_Pooling/config\.json is missing: modules.json names it"):
        found(write_sentences(tmp_path, TRANSFORMER, POOLING, pooling=None))


@pytest.mark.parametrize(
    "modules",
    [[], {"0": TRANSFORMER}, [TRANSFORMER | {"path": "../x"}], [{"idx": 0}], [TRANSFORMER] * 40, "x"],
)
def test_lists_of_modules_that_are_none(tmp_path: Path, modules: Any) -> None:
    write_json(tmp_path / "modules.json", modules)
    with pytest.raises(SourceError, match=r"modules\.json"):
        found(tmp_path)
    (tmp_path / "modules.json").write_text("[" * 100)
    with pytest.raises(SourceError, match="is no JSON"):
        found(tmp_path)


def test_the_files_of_the_modules_belong_to_the_source(tmp_path: Path) -> None:
    """Those that modules.json leads to, and no other folder's."""
    folder = write_sentences(write_checkpoint(tmp_path / "m"), TRANSFORMER, POOLING, NORMALIZE)
    (folder / "onnx").mkdir()
    write_json(folder / "onnx/config.json", {})
    source = resolve(Config(model_id=str(folder), method="gguf"), weights=True, progress=QUIET)
    names = {file.name for file in source.files}
    assert {"modules.json", "1_Pooling/config.json"} <= names
    assert "onnx/config.json" not in names
    assert source.facts.task.pooling == "lasttoken"


def test_from_the_hub_they_are_asked_for(tmp_path: Path) -> None:
    write_sentences(tmp_path, TRANSFORMER, POOLING)
    names = ["config.json", "modules.json", "1_Pooling/config.json", "onnx/config.json", "model.safetensors"]
    assert "modules.json" in resolving._chosen(names, resolving.MODEL_FILES)
    assert module_files(tmp_path, names) == ["1_Pooling/config.json"]
    assert module_files(tmp_path, ["config.json"]) == []


def test_checks_follow_the_task(tmp_path: Path) -> None:
    everything = Config(model_id="x", method="gguf")
    embedding, plain = Task(kind=TaskKind.EMBEDDING), Task()
    chosen = find.judging_checks(everything, embedding)
    assert {"embedding", "tokenizer", "integrity", "overlap"} <= {*chosen}
    assert not {"perplexity", "behaviour", "chat_template", "generation", "classification", "needle"} & {
        *chosen
    }
    assert not {"embedding", "classification"} & {*find.judging_checks(everything, plain)}
    assert "perplexity" in find.judging_checks(everything, plain)
    assert "classification" in find.judging_checks(everything, Task(kind=TaskKind.RERANKING))


def test_a_check_that_says_nothing_about_the_model_is_refused_by_the_plan(tmp_path: Path) -> None:
    folder = write_sentences(write_checkpoint(tmp_path / "m"), TRANSFORMER, POOLING)
    config = Config.model_validate(
        {
            "model_id": str(folder),
            "method": "fp8",
            "quant_level": "FP8",
            "validation": {"checks": ["perplexity"]},
        }
    )
    source = resolve(config, weights=False, progress=QUIET)
    with pytest.raises(
        ConfigError, match="perplexity cannot judge this model, which is for embedding"
    ) as caught:
        make_plan(config, source, Workspace(tmp_path / "out"))
    assert "embedding" in (caught.value.hint or "")


def test_the_record_is_read_back() -> None:
    task = Task(kind=TaskKind.CLASSIFICATION, labels=("a", "b"))
    assert Task.model_validate(json.loads(task.model_dump_json())) == task
