"""A multimodal model whose eyes are left out on purpose goes the whole way, and everything says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import vision_structures
import yaml

from tests.e2e.conftest import DOCS, WIDE, Run, write

pytestmark = pytest.mark.e2e


def test_a_declared_text_only_file(tmp_path: Path, cache: Path) -> None:
    model = vision_structures.write_gemma3_vision(tmp_path / "toy-sees")
    settings = {
        "model_id": str(model), "drop": ["vision"], "method": "gguf", "quant_level": ["Q8_0"],
        "validation": {
            "max_tokens": 512, "context": 128, "corpora": [DOCS], "gates": WIDE, "checks": ["perplexity", "ledger", "integrity"],
        },
    }  # fmt: skip
    run = Run(write(tmp_path, "job", **settings), cache)
    ended = run.finish()
    assert ended.code == 0, ended.err
    folder = tmp_path / "job" / "toy-sees-GGUF-text-only"
    front, body = (folder / "README.md").read_text().split("---\n", 2)[1:]
    found = yaml.safe_load(front)
    assert (found["pipeline_tag"], found["tags"][:2]) == ("text-generation", ["gemma", "text-only"])
    assert "**Text only.**" in body.partition("## ")[0]
    record = json.loads((folder / "quantool.json").read_text())
    ledger = record["plan"]["outputs"][0]["ledger"]
    assert {line["fate"] for line in ledger["tensors"] if line["part"] == "vision"} == {"dropped"}
    findings = {
        (finding["check"], finding["metric"]): finding for finding in record["reports"][0]["findings"]
    }
    assert findings["ledger", "tensors"]["verdict"] == "PASS"
    assert findings["ledger", "tensors"]["measured"].endswith("this is a text-only file")
    assert findings["integrity", "weights"]["verdict"] == "PASS"
    assert findings["perplexity", "mean_kld"]["verdict"] == "PASS"
