"""A LoRA adapter is merged by its formula, what is no plain LoRA is refused, and a wrong merge is found in what was written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters
import pytest
import quantized_sources
import torch
from safetensors.torch import load_file, save_file

from quantool.errors import SourceError
from quantool.formats.safetensors import SINGLE, check_index, read_header
from quantool.source import rewrite as rewriting
from quantool.source.adapter import WEIGHTS
from quantool.source.rewrite import Preparation, preparation_of, rewrite

TINY = Path(__file__).parents[1] / "models" / "tiny-chat"
DOWN, QUERY = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
SHAPES = {DOWN: (96, 320), QUERY: (160, 192)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_sources.write_plain(TINY, tmp_path_factory.mktemp("adapter") / "plain")


def preparation(base: Path, adapter: Path) -> Preparation:
    headers = {tensor.name: tensor for tensor in read_header(adapter / WEIGHTS)}
    return preparation_of(base, check_index(base), (adapter, headers))


def merge(base: Path, adapter: Path, target: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    target.mkdir()
    request = {"folder": str(base), "target": str(target), "adapter": str(adapter)}
    result = rewrite(request, lambda _done, _total: None)
    return load_file(target / SINGLE), result


@pytest.mark.parametrize("elements", [1 << 12, 1 << 23])
@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {DOWN: 4.0, QUERY: 4.0}),
        ({"use_rslora": True}, {DOWN: 8.0, QUERY: 8.0}),
        ({"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 6}}, {DOWN: 8.0, QUERY: 1.5}),
        ({"use_rslora": True, "rank_pattern": {"down_proj": 2}}, {DOWN: 16 / math.sqrt(2), QUERY: 8.0}),
    ],
)  # fmt: skip
def test_weights_are_base_and_adapter(
    settings: dict[str, Any], scales: dict[str, float], elements: int, plain: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(rewriting, "SLICE", elements)
    made = adapters.write(tmp_path / "adapter", SHAPES, **settings)
    found, result = merge(plain, tmp_path / "adapter", tmp_path / "out")
    for name, tensor in load_file(plain / SINGLE).items():
        assert found[name].dtype == tensor.dtype
        if name not in made:
            assert torch.equal(found[name], tensor)
            continue
        a, b = made[name]
        exact = tensor.double() + scales[name] * (b @ a)
        assert not torch.equal(found[name], tensor)
        assert (found[name].double() - exact).abs().max() <= exact.abs().max() * 2**-8
        assert (
            torch.equal(found[name], exact.to(tensor.dtype))
            or (found[name] != exact.to(tensor.dtype)).sum() < 20
        )
    assert result["factor"] == pytest.approx(1, abs=0.01)


def test_weight_trained_whole_replaces_the_base_s(plain: Path, tmp_path: Path) -> None:
    whole = torch.full((192,), 3.0)
    adapters.write(tmp_path / "adapter", SHAPES, more={"model.norm.weight": whole}, modules_to_save=["norm"])
    found, _ = merge(plain, tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(found["model.norm.weight"], whole.to(torch.bfloat16))


def test_adapter_goes_on_top_of_a_quantized_base(plain: Path, tmp_path: Path) -> None:
    expected = quantized_sources.write("DeepSeek FP8", plain, tmp_path / "fp8")
    made = adapters.write(tmp_path / "adapter", SHAPES)
    found, result = merge(tmp_path / "fp8", tmp_path / "adapter", tmp_path / "out")
    a, b = made[DOWN]
    exact = expected[DOWN].double() + 4 * (b @ a)
    assert (found[DOWN].double() - exact).abs().max() <= exact.abs().max() * 2**-7
    assert result["factor"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_wrong_scale_is_found_in_what_was_written(
    factor: float, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters.write(tmp_path / "adapter", SHAPES)
    delta = rewriting._TensorMaker.delta

    def wrong(self: Any, pair: Any) -> Any:
        rows = delta(self, pair)
        return lambda first, last: factor * rows(first, last)

    monkeypatch.setattr(rewriting._TensorMaker, "delta", wrong)
    with pytest.raises(
        SourceError, match=r"proj\.weight: the adapter is -?[\d.]+ times in the merged weight, not once"
    ):
        merge(plain, tmp_path / "adapter", tmp_path / "out")


REFUSED: dict[str, dict[str, Any]] = {
    "lora_magnitude_vector": {"use_dora": True},
    "IA3": {"peft_type": "IA3"},
    "bias": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "target_parameters": {"target_parameters": ["experts.gate_up_proj"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "of_the_future": {"of_the_future": {"a": 1}},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "lora_alpha": {"lora_alpha": 0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_name(name: str, plain: Path, tmp_path: Path) -> None:
    adapters.write(tmp_path / "adapter", SHAPES, **REFUSED[name])
    with pytest.raises(SourceError, match=name):
        preparation(plain, tmp_path / "adapter")


def test_rank_that_the_configuration_does_not_say_is_refused(plain: Path, tmp_path: Path) -> None:
    adapters.write(tmp_path / "adapter", SHAPES)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(SourceError, match=r"says rank 8 for .*, but .* has 4"):
        preparation(plain, tmp_path / "adapter")


@pytest.mark.parametrize("end", ["lora_A.weight", "lora_B.weight"])
def test_half_of_a_pair_is_refused(end: str, plain: Path, tmp_path: Path) -> None:
    adapters.write(tmp_path / "adapter", SHAPES)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    del tensors[f"{adapters.PREFIX}{DOWN.removesuffix('.weight')}.{end}"]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(SourceError, match="down_proj"):
        preparation(plain, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.layers.9.mlp.up_proj.weight": (96, 320)}, "does not have"),
        ({DOWN: (96, 192)}, r"is \[96, 192\]"),
    ],
)
def test_adapter_of_another_model_is_refused(
    shapes: dict[str, tuple[int, int]], message: str, plain: Path, tmp_path: Path
) -> None:
    adapters.write(tmp_path / "adapter", shapes)
    with pytest.raises(SourceError, match=message):
        preparation(plain, tmp_path / "adapter")


def magnitudes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """DoRA's lengths of rows as peft 0.21 names them."""
    generator = torch.Generator().manual_seed(3)
    return {
        f"{name.removesuffix('.weight')}.lora_magnitude_vector": 0.5 + torch.rand(rows, generator=generator)
        for name, (rows, _) in shapes.items()
    }


