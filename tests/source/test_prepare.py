"""A quantized checkpoint, or an adapter, becomes an ordinary source: known by headers in a plan, written once for a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import pytest
import quantized_sources
import torch
from safetensors.torch import load_file, save_file

from quantool.card.redact import published
from quantool.config.schema import Config
from quantool.errors import ConfigError, DependencyError, SourceError
from quantool.formats.safetensors import INDEX, SINGLE, check_index
from quantool.plan.collisions import refuse_own_folder
from quantool.records import Source
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace
from quantool.source.prepare import STAGE, forget, is_prepared, prepare, recall, to_fetch
from quantool.source.resolve import resolve
from quantool.source.scan import recall_scan, scan_source
from quantool.source.tensor_headers import headers
from tests.checkpoint import write_checkpoint
from tests.hub.test_download import content, point_to
from tests.loopback_hub import Hub, Repository, serving

QUIET = Progress(quiet=True)
WEIGHTS = {"model.layers.0.self_attn.q_proj.weight": (160, 192)}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plain(folder: Path) -> Path:
    """A checkpoint whose headers are whole, in which ``quantized_sources`` finds layers."""
    write_checkpoint(folder, torch_dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / SINGLE).items()}
    tensors |= {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in WEIGHTS.items()}
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    return folder


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    quantized_sources.write("DeepSeek FP8", plain(tmp_path / "plain"), tmp_path / "model-FP8")
    return tmp_path / "model-FP8"


def asked(model: str | Path, **keys: Any) -> Source:
    return resolve(Config.model_validate({"model_id": str(model), **keys}), weights=False, progress=QUIET)


def made(source: Source, room: Path) -> tuple[Source, Workspace]:
    workspace = Workspace(room)
    with workspace.lock():
        return prepare(source, workspace, QUIET), workspace


def test_a_plan_knows_the_weights_that_will_be(quantized: Path, tmp_path: Path) -> None:
    source = asked(quantized)
    assert source.facts.dtype == "BF16"
    assert source.facts.parameters == asked(tmp_path / "plain").facts.parameters
    assert not is_prepared(source)
    assert not list(source.folder.glob("*.safetensors"))
    assert "quantization_config" not in json.loads((source.folder / "config.json").read_text())
    said = "quantized again from FP8 in blocks of 128 x 128 (FP8 of transformers): the reference is the dequantized model"
    assert said in source.notes
    planned = headers(source)
    ready, _ = made(source, tmp_path / "out")
    assert is_prepared(ready)
    assert check_index(ready.folder) == planned
    assert {file.name: file.bytes for file in ready.files} == {
        path.name: path.stat().st_size for path in ready.folder.iterdir()
    }
    assert to_fetch(source) == 0


def test_scales_of_activations_are_left_out_with_a_word(tmp_path: Path) -> None:
    quantized_sources.write("FP8 channel", plain(tmp_path / "plain"), tmp_path / "model")
    (note,) = [note for note in asked(tmp_path / "model").notes if "left out" in note]
    assert note.startswith("1 scales of activations or caches")
    assert "q_proj.input_scale" in note


def test_weights_are_prepared_once(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = asked(quantized)
    ready, workspace = made(source, tmp_path / "out")
    monkeypatch.setattr(process, "call", None)
    assert made(asked(quantized), tmp_path / "out")[0] == ready
    assert recall(asked(quantized), workspace).folder == ready.folder
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (ready.folder / SINGLE).unlink()
    assert recall(source, workspace).folder == source.folder
    again, _ = made(source, tmp_path / "out")
    assert is_prepared(again)
    forget(workspace)
    assert recall(source, workspace).folder == source.folder


def test_a_plan_finds_what_a_run_scanned(quantized: Path, tmp_path: Path) -> None:
    ready, workspace = made(asked(quantized), tmp_path / "out")
    with workspace.lock():
        scanned = scan_source(ready, workspace, QUIET)
    planned = recall_scan(recall(asked(quantized), workspace), workspace)
    assert planned == scanned
    assert all(file.sha256 for file in planned.files)


def test_other_originals_are_other_sources(quantized: Path, tmp_path: Path) -> None:
    before = asked(quantized).identity()
    assert asked(quantized).identity() == before
    tensors = load_file(quantized / SINGLE)
    tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"] *= 2
    save_file(tensors, quantized / SINGLE)
    assert asked(quantized).identity() != before


@pytest.mark.parametrize("end", ["weight_scale_inv", "proj.weight"])
def test_a_part_that_is_lost_is_found_by_the_plan(end: str, quantized: Path) -> None:
    tensors = load_file(quantized / SINGLE)
    del tensors[next(name for name in tensors if name.endswith(end))]
    save_file(tensors, quantized / SINGLE)
    with pytest.raises(SourceError, match=r"self_attn\.q_proj"):
        asked(quantized)


def test_values_that_are_no_numbers_are_found_after_preparing(quantized: Path, tmp_path: Path) -> None:
    tensors = load_file(quantized / SINGLE)
    tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"][0] = torch.nan
    save_file(tensors, quantized / SINGLE)
    ready, workspace = made(asked(quantized), tmp_path / "out")
    with workspace.lock(), pytest.raises(SourceError, match=r"are no numbers: .*q_proj"):
        scan_source(ready, workspace, QUIET)


def test_a_run_into_the_original_is_refused(quantized: Path) -> None:
    with pytest.raises(ConfigError, match="is where the checkpoint is read from"):
        refuse_own_folder(asked(quantized), quantized, [])


def test_nothing_of_this_machine_leaves(quantized: Path, tmp_path: Path) -> None:
    adapters.write(tmp_path / "lora", WEIGHTS)
    for source in (asked(quantized), asked(quantized, adapter=str(tmp_path / "lora"))):
        assert str(tmp_path) not in json.dumps(published(source))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """An adapter trained on the checkpoint ``plain``."""
    adapters.write(tmp_path / "lora", WEIGHTS, base_model_name_or_path=str(plain(tmp_path / "plain")))
    return tmp_path / "lora"


def test_an_adapter_is_a_model_with_the_base_that_it_names(lora: Path, tmp_path: Path) -> None:
    source = asked(lora)
    assert (source.model_id, source.name) == (str(lora), "lora")
    described = "adapter lora (rank 4 times 4 added to 1 weights) merged into plain: the reference is the merged model"
    assert source.prepared is not None
    assert source.prepared.described() == described
    ready, _ = made(source, tmp_path / "out")
    base, merged = load_file(tmp_path / "plain" / SINGLE), load_file(ready.folder / SINGLE)
    assert [name for name in base if not torch.equal(base[name], merged[name])] == [*WEIGHTS]
    assert asked(tmp_path / "plain", adapter=str(lora)).prepared == source.prepared


def test_an_adapter_s_own_tokenizer_and_template_count(lora: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "plain" / name, lora / name)
    (lora / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    source = asked(lora)
    assert source.facts.chat_template == "{{ messages[0]['content'] }}<|im_end|>"
    assert (source.folder / "chat_template.jinja").read_text() == source.facts.chat_template
    assert source.tokenizer is None


def test_another_base_than_the_adapter_names_is_noted(lora: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "plain", tmp_path / "sibling")
    source = asked(tmp_path / "sibling", adapter=str(lora))
    assert "the adapter says that it was trained on plain; it is merged into sibling" in source.notes


def test_an_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    adapters.write(tmp_path / "lora", WEIGHTS, base_model_name_or_path=None)
    with pytest.raises(SourceError, match="does not say on what model") as error:
        asked(tmp_path / "lora")
    assert "adapter" in error.value.hint


def test_an_adapter_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"plain has no adapter_config\.json"):
        asked(plain(tmp_path / "plain"), adapter=str(tmp_path / "plain"))


def test_a_full_disk_leaves_nothing_half_made(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise DependencyError("the disk is full")

    monkeypatch.setattr(process, "call", full)
    with pytest.raises(DependencyError):
        made(asked(quantized), tmp_path / "out")
    assert not (tmp_path / "out" / ".quantool" / "work" / STAGE).exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as served:
        point_to(served.url, monkeypatch)
        yield served


def test_a_plan_of_the_hub_s_fetches_no_weights(hub: Hub, quantized: Path, tmp_path: Path) -> None:
    adapters.write(tmp_path / "lora", WEIGHTS, base_model_name_or_path="org/model-FP8")
    hub.repositories = {
        "org/model-FP8": Repository(content(quantized)),
        "me/lora": Repository(content(tmp_path / "lora")),
    }
    config = Config.model_validate({"model_id": "me/lora", "cache_dir": tmp_path / "hub"})
    planned = resolve(config, weights=False, progress=QUIET)
    assert planned.label().startswith("me/lora@")
    assert planned.prepared is not None
    assert planned.prepared.origin.commit
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    local = asked(quantized, adapter=str(tmp_path / "lora"))
    assert headers(planned) == headers(local)
    weights = [quantized / SINGLE, tmp_path / "lora" / "adapter_model.safetensors"]
    assert to_fetch(planned) == sum(path.stat().st_size for path in weights)
    fetched = resolve(config, weights=True, progress=QUIET)
    assert fetched.identity() == planned.identity()
    assert to_fetch(fetched) == 0
    ready, _ = made(fetched, tmp_path / "out")
    mine, _ = made(local, tmp_path / "mine")
    assert (ready.folder / SINGLE).read_bytes() == (mine.folder / SINGLE).read_bytes()


def test_shards_keep_their_names_and_get_an_index(tmp_path: Path) -> None:
    """Those that held nothing but scales go."""
    quantized_sources.write("DeepSeek FP8", plain(tmp_path / "plain"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    (tmp_path / "model" / SINGLE).unlink()
    scales = {name for name in tensors if name.endswith("_inv")}
    parts = [{"lm_head.weight"}, scales, tensors.keys() - scales - {"lm_head.weight"}]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        shard = f"model-{number:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, tmp_path / "model" / shard)
        weight_map |= dict.fromkeys(names, shard)
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    ready, _ = made(asked(tmp_path / "model"), tmp_path / "out")
    found = check_index(ready.folder)
    assert sorted({tensor.file for tensor in found.values()}) == [
        "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors",
    ]  # fmt: skip
    assert found.keys() == tensors.keys() - scales
