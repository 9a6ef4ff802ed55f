"""What a file name leads to in a Hub repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from tampering import case

from quantool.records import Finding, Verdict
from quantool.validation._files import hub_names
from quantool.validation._findings.builder import FindingBuilder

FILES = [
    "README.md",
    "toy-Q2_K.gguf",
    "toy-Q4_K_M.gguf",
    "toy-Q8_0.gguf",
    "toy-imatrix.gguf",
    "mmproj-toy-F16.gguf",
]
SHARDS = [f"toy-Q8_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("names", "tag", "found"),
    [
        (FILES, "", "toy-Q4_K_M.gguf"),
        (FILES, "q8_0", "toy-Q8_0.gguf"),
        (FILES, "Q2_K", "toy-Q2_K.gguf"),
        (FILES, "Q4_K", None),  # Q4_K_M does not go on with a dash or a dot behind Q4_K
        (FILES, "F16", None),  # only the projector has it
        (["toy-Q8_0.gguf", "toy-F16.gguf"], "", "toy-Q8_0.gguf"),
        (["toy-Q6_K.gguf", "toy-F16.gguf"], "", "toy-F16.gguf"),  # the first by name
        (["toy-imatrix.gguf", "README.md"], "", None),
        (SHARDS, "Q8_0", SHARDS[0]),
        (["Q8_0/toy-Q8_0.gguf"], "Q8_0", "Q8_0/toy-Q8_0.gguf"),
        (["toy-BF16.gguf", "toy-F16.gguf"], "F16", "toy-BF16.gguf"),
        (["toy-Q4_K_M.gguf", "preset.ini"], "Q4_K_M", "preset.ini"),
    ],
)
def test_llama_server(names: list[str], tag: str, found: str | None) -> None:
    assert hub_names.resolve(names, tag) == found


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("toy-Q4_K_M.gguf", "Q4_K_M"),
        ("toy-BF16.gguf", "BF16"),
        ("Q8_0-toy-Q4_0.gguf", "Q4_0"),
        ("toy-Q3_K_XL.gguf", "Q3_K_XL"),
        ("toy-iq4_xs.gguf", "IQ4_XS"),
        ("toy-UD-Q2_K_XL-00001-of-00002.gguf", "UD-Q2_K_XL"),
        ("toy.gguf", None),
        ("toy-Q1_0.gguf", "Q1_0"),
        ("toy-NVFP4.gguf", "NVFP4"),
    ],
)
def test_hub(name: str, label: str | None) -> None:
    assert hub_names.label(name) == label


def judged(folder: Path, name: str, level: str | None, *planned: str) -> dict[str, Finding]:
    chosen = case("qwen3", folder / name)
    found = hub_names.judge_names(chosen, level, planned, FindingBuilder("integrity"))
    return {one.metric: one for one in found}


def test_findings(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).touch()
    found = judged(tmp_path, "toy-Q8_0.gguf", "Q8_0")
    assert {one.verdict for one in found.values()} == {Verdict.PASS}
    assert (
        found["hf_resolver"].measured == "-hf repo:Q8_0 finds toy-Q8_0.gguf; -hf repo finds toy-Q4_K_M.gguf"
    )
    assert found["hub_label"].measured == "Q8_0"


@pytest.mark.parametrize(
    ("name", "level", "planned", "word"),
    [
        ("toy-F16.gguf", "F16", ["toy-BF16.gguf", "toy-F16.gguf"], "loads toy-BF16.gguf"),
        ("toy-imatrix-Q8_0.gguf", "Q8_0", [], "'imatrix'"),
        ("xmtp-7b-Q8_0.gguf", "Q8_0", [], "'mtp-'"),
        ("toy-8bit.gguf", "Q8_0", [], "no name ends so"),
        ("toy-Q8_0.gguf", "Q8_0", ["a-Q8_0.gguf"], "loads a-Q8_0.gguf"),
    ],
)
def test_a_name_that_users_do_not_find(
    tmp_path: Path, name: str, level: str, planned: list[str], word: str
) -> None:
    found = judged(tmp_path, name, level, *planned)["hf_resolver"]
    assert found.verdict == Verdict.REGRESSION
    assert word in found.detail


def test_preset_takes_a_repository_over(tmp_path: Path) -> None:
    (tmp_path / "preset.ini").touch()
    found = judged(tmp_path, "toy-Q8_0.gguf", "Q8_0")["hf_resolver"]
    assert found.verdict == Verdict.REGRESSION
    assert "preset.ini" in found.detail


def test_label_of_another_level(tmp_path: Path) -> None:
    found = judged(tmp_path, "toy-Q8_0-Q4_K_M.gguf", "Q8_0")["hub_label"]
    assert found.verdict == Verdict.REGRESSION
    assert "as Q4_K_M, it is Q8_0" in found.detail
    assert (
        judged(tmp_path, "toy-Q1_0.gguf", "Q1_0")["hub_label"].verdict == Verdict.PASS
    )  # unknown to the Hub


def test_folder_that_may_be_no_repository(tmp_path: Path) -> None:
    for name in ("other-Q8_0.gguf", "toy-Q8_0.gguf"):
        (tmp_path / name).touch()
    found = judged(tmp_path, "toy-Q8_0.gguf", "Q8_0")["hf_resolver"]
    assert found.verdict == Verdict.SKIPPED
    assert "as a repository, llama-server -hf repo:Q8_0 loads other-Q8_0.gguf" in found.detail
    (tmp_path / "quantool.json").touch()
    assert judged(tmp_path, "toy-Q8_0.gguf", "Q8_0")["hf_resolver"].verdict == Verdict.REGRESSION
    assert judged(tmp_path, "toy-Q8_0.gguf", "Q8_0", "toy-Q8_0.gguf")["hf_resolver"].verdict == Verdict.PASS


def test_no_level_to_ask_for(tmp_path: Path) -> None:
    found = judged(tmp_path, "toy.gguf", None)
    assert {one.verdict for one in found.values()} == {Verdict.SKIPPED}
