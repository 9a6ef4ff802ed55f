"""Recommended sampling in generation_config.json, in the artifact and in the card."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tampering import case, findings, folder_of, gguf_of, regressions, tampered, tokenizer_folder

from quantool.config.errors import explain
from quantool.config.sampling import generation_file, listed, numbers, recommended, stated, to_write
from quantool.config.served import Sampling
from quantool.records import Gates, OutputPlan, Verdict

STRUCTURE = "qwen3"  # temperature 0.6, top_k 20, top_p 0.95


def test_recommendation_of_the_user_comes_first() -> None:
    chosen = case(STRUCTURE, Path("toy.gguf"))
    wanted = recommended(chosen.source, chosen.config)
    assert listed(wanted) == "temperature 0.6, top_k 20, top_p 0.95"
    chosen = case(STRUCTURE, Path("toy.gguf"), generation={"temperature": 0.7, "min_p": 0.05})
    wanted = recommended(chosen.source, chosen.config)
    assert wanted == {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.05}
    bare = chosen.source.model_copy(update={"generation": {}})
    assert listed(recommended(bare, case(STRUCTURE, Path("toy.gguf")).config)) == ""


@pytest.mark.parametrize(
    "text",
    [
        "temperature 0.6, top_k 20, top_p 0.95 (generation_config.json of the source).",
        "| sampling | |\n|---|---|\n| temperature | 0.6 |\n| `top_k` | 20 |\n| top_p | 0.95 |",
        "temperature: 0.6\ntop_k: 20\ntop_p: 0.95\n",
        "Use temperature=0.6, top_k=20 and top_p=0.95.",
    ],
)
def test_sentence_of_a_card(text: str) -> None:
    assert stated(text) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert stated("Quantized to 4 bits, min_perplexity 3") == {}


def test_range_is_said_as_a_range_and_written_as_a_number() -> None:
    sampling = Sampling(temperature="0 to 0.2", top_k="10 to 40").model_dump(exclude_none=True)
    assert listed(sampling) == "temperature 0 to 0.2, top_k 10 to 40"
    assert stated(f"Recommended sampling: {listed(sampling)}.") == {
        "temperature": "0 to 0.2",
        "top_k": "10 to 40",
    }
    assert numbers(sampling, {}) == {"temperature": 0.2, "top_k": 40}
    assert numbers(sampling, {"temperature": 0.1, "top_k": 5}) == {"temperature": 0.1, "top_k": 10}


@pytest.mark.parametrize(
    ("generation", "given", "expected"),
    [
        ({"temperature": 0.6}, {"temperature": 0.6}, None),
        ({"temperature": 0.6}, {"temperature": "0.5 to 0.7"}, None),
        (
            {"temperature": 0.6, "x": 1},
            {"top_k": 5},
            {"temperature": 0.6, "x": 1, "top_k": 5, "do_sample": True},
        ),
        ({"do_sample": True}, {"temperature": 0}, {"do_sample": False, "temperature": 0.0}),
        ({"do_sample": False}, {"temperature": "0 to 0.2"}, {"do_sample": True, "temperature": 0.2}),
    ],
)
def test_generation_config_that_is_written(
    generation: dict[str, Any], given: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    chosen = case(STRUCTURE, Path("toy.gguf"), generation=given)
    values = to_write(generation, chosen.config)
    source = chosen.source.model_copy(update={"generation": generation, "sampling": values})
    written = generation_file(source)
    assert (written and json.loads(written)) == expected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", "0.2 to 0", "must ascend: 0 to 0.2"),
        ("temperature", "0 bis 0.2", "must be a number"),
        ("top_p", "0.5 to 1.5", "must end at 1 at most"),
        ("top_p", 1.5, "must be at most 1"),
        ("top_k", -1, "must be at least 0"),
    ],
)
def test_sampling_that_cannot_be(name: str, value: Any, words: str) -> None:
    (mistake,) = explain(Sampling, {name: value})
    assert words in mistake.text, mistake.text


@pytest.mark.e2e
def test_healthy() -> None:
    found = findings("generation", case(STRUCTURE))
    assert {metric: one.verdict for metric, one in found.items()} == {
        "sampling_source": Verdict.PASS,
        "sampling": Verdict.PASS,
    }
    assert found["sampling"].measured == "temperature 0.6, top_k 20, top_p 0.95"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("change", "drop", "word"),
    [
        (
            {"general.sampling.temp": 0.1},
            [],
            "temperature is 0.1 in the GGUF's general.sampling keys and 0.6 in",
        ),
        (
            {"general.sampling.min_p": 0.5},
            [],
            "min_p is 0.5 in the GGUF's general.sampling keys and missing in",
        ),
        ({}, ["general.sampling.top_k"], "top_k is missing in the GGUF's general.sampling keys and 20 in"),
    ],
)
def test_gguf_that_recommends_something_else(
    tmp_path: Path, change: dict[str, Any], drop: list[str], word: str
) -> None:
    file = tampered(gguf_of(STRUCTURE), tmp_path / "t-BF16.gguf", change, drop)
    found = findings("generation", case(STRUCTURE, file))
    assert regressions(found) == {"sampling"}
    assert word in found["sampling"].detail


@pytest.mark.e2e
def test_artifact_without_what_the_user_recommends() -> None:
    found = findings("generation", case(STRUCTURE, generation={"temperature": 0.7}))
    assert regressions(found) == {"sampling"}  # it was made without: what methods write is tested with them
    assert found["sampling_source"].detail == (
        "temperature is 0.6 in the source's generation_config.json and 0.7 in validation.generation, which counts"
    )
    found = findings("generation", case(STRUCTURE, generation={"temperature": 0.6, "top_k": 20}))
    assert not regressions(found)
    found = findings("generation", case(STRUCTURE, generation={"temperature": "0.5 to 0.7"}))
    assert not regressions(found)  # 0.6 lies inside
    found = findings("generation", case(STRUCTURE, generation={"temperature": "0 to 0.2"}))
    assert "and 0.2 in validation.generation" in found["sampling"].detail


def test_folder_that_recommends_something_else(tmp_path: Path) -> None:
    folder = tokenizer_folder(STRUCTURE, tmp_path / "toy")
    assert not regressions(findings("generation", case(STRUCTURE, folder)))
    settings = json.loads((folder_of(STRUCTURE) / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"top_p": 0.5}))
    found = findings("generation", case(STRUCTURE, folder))
    assert regressions(found) == {"sampling"}
    assert "top_p is 0.5 in the artifact's generation_config.json and 0.95" in found["sampling"].detail
    (folder / "generation_config.json").unlink()
    assert regressions(findings("generation", case(STRUCTURE, folder))) == {"sampling"}
    (folder / "generation_config.json").write_text("{")
    assert "not JSON" in findings("generation", case(STRUCTURE, folder))["sampling"].detail


def test_nothing_recommended(tmp_path: Path) -> None:
    folder = tokenizer_folder(STRUCTURE, tmp_path / "toy")
    (folder / "generation_config.json").unlink()
    chosen = case(STRUCTURE, folder)
    bare = replace(chosen, source=chosen.source.model_copy(update={"generation": {}}))
    assert {one.verdict for one in findings("generation", bare).values()} == {Verdict.SKIPPED}


def test_card_beside_the_artifact(tmp_path: Path) -> None:
    folder = tokenizer_folder(STRUCTURE, tmp_path / "toy")
    card, chosen = folder / "README.md", case(STRUCTURE, folder)
    card.write_text("temperature 0.1")  # not a card of ours
    assert "sampling_card" not in findings("generation", chosen)
    ours = "---\nquantized_by: quantool\n---\n"
    card.write_text(f"{ours}temperature 0.6, top_k 20, top_p 0.95\n")
    assert findings("generation", chosen)["sampling_card"].verdict == Verdict.PASS
    card.write_text(f"{ours}temperature 0.1, top_k 20, top_p 0.95\n")
    found = findings("generation", chosen)
    assert regressions(found) == {"sampling_card"}
    assert "temperature is 0.1 in the card (README.md) and 0.6" in found["sampling_card"].detail
    card.write_text(ours)
    assert "missing in the card" in findings("generation", chosen)["sampling_card"].detail
    output = OutputPlan(
        id="fp8/FP8", method="fp8", level="FP8", options={}, engine="transformers", repo="toy", repo_id=None,
        files=(), bits_per_weight=None, peak_ram=0, gates=Gates(),
    )  # fmt: skip
    assert "sampling_card" not in findings(
        "generation", replace(chosen, output=output)
    )  # it is written later


@pytest.mark.e2e
def test_file_that_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "toy-BF16.gguf"
    shutil.copy(gguf_of(STRUCTURE), file)
    file.write_bytes(file.read_bytes()[:5000])
    found = findings("generation", case(STRUCTURE, file))
    assert "damaged or cut off" in found["sampling"].detail
