"""What the card says of fitted files comes from records alone: read back from JSON, with every file gone, it says the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from quantool import pipeline
from quantool.card.card import write_card
from quantool.config.schema import Config
from quantool.records import Finding, Plan, Report, Verdict
from quantool.runtime.progress import Progress
from tests.checkpoint import write_checkpoint


@pytest.fixture
def plan(tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Three levels of a model whose cache takes 1 GiB for 8,192 tokens."""
    monkeypatch.setattr("quantool.plan.make.refuse_unloadable", lambda *_: None)  # it has two tensors
    config = {
        "model_id": str(write_checkpoint(tmp_path / "tiny")), "method": "fake", "quant_level": ["Q8_0", "Q4_K_M"],
        "output_path": tmp_path / "out",
    }  # fmt: skip
    made = pipeline.plan(Config.model_validate(config), Progress(quiet=True))
    facts = made.source.facts.model_copy(
        update={"layers": 32, "kv_heads": 8, "head_size": 128, "context": 131072}
    )
    return made.model_copy(update={"source": made.source.model_copy(update={"facts": facts})})


def report(level: str, size: int, kld: float, **details: Any) -> Report:
    finding = Finding(
        check="perplexity", metric="mean_kld", corpus="en", verdict=Verdict.PASS, measured=kld, error=kld / 50
    )
    return Report.model_validate(
        {
            "artifact": {
                "output": f"fake/{level}", "method": "fake", "level": level, "folder": "/made/tiny-GGUF",
                "files": [{"name": f"tiny-{level}.gguf", "bytes": size, "sha256": "ab" * 32}], "bits_per_weight": 5.0,
                "seconds": 1.0, "details": details,
            },
            "reference": "org/tiny", "findings": [finding], "seconds": 1.0,
        }
    )  # fmt: skip


def test_sentence_and_table_come_from_records_only(plan: Plan, tmp_path: Path) -> None:
    reports = [
        report("Q8_0", 8_000_000_000, 0.001),
        report("Q4_K_M", 4_500_000_000, 0.03),
        report("Q4_K_M-fit", 4_490_000_000, 0.018, fit="size: 4.5GB"),
        report(
            "6GB-fit", 6_000_000_000, 0.02, fit="bpw: 6", schemes={"a": "W8A16", "b": "W4A16", "c": "W4A16"}
        ),
    ]
    text = write_card(plan, plan.outputs, reports, ("plots/size-kld.png",))
    for line in (
        "| 8 GB | `tiny-Q4_K_M-fit.gguf` | `tiny-Q4_K_M-fit.gguf` | - | `tiny-Q4_K_M-fit.gguf` |",
        "`tiny-Q4_K_M-fit.gguf` has 0.60 of the mean KLD of stock levels at its size, on every text.",
        "`tiny-6GB-fit.gguf` is **not better** than stock levels at its size",
        "- Q4_K_M-fit: types chosen by measuring, for size: 4.5GB\n",
        "- 6GB-fit: types chosen by measuring, for bpw: 6: 1 layer W8A16, 2 layers W4A16\n",
        "types chosen by measuring on a dotted line of their own](plots/size-kld.png)",
    ):
        assert line in text
    read_back = Plan.model_validate_json(plan.model_dump_json())
    shutil.rmtree(tmp_path / "tiny")
    again = [Report.model_validate_json(entry.model_dump_json()) for entry in reports]
    assert write_card(read_back, read_back.outputs, again, ("plots/size-kld.png",)) == text


@pytest.mark.parametrize("change", [{"kld": 0.04}, {"size": 5_200_000_000}, {"fit": ""}])
def test_another_record_is_another_sentence(plan: Plan, change: dict[str, Any]) -> None:
    """Nothing of the sentence stands in the card by itself."""
    stock = [report("Q8_0", 8_000_000_000, 0.001), report("Q4_K_M", 4_500_000_000, 0.03)]
    given: dict[str, Any] = {"size": 4_490_000_000, "kld": 0.018, "fit": "bpw: 4.5"}
    before = write_card(plan, plan.outputs, [*stock, report("Q4_K_M-fit", **given)])
    after = write_card(plan, plan.outputs, [*stock, report("Q4_K_M-fit", **given | change)])
    sentence = "`tiny-Q4_K_M-fit.gguf` has 0.60 of the mean KLD"
    assert sentence in before
    assert sentence not in after
