"""What leaves the machine is decided by types: every field of every record is looked at."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantool import pipeline
from quantool.card.redact import published, published_config
from quantool.config.schema import Config
from quantool.records import Artifact, OutputPlan, Plan, Report
from quantool.runtime.progress import Progress
from tests.checkpoint import write_checkpoint


@pytest.fixture
def plan(tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr("quantool.plan.make.refuse_unloadable", lambda *_: None)  # it has two tensors
    config = {
        "model_id": str(write_checkpoint(tmp_path / "tiny")), "method": "fake", "quant_level": ["Q8_0"],
        "output_path": tmp_path / "out", "push_to_hub": True, "tokenizer_name": str(tmp_path / "tiny"),
    }  # fmt: skip
    return pipeline.plan(Config.model_validate(config), Progress(quiet=True))


def test_no_record_of_a_plan_names_a_folder_of_this_machine(plan: Plan, tmp_path: Path) -> None:
    made = published(plan)
    assert str(tmp_path) not in json.dumps(made)
    assert made["source"]["model_id"] == "tiny"
    assert made["config"] == {
        "model_id": "tiny",
        "tokenizer_name": "tiny",
        "method": "fake",
        "quant_level": ["Q8_0"],
    }
    assert made["source"]["files"] == [file.model_dump() for file in plan.source.files]
    assert not {"free_disk", "peak_disk"} & made.keys()
    assert "folder" not in made["source"]
    assert all("done" not in entry for entry in (*made["outputs"], *made["stages"]))


def test_what_is_no_path_stays_as_it_is(plan: Plan) -> None:
    source = plan.source.model_copy(update={"model_id": "org/tiny", "generation": {"stop": "/think"}})
    made = published(plan.model_copy(update={"source": source}))
    assert made["source"]["model_id"] == "org/tiny"
    assert made["source"]["generation"] == {"stop": "/think"}
    assert made["versions"] == plan.versions


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({"dataset_path": "/home/me/a.txt"}, {"dataset_path": "a.txt"}),
        ({"dataset_path": "texts/a.txt"}, {"dataset_path": "texts/a.txt"}),
        ({"dataset_path": "../../me/a.txt"}, {"dataset_path": "a.txt"}),
        ({"eval_dataset": "~/held-out.txt"}, {"eval_dataset": "held-out.txt"}),
        ({"eval_dataset": "wikitext"}, {"eval_dataset": "wikitext"}),
        ({"output_path": "/out", "push_to_hub": True, "disk_bounded": True}, {}),
        (
            {"validation": {"corpora": [{"name": "en", "path": "/t/en.txt"}], "needle": {"haystack": "/t/hay.txt"}}},
            {"validation": {"corpora": [{"name": "en", "path": "en.txt"}], "needle": {"haystack": "hay.txt"}}},
        ),
        (
            {"method": "gguf", "quantization_config": {"imatrix": "/home/me/m.gguf", "pre_tokenizer": "/x"}},
            {"method": "gguf", "quantization_config": {"imatrix": "m.gguf", "pre_tokenizer": "/x"}},
        ),
        (
            {"quantizations": [{"method": "gguf", "quantization_config": {"imatrix": "/home/me/m.gguf"}}]},
            {"quantizations": [{"method": "gguf", "quantization_config": {"imatrix": "m.gguf"}}]},
        ),
        ({"method": "gguf", "quantization_config": {"imatrix": True}}, {"method": "gguf", "quantization_config": {"imatrix": True}}),
    ],
)  # fmt: skip
def test_paths_are_known_by_their_type_not_by_their_key(config: dict[str, Any], left: dict[str, Any]) -> None:
    assert published_config(config) == left


def test_options_of_an_output_and_the_reference_of_a_report(plan: Plan) -> None:
    output = plan.outputs[0].model_copy(update={"method": "gguf", "options": {"imatrix": "/home/me/m.gguf"}})
    assert published(OutputPlan.model_validate(output))["options"] == {"imatrix": "m.gguf"}
    artifact = Artifact(
        output="a", method="gguf", level="Q8_0", folder=Path("/home/me/out"), files=(), bits_per_weight=8, seconds=1,
        made_from=".quantool/base.gguf",
    )  # fmt: skip
    made = published(Report(artifact=artifact, reference="/home/me/models/tiny", findings=(), seconds=1))
    assert made["reference"] == "tiny"
    assert not {"folder", "made_from"} & made["artifact"].keys()
