"""Layer by layer or whole: the same bytes; and what cannot run layer by layer runs whole, and says so."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structures
import torch
from safetensors.torch import load_file, save_file

from quantool.errors import SourceError
from quantool.runtime import process
from quantool.validation import perplexity
from quantool.validation._engines import layer_stream, memory, reference
from quantool.validation._engines.layer_files import Unstreamable
from quantool.validation._engines.layer_stream import LayerStream
from quantool.validation._score import score_transformers
from quantool.validation._score.scores import ArtifactScores

pytestmark = pytest.mark.e2e

WRITERS: dict[str, Callable[[Path], Path]] = {
    "llama": structures.write_spm_llama,
    "qwen3": structures.write_qwen3,  # tied
    "moe": structures.write_moe,  # experts that transformers fuses
    "gemma3": structures.write_gemma3,  # five sliding layers to one full
    "mistral": structures.write_sliding_mistral,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of a kind, made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = WRITERS[kind](tmp_path_factory.mktemp("checkpoints") / kind)
        return made[kind]

    return folder


def request(folder: Path, tmp_path: Path, *, by_layer: bool) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(3, 500, (9, 256)).astype(np.int32)  # a full batch and a window
    np.save(tmp_path / "a.ids.npy", ids)
    np.save(tmp_path / "b.ids.npy", ids[::-1, :100])
    return {
        "folder": str(folder),
        "dtype": "bfloat16",
        "device": "cpu",
        "trust_remote_code": False,
        "by_layer": by_layer,
        "windows": [str(tmp_path / f"{name}.ids.npy") for name in "ab"],
        "outputs": [str(tmp_path / f"{name}.{by_layer}.npy") for name in "ab"],
    }


def captured(folder: Path, tmp_path: Path, *, by_layer: bool) -> tuple[list[bytes], str, list[float]]:
    """The reference's files, how it ran, and its progress."""
    asked = request(folder, tmp_path, by_layer=by_layer)
    moves: list[float] = []
    answer = reference.capture(asked, lambda done, total: moves.append(done / total))
    return [Path(name).read_bytes() for name in asked["outputs"]], answer["execution"], moves


@pytest.mark.parametrize("kind", WRITERS)
def test_layers_one_by_one_give_the_bytes_of_the_whole(
    checkpoint: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    whole, way, _ = captured(checkpoint(kind), tmp_path, by_layer=False)
    assert way == "whole"
    streamed, way, moves = captured(checkpoint(kind), tmp_path, by_layer=True)
    assert way == "layer by layer"
    assert streamed == whole
    assert moves == sorted(moves)
    assert moves[-1] == pytest.approx(1)


def test_float32_and_states_in_a_file_change_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(layer_stream, "HELD_BYTES", 0)
    whole = captured(checkpoint("qwen3"), tmp_path, by_layer=False)[0]
    assert captured(checkpoint("qwen3"), tmp_path, by_layer=True)[0] == whole
    assert np.load(tmp_path / "a.True.npy").dtype == np.float32
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".npy"]


