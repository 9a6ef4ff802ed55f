"""The ledger that a plan makes of what a method says: completed, or refused where something is lost without a word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ledger_structures
import pytest

from quantool.config.schema import Config
from quantool.errors import ConfigError, QuantoolError, SourceError
from quantool.formats.safetensors import check_index
from quantool.ledger import ArtifactTensor, Fate, Ledger, TensorLine
from quantool.plan.account import with_ledgers
from quantool.plugins.contract import Outline
from quantool.records import Gates, OutputPlan, Source
from quantool.runtime.progress import Progress
from quantool.source.parts import Parts
from quantool.source.resolve import resolve

LOST = "mtp.norm.weight"


def source_of(folder: Path, structure: str = "drafting head") -> tuple[Config, Source]:
    config = Config.model_validate({"model_id": str(ledger_structures.write(structure, folder / "toy"))})
    return config, resolve(config, weights=True, progress=Progress(quiet=True))


def output() -> OutputPlan:
    return OutputPlan(
        id="theirs/A", method="theirs", level="A", options={}, engine="transformers", repo="toy-A", repo_id=None, files=(),
        bits_per_weight=None, peak_ram=1, gates=Gates(),
    )  # fmt: skip


def copied(source: Source, *, dropped: Sequence[str] = (), reason: str = "") -> list[TensorLine]:
    """Every tensor as it is, but those whose names begin like one of ``dropped``."""
    lines = []
    for name, tensor in check_index(source.folder).items():
        is_lost = name.startswith(tuple(dropped))
        to = (ArtifactTensor(name=name, dtype=tensor.dtype, shape=tensor.shape),) if not is_lost else ()
        lines.append(
            TensorLine(
                name=name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                fate=Fate.DROPPED if is_lost else Fate.COPIED,
                to=to,
                reason=reason if is_lost else "",
            )
        )
    return lines


def completed(config: Config, source: Source, outline: Outline) -> tuple[Ledger, tuple[str, ...]]:
    made = with_ledgers(outline, config, source, Parts.of(source), check_index(source.folder))
    ledger = made.outputs[0].ledger
    assert ledger is not None
    return ledger, made.warnings


def test_lines_get_their_part_and_are_joined(tmp_path: Path) -> None:
    config, source = source_of(tmp_path)
    ledger, notes = completed(config, source, Outline((output(),), lines={"theirs/A": copied(source)}))
    assert ledger.traced
    assert {line.part for line in ledger.tensors if line.name.startswith("mtp.")} == {"mtp"}
    assert any("{0-2}" in line.name for line in ledger.tensors)
    assert notes == ()


def test_a_tensor_that_is_lost_without_a_reason(tmp_path: Path) -> None:
    config, source = source_of(tmp_path)
    lines = copied(source, dropped=["mtp."])
    with pytest.raises(
        SourceError, match=r"theirs/A would lose \d+ tensors .* without a reason: mtp\.fc"
    ) as lost:
        completed(config, source, Outline((output(),), lines={"theirs/A": lines}))
    assert lost.value.hint == "drop: [mtp] leaves them out on purpose"
    with pytest.raises(SourceError, match=r"without a reason: model\.norm\.weight") as lost:
        completed(
            config, source, Outline((output(),), lines={"theirs/A": copied(source, dropped=["model.norm"])})
        )
    assert "drop" not in lost.value.hint


def test_what_the_user_leaves_out(tmp_path: Path) -> None:
    config, source = source_of(tmp_path)
    wanted = config.model_copy(update={"drop": ("mtp",)})
    lines = copied(source, dropped=["mtp."])
    ledger, notes = completed(wanted, source, Outline((output(),), lines={"theirs/A": lines}))
    assert {line.reason for line in ledger.tensors if line.part == "mtp"} == {"left out on purpose: drop"}
    assert ledger.parts_left_out().keys() == {"mtp"}
    assert notes == ()
    with pytest.raises(ConfigError, match=r"drop: mtp, but theirs keeps it: mtp\.fc\.weight"):
        completed(wanted, source, Outline((output(),), lines={"theirs/A": copied(source)}))


def test_what_a_method_declares_that_it_drops(tmp_path: Path) -> None:
    config, source = source_of(tmp_path)
    lines = copied(source, dropped=["mtp."])
    declared = Outline((output(),), lines={"theirs/A": lines}, drops={"mtp": "no engine drafts with it"})
    ledger, notes = completed(config, source, declared)
    assert {line.reason for line in ledger.tensors if line.part == "mtp"} == {"no engine drafts with it"}
    assert notes == ("theirs/A: mtp left out: no engine drafts with it",)


def test_a_method_that_says_nothing_holds_all_but_what_it_declares(tmp_path: Path) -> None:
    config, source = source_of(tmp_path)
    ledger, _ = completed(config, source, Outline((output(),)))
    assert not ledger.traced
    assert ledger.summary().endswith("not traced one by one")
    assert ledger.parts_left_out() == {}
    ledger, notes = completed(config, source, Outline((output(),), drops={"mtp": "no engine drafts with it"}))
    assert ledger.parts_left_out().keys() == {"mtp"}
    assert notes == ("theirs/A: mtp left out: no engine drafts with it",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "knows nothing of lm_head.weight"),
        (lambda lines: [*lines, lines[0].model_copy(update={"name": "other.weight"})], "speaks of other.weight"),
        (lambda lines: [*lines, lines[0]], "two lines for one tensor"),
    ],
)  # fmt: skip
def test_lines_of_another_checkpoint(tmp_path: Path, change: object, message: str) -> None:
    config, source = source_of(tmp_path)
    assert callable(change)
    outline = Outline((output(),), lines={"theirs/A": change(copied(source))})
    with pytest.raises(QuantoolError, match=message):
        completed(config, source, outline)
