"""The shipped configurations of AWQ, FP8 and all methods together, by the command line, on less text than they name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHEAP = {
    "sample_size": "4",
    "calibration_config.max_seq_length": "96",
    "validation.max_tokens": "1024",
    "validation.checks": "[perplexity, serving]",
    "validation.corpora": "[{name: docs, path: tests/models/text/heldout.en.txt}]",
}
SEARCH = {f"quantizations.{number}.quantization_config.n_grid": "3" for number in range(2)}
OWN = {
    "methods": {"calibration_config.max_tokens": "1024", "quantizations.1.quant_level": "[Q4_K_M]"},
    "awq": {"quantizations.0.quant_level": "[W4A16_ASYM]"} | SEARCH,
}
NAMES = ("methods", "awq", "fp8")
PATIENCE = 900  # seconds; other tests may have the cores
Ran = Callable[[str], dict[str, Any]]
pytestmark = pytest.mark.e2e


def run(name: str, folder: Path, cache: Path) -> dict[str, Any]:
    """Output to its report, of a run that passed its gates."""
    settings = CHEAP | OWN.get(name, {}) | {"output_path": str(folder / name)}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "quantool", f"configs/{name}.yaml", *words, "--json"],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = (folder / name / "records").glob("*.report.json")
    reports = [json.loads(path.read_text()) for path in records]
    return {report["artifact"]["output"]: report for report in reports}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Ran]:
    """``ran(name)``: what the configuration gave; all are started side by side."""
    folder = tmp_path_factory.mktemp("configs")
    lanes = ThreadPoolExecutor(2)
    started: dict[str, Future[dict[str, Any]]] = {
        name: lanes.submit(run, name, folder, cache) for name in NAMES
    }
    yield lambda name: started[name].result()
    lanes.shutdown(cancel_futures=True)


def measured(report: dict[str, Any], metric: str) -> Any:
    return next(one["measured"] for one in report["findings"] if one["metric"] == metric)


def reference(report: dict[str, Any]) -> float:
    return float(next(one["reference"] for one in report["findings"] if one["metric"] == "perplexity"))


def test_gguf_awq_and_fp8_of_one_source_share_one_reference(ran: Ran) -> None:
    reports = ran("methods")
    assert {output.partition("/")[0] for output in reports} == {"fp16", "gguf", "fp8", "awq"}
    assert len({reference(report) for report in reports.values()}) == 1
    assert measured(reports["fp8/FP8_DYNAMIC"], "kernel") == "CUTLASS FP8"


def test_awq_in_both_layouts_is_one_model(ran: Ran) -> None:
    reports = ran("awq")
    assert reports.keys() == {"awq/W4A16_ASYM", "awq/W4A16_ASYM-autoawq"}
    twins = [reports["awq/W4A16_ASYM"], reports["awq/W4A16_ASYM-autoawq"]]
    for metric in ("perplexity", "mean_kld", "same_top_p"):
        assert measured(twins[0], metric) == pytest.approx(measured(twins[1], metric), rel=1e-6), metric
    assert {measured(report, "kernel") for report in reports.values()} == {"Machete"}


def test_fp8_at_all_its_levels_and_with_an_attention_cache(ran: Ran) -> None:
    reports = ran("fp8")
    assert reports.keys() == {"fp8/FP8_DYNAMIC", "fp8/FP8_BLOCK", "fp8/FP8"}
    assert measured(reports["fp8/FP8"], "kv_cache") == "4 of 4 layers"
