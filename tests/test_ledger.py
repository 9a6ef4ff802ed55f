"""Lines of a ledger: joined by their numbers without a loss, counted, summed up."""

from __future__ import annotations

import itertools

import pytest

from quantool.errors import SourceError
from quantool.ledger import ArtifactTensor, Fate, Ledger, TensorLine, grouped, names


def line(name: str, to: str = "", fate: Fate = Fate.CONVERTED, **more: object) -> TensorLine:
    stored = [{"name": to, "dtype": "F16", "shape": (4, 2)}] if to else []
    return TensorLine.model_validate(
        {"name": name, "dtype": "BF16", "shape": (4, 2), "fate": fate, "to": stored, **more}
    )


def expanded(lines: tuple[TensorLine, ...]) -> tuple[list[str], list[str]]:
    sources = sorted(itertools.chain.from_iterable(names(each.name) for each in lines))
    return sources, sorted({stored.name for each in lines for stored in each.stored()})


def test_layers_share_a_line() -> None:
    (only,) = grouped(line(f"model.layers.{n}.mlp.up.weight", f"blk.{n}.ffn_up.weight") for n in range(12))
    assert (only.name, only.to[0].name) == ("model.layers.{0-11}.mlp.up.weight", "blk.{0-11}.ffn_up.weight")
    assert (only.count(), only.elements()) == (12, 96)
    assert [stored.name for stored in only.stored()] == [f"blk.{n}.ffn_up.weight" for n in range(12)]


def test_a_single_tensor_keeps_its_name() -> None:
    assert grouped([line("model.layers.7.x", "blk.7.x")]) == (line("model.layers.7.x", "blk.7.x"),)


def test_every_fourth_layer() -> None:
    (only,) = grouped(line(f"layers.{n}.attn", f"blk.{n}.attn") for n in (3, 7, 8, 9, 15))
    assert only.name == "layers.{3,7-9,15}.attn"


def test_experts_that_are_merged() -> None:
    (only,) = grouped(
        line(f"layers.{n}.experts.{e}.up", f"blk.{n}.up_exps", Fate.MERGED)
        for n in range(3)
        for e in range(4)
    )
    assert (only.name, only.to[0].name, only.count()) == (
        "layers.{0-2}.experts.{0-3}.up",
        "blk.{0-2}.up_exps",
        12,
    )


@pytest.mark.parametrize("absent", [{(1, 2)}, {(0, 0), (2, 3)}, {(0, 1), (1, 1), (2, 0)}])
def test_an_expert_that_is_not_there_is_in_no_line(absent: set[tuple[int, int]]) -> None:
    pairs = [(n, e) for n in range(3) for e in range(4) if (n, e) not in absent]
    lines = grouped(line(f"layers.{n}.experts.{e}.up", f"e.{e}.l.{n}") for n, e in pairs)
    assert len(lines) < len(pairs)
    assert expanded(lines) == (
        sorted(f"layers.{n}.experts.{e}.up" for n, e in pairs),
        sorted(f"e.{e}.l.{n}" for n, e in pairs),
    )


def test_numbers_with_zeros_before_them_and_inside_words_stay() -> None:
    lines = grouped(line(f"block_{n}.0{n}.conv1d.weight", f"x.{n}") for n in range(3))
    assert expanded(lines)[0] == [f"block_{n}.0{n}.conv1d.weight" for n in range(3)]


def test_what_differs_in_more_than_numbers_stays_apart() -> None:
    lines = grouped(
        [
            line("a.0", "x.0"),
            line("a.1", "x.1", Fate.QUANTIZED),
            line("a.2", "x.2", part="vision"),
            line("a.3", "", Fate.DROPPED, reason="because"),
            line("a.4", "y.4"),
        ]
    )
    assert len(lines) == 5


def test_a_name_with_braces_is_refused() -> None:
    with pytest.raises(SourceError, match=r"layers\.\{0-9\}"):
        grouped([line("layers.{0-9}.x")])


def test_summary_and_parts() -> None:
    ledger = Ledger(
        tensors=(
            line("layers.{0-9}.x", "blk.{0-9}.x"),
            line("head", fate=Fate.TIED),
            line("visual.{0-3}.w", fate=Fate.DROPPED, part="vision", reason="drop"),
            line("visual.kept", "v.kept", part="audio"),
            line("audio.{0-1}", fate=Fate.DROPPED, part="audio", reason="drop"),
            TensorLine(
                name="", fate=Fate.ADDED, to=(ArtifactTensor(name="rope_freqs", dtype="F32", shape=(4,)),)
            ),
        )
    )
    assert ledger.summary() == "18 tensors: 11 in, 1 tied, 6 dropped"
    assert ledger.parts_left_out() == {"vision": 32}
    assert Ledger.model_validate_json(ledger.model_dump_json()) == ledger
