"""Architectures that differ in what conversion does to them go the whole way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import making
import pytest

from tests.e2e.conftest import Ended, Run

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", ["spm_llama", "qwen3", "gemma3", "moe"])
def test_structure_is_converted_quantized_and_passes(
    runs: Callable[[str], tuple[Run, Ended]], name: str
) -> None:
    run, ended = runs(name)
    assert ended.code == 0, ended.err
    assert ended.out.count("PASS") >= 2
    reports = making.read_json(run.folder / "quantool.json")["reports"]
    assert [report["verdict"] for report in reports] == ["PASS", "PASS"]
    for report in reports:
        verdicts = {finding["metric"]: finding["verdict"] for finding in report["findings"]}
        wanted = ("perplexity", "mean_kld", "same_top_p", "template_text", "rendered_text", "rendered_ids")
        assert {metric: verdicts.get(metric) for metric in wanted} == dict.fromkeys(wanted, "PASS")
    sizes = [sum(file["bytes"] for file in report["artifact"]["files"]) for report in reports]
    assert sizes[1] < 0.75 * sizes[0]
    planned = making.read_json(run.output / "plan.json")["outputs"]
    assert [sum(file["bytes"] for file in output["files"]) for output in planned] == sizes


def test_folder_to_publish_is_whole(runs: Callable[[str], tuple[Run, Ended]]) -> None:
    run, ended = runs("chat")
    assert ended.code == 0, ended.err
    sums: dict[str, Any] = {}
    for line in (run.folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        sums[name] = digest
    assert set(sums) == {
        "README.md",
        "plots/corpora.png",
        "plots/size-kld.png",
        "provenance.json",
        "quantool.json",
        "tiny-5.2M-chat-Q4_K_M.gguf",
        "tiny-5.2M-chat-Q8_0.gguf",
        "tiny-5.2M-chat-imatrix.gguf",
    }
    files = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    assert files == {*sums, "SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((run.folder / name).read_bytes()).hexdigest() == digest
    assert str(run.output) not in json.dumps(making.read_json(run.folder / "quantool.json"))
    assert str(run.output) not in (run.folder / "README.md").read_text()