def test_lengths_that_were_not_given_are_found(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters.write(tmp_path / "adapter", SHAPES, more=magnitudes(SHAPES), use_dora=True)
    merge(plain, tmp_path / "adapter", tmp_path / "out")
    rows = rewriting._TensorMaker.rows

    def plainly(self: Any, name: str) -> Any:
        adapter = self.preparation.adapter
        if name not in adapter.added:
            return rows(self, name)
        before, delta = self.base_rows(name), self.delta(adapter.added[name])
        return lambda first, last: before(first, last).float() + delta(first, last)

    monkeypatch.setattr(rewriting._TensorMaker, "rows", plainly)
    with pytest.raises(SourceError, match=r"proj\.weight: rows of the merged weight have not the lengths"):
        merge(plain, tmp_path / "adapter", tmp_path / "wrong")


def test_wrong_scale_of_dora_is_found(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.write(tmp_path / "adapter", SHAPES, more=magnitudes(SHAPES), use_dora=True)
    delta = rewriting._TensorMaker.delta
    monkeypatch.setattr(
        rewriting._TensorMaker,
        "delta",
        lambda self, pair: lambda first, last: 2 * delta(self, pair)(first, last),
    )
    with pytest.raises(SourceError, match=r"the adapter is [\d.]+ times in the merged weight, not once"):
        merge(plain, tmp_path / "adapter", tmp_path / "out")


def test_lengths_of_another_layer_are_refused(plain: Path, tmp_path: Path) -> None:
    more = {name: lengths[:-1] for name, lengths in magnitudes(SHAPES).items()}
    adapters.write(tmp_path / "adapter", SHAPES, more=more, use_dora=True)
    with pytest.raises(SourceError, match=r"lora_magnitude_vector has \d+ lengths for \d+ rows"):
        preparation(plain, tmp_path / "adapter")


@pytest.mark.parametrize("dora", [False, True])
def test_merge_is_peft_s(tmp_path: Path, dora: bool) -> None:
    """The weights that peft's own ``merge_and_unload`` makes of the same folder, in float32."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).save_pretrained(base)
    names = {
        name: tensor.shape
        for name, tensor in check_index(base).items()
        if "q_proj" in name or "down_proj" in name
    }
    more = magnitudes(names) if dora else {}
    settings = {"use_rslora": True, "use_dora": dora, "rank_pattern": {"down_proj": 2}}
    adapters.write(tmp_path / "adapter", names, more=more, **settings)  # type: ignore[arg-type]
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    theirs = loaded.merge_and_unload().state_dict()
    found, _ = merge(base, tmp_path / "adapter", tmp_path / "out")
    for name, tensor in found.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name