def fp8(folder: Path, target: Path) -> Path:
    """The model in FP8 with a scale a row and dynamic activations, in the compressed-tensors layout."""
    target.mkdir()
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = weight
        if "_proj" in name:
            scale = weight.float().abs().amax(1, keepdim=True) / 448
            stored[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scale.bfloat16()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    settings = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }
    }
    (target / "config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_scores_of_a_quantized_folder_are_the_same_numbers(
    checkpoint: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    folder = checkpoint(kind)
    asked = request(folder, tmp_path, by_layer=False)
    head = reference.capture(asked, lambda *_: None)["head"]
    artifact = fp8(folder, tmp_path / "fp8")
    scores: dict[bool, list[dict[str, Any]]] = {}
    for by_layer in (False, True):
        outputs = [tmp_path / f"{by_layer}" / f"{name}.npz" for name in "ab"]
        answer = score_transformers.score(
            asked
            | {
                "models": [str(artifact)],
                "outputs": [list(map(str, outputs))],
                "hidden": asked["outputs"],
                "source": str(folder),
                "head": head,
                "tokens": 500,
                "by_layer": by_layer,
            },
            lambda *_: None,
        )
        assert answer == {"failures": [None], "executions": ["layer by layer" if by_layer else "whole"]}
        scores[by_layer] = [dict(np.load(path)) for path in outputs]
    for whole, streamed in zip(scores[False], scores[True], strict=True):
        assert whole.keys() == streamed.keys()
        assert all(np.array_equal(values, streamed[name]) for name, values in whole.items())
    assert any(
        values.any() for name, values in scores[True][0].items() if "kld" in name or "divergence" in name
    )


def execution(folder: Path, tmp_path: Path, **fields: Any) -> str:
    asked = {"device": "cpu", "trust_remote_code": False} | fields
    with reference.open_model(folder, "bfloat16", asked, tmp_path) as loaded:
        assert (loaded.stream is None) == loaded.execution.startswith("whole")
        return loaded.execution


def test_layers_that_leave_each_other_something_run_whole(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that adds what the one before it kept to itself, as no waypoint can see."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    own, kept = LlamaDecoderLayer.forward, [torch.zeros(1)]

    def leaving(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, hidden_states, *args, **kwargs)
        if self.self_attn.layer_idx:
            return out + kept[0]
        kept[0] = out
        return out

    monkeypatch.setattr(LlamaDecoderLayer, "forward", leaving)
    way = execution(checkpoint("llama"), tmp_path, by_layer=True)
    assert way == "whole: its layers give other results one by one than together"


def test_layers_that_share_a_dictionary_run_whole(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma 3n and 4 hand keys and values on; every layer is looked at, not the first two alone."""
    from transformers.models.llama.modeling_llama import LlamaModel

    own = LlamaModel.forward

    def sharing(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs, shared_states={})

    monkeypatch.setattr(LlamaModel, "forward", sharing)
    assert (
        execution(checkpoint("llama"), tmp_path, by_layer=True)
        == "whole: its layers share shared_states, a dict"
    )


def test_a_missing_weight_of_any_layer_is_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    weights = load_file(checkpoint("gemma3") / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint("gemma3") / "config.json").read_bytes())
    for gone in ("model.layers.4.mlp.up_proj.weight", "model.norm.weight"):
        rest = {name: tensor for name, tensor in weights.items() if name != gone}
        save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(SourceError, match=f"lacks weights of Gemma3ForCausalLM: {gone}"):
            reference.capture(request(tmp_path, tmp_path, by_layer=True), lambda *_: None)


def test_memory_decides(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    folder = checkpoint("llama")
    size = memory.unpacked_bytes(folder, on_gpu=False)
    parameters = sum(weight.numel() for weight in load_file(folder / "model.safetensors").values())
    assert size == 4 * parameters
    assert memory.unpacked_bytes(folder, on_gpu=True) == 2 * parameters
    assert memory.unpacked_bytes(fp8(folder, tmp_path / "fp8"), on_gpu=True) >= 2 * parameters
    for free, way in ((2 * size, "whole"), (size, "layer by layer")):
        monkeypatch.setattr(memory, "free_ram", lambda free=free: free)
        assert execution(folder, tmp_path) == way


@pytest.mark.parametrize("kind", ["bfloat16", "FP8"])
def test_a_layer_that_has_run_gives_its_memory_back_at_once(
    checkpoint: Callable[[str], Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized layers refer to themselves; the garbage collector counts objects, of which a layer of 400 MB has few."""
    folder = checkpoint("qwen3")
    folder = fp8(folder, tmp_path / "fp8") if kind == "FP8" else folder
    weights: list[weakref.ref[Any]] = []
    place = LayerStream._placed

    def watched(stream: LayerStream, module: Any) -> Any:
        placed = place(stream, module)
        if hasattr(placed, "mlp"):  # a layer
            weights.append(weakref.ref(placed.mlp.down_proj.weight))
        return placed

    monkeypatch.setattr(LayerStream, "_placed", watched)
    gc.collect()
    gc.disable()
    try:
        stream = LayerStream(folder, "bfloat16", on_gpu=False, trust_remote_code=False, scratch=tmp_path)
        stream.prepare([torch.arange(8).view(1, -1)])
        alive = [number for number, weight in enumerate(weights) if weight() is not None]
    finally:
        gc.enable()
    stream.close()
    assert len(weights) == 4  # two for the trial, and both again
    assert alive == []


def test_weights_of_another_method_are_loaded_whole(tmp_path: Path) -> None:
    folder = structures.write_qwen3(tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(Unstreamable, match="weights of gptq are loaded whole"):
        LayerStream(folder, "bfloat16", on_gpu=False, trust_remote_code=False, scratch=tmp_path)


def test_the_finding_says_how_models_ran() -> None:
    class Ran:
        execution = "layer by layer"

    scores = ArtifactScores((), (), "", None, execution="whole: its layers share x, a dict")
    (finding,) = perplexity._execution([Ran()], scores)  # type: ignore[list-item]
    assert finding.detail == (
        "memory is short: the reference ran layer by layer; the artifact ran whole: its layers share x, a dict"
    )
    Ran.execution = "whole"
    assert not perplexity._execution([Ran()], ArtifactScores((), (), "", None))  # type: ignore[list-item]


PEAK = """
import json, pathlib, sys
import torch
from transformers import LlamaForCausalLM
from quantool.validation._engines import reference

def peak():  # that of getrusage begins with the parent's
    lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0])

torch.mm(torch.ones(64, 64), torch.ones(64, 64))
before = peak()
reference.capture(json.loads(sys.argv[1]), lambda *_: None)
print(peak() - before)
"""


def test_memory_holds_two_layers(tmp_path: Path) -> None:
    """Twenty layers of 29 MB in bfloat16; the process grows by less than three of them, the whole model by all."""
    from transformers import LlamaConfig

    layers, width, inner = 20, 1024, 3456
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    norm = torch.ones(width, dtype=torch.bfloat16)
    ends = {"model.embed_tokens.weight": torch.randn(512, width).bfloat16() / 50, "model.norm.weight": norm}
    files = {"ends.safetensors": ends}
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"} | {
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
    }  # fmt: skip
    for number in range(layers):
        prefix = f"model.layers.{number}."
        layer = {
            f"{prefix}{name}.weight": torch.randn(shape).bfloat16() / 50 for name, shape in shapes.items()
        }
        norms = ("input_layernorm", "post_attention_layernorm")
        files[f"{number}.safetensors"] = layer | {f"{prefix}{name}.weight": norm.clone() for name in norms}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name, {"format": "pt"})
    index = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    grown = {}
    for by_layer in (False, True):
        asked = request(tmp_path, tmp_path, by_layer=by_layer)
        np.save(tmp_path / "a.ids.npy", np.arange(64, dtype=np.int32).reshape(2, 32))
        asked |= {"windows": asked["windows"][:1], "outputs": asked["outputs"][:1]}
        done = subprocess.run(
            [sys.executable, "-c", PEAK, json.dumps(asked)],
            capture_output=True, text=True, check=False, env=process.environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        grown[by_layer] = int(done.stdout) << 10
    size = 2 * sum(
        tensor.numel() for name, tensors in files.items() if name[0] == "0" for tensor in tensors.values()
    )
    assert grown[True] < 3 * size, (grown, size)
    assert grown[False] > 15 * size
    assert (tmp_path / "a.True.npy").read_bytes() == (tmp_path / "a.False.npy").read_bytes()
