"""A trained embedding model goes the whole way, by every kind of method, each with its own verdict."""

from __future__ import annotations

import json
from pathlib import Path

import making
import pooled_structures
import pytest
import yaml

from tests.e2e.conftest import DOCS, Ended, Run, write

pytestmark = pytest.mark.e2e
OUTPUTS = ("gguf/Q8_0", "gguf/Q4_K_M", "fp8/FP8_DYNAMIC", "awq/W4A16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Run, Ended]:
    file = write(
        tmp_path_factory.mktemp("embedding"),
        "job",
        model_id=str(pooled_structures.EMBEDDING),
        quantizations=[
            {"method": "gguf", "quant_level": ["Q8_0", "Q4_K_M"], "quantization_config": making.QWEN2},
            {"method": "fp8", "quant_level": "FP8_DYNAMIC"},
            {"method": "awq", "quant_level": "W4A16"},
        ],
        dataset_path=str(making.CALIBRATION),
        sample_size=16,
        calibration_config={"max_seq_length": 128},
        validation={"context": 128, "max_tokens": 4096, "corpora": [DOCS]},
    )
    made = Run(file, cache)
    return made, made.finish()


def test_every_output_passes_the_default_gates(run: tuple[Run, Ended]) -> None:
    made, ended = run
    assert ended.code == 0, ended.err
    assert ended.out.count("PASS") == len(OUTPUTS)
    assert "recall@10" in ended.out
    cosines = {}
    for folder in ("tiny-embedding-GGUF", "tiny-embedding-FP8-dynamic", "tiny-embedding-AWQ-W4A16"):
        for report in making.read_json(made.output / folder / "quantool.json")["reports"]:
            assert report["verdict"] == "PASS"
            assert "perplexity" not in report["check_seconds"]
            found = {finding["metric"]: finding for finding in report["findings"]}
            cosines[report["artifact"]["output"]] = found["cosine"]["measured"]
            assert found["cosine"]["threshold"] is not None
            assert found["token_ids"]["verdict"] == found["pooling"]["verdict"] == "PASS"
    assert set(cosines) == set(OUTPUTS)
    assert 1 > cosines["gguf/Q8_0"] > cosines["fp8/FP8_DYNAMIC"] > cosines["awq/W4A16"] > 0.98
    assert cosines["gguf/Q8_0"] > cosines["gguf/Q4_K_M"]


def test_what_a_user_of_the_folder_needs_is_in_it(run: tuple[Run, Ended]) -> None:
    made, _ = run
    source = pooled_structures.EMBEDDING
    for folder in ("tiny-embedding-FP8-dynamic", "tiny-embedding-AWQ-W4A16"):
        for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
            assert (made.output / folder / name).read_bytes() == (source / name).read_bytes()
    cards = {path.parent.name: path.read_text() for path in made.output.glob("*/README.md")}
    front = {name: yaml.safe_load(card.split("---\n")[1]) for name, card in cards.items()}
    assert {entry["pipeline_tag"] for entry in front.values()} == {"feature-extraction"}
    assert front["tiny-embedding-AWQ-W4A16"]["library_name"] == "sentence-transformers"
    assert "--embedding --pooling last" in cards["tiny-embedding-GGUF"]
    assert "SentenceTransformer(" in cards["tiny-embedding-FP8-dynamic"]
    assert "Find the text that this is about: " in cards["tiny-embedding-GGUF"]
    assert "was compared with the bf16 reference" in cards["tiny-embedding-FP8-dynamic"]


def test_perplexity_is_refused_before_anything_is_made(run: tuple[Run, Ended], tmp_path: Path) -> None:
    made, _ = run
    settings = made.settings | {"validation": made.settings["validation"] | {"checks": ["perplexity"]}}
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(settings | {"output_path": str(tmp_path / "out")}))
    ended = Run(file, made.cache).finish()
    assert ended.code == 2
    assert "perplexity cannot judge this model, which is for embedding" in ended.err
    assert not list((tmp_path / "out").glob("tiny-*"))
