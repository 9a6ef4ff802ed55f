import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantool.errors import ConfigError, SourceError
from quantool.runtime import arithmetic, process
from quantool.texts.corpus import Document
from quantool.validation._engines import hidden_states, reference
from quantool.validation._engines import windows as _windows
from quantool.validation._engines.head import Head, HeadPlan, plan_head
from quantool.validation._engines.llama_cpp import Layout

pytestmark = pytest.mark.e2e

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "phi": {"tie_word_embeddings": False},  # its head has a bias
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    target = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SMALL, **KINDS[request.param])
    kind: Any = AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.bfloat16)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(target)
    return target


def ids(windows: int = 5, context: int = 32) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(0).integers(3, 320, (windows, context)).astype(np.int32)


def loaded(folder: Path) -> Any:
    return reference.load_model(folder, "bfloat16", "cpu", trust_remote_code=False)


def test_logits_come_back_from_stored_hidden_states(folder: Path, tmp_path: Path) -> None:
    import torch

    np.save(tmp_path / "w.npy", ids())
    request = {
        "folder": str(folder),
        "dtype": "bfloat16",
        "device": "cpu",
        "trust_remote_code": False,
        "windows": [str(tmp_path / "w.npy")],
        "outputs": [str(tmp_path / "h.npy")],
    }
    moves: list[float] = []
    answer = reference.capture(request, lambda done, _: moves.append(done))
    assert moves[-1] == ids().size
    hidden = hidden_states.read_hidden(tmp_path / "h.npy")
    assert hidden.shape == (5, 15, 64)
    head = Head(folder, HeadPlan.of(answer["head"]))
    with torch.no_grad():
        own = loaded(folder)(torch.from_numpy(ids()).long(), use_cache=False).logits[:, 16:31].float()
    made = head.log_probs(hidden_states.as_tensor(hidden).flatten(0, 1)).view(own.shape)
    # Roundings of the model's own bfloat16 logits are all that is between them.
    assert float((made - own.log_softmax(-1)).abs().max()) < 0.02 * float(own.abs().max())
    assert float(made.exp().sum(-1).sub(1).abs().max()) < 1e-5


def test_an_unknown_transform_is_found(folder: Path) -> None:
    model = loaded(folder)
    plan = plan_head(model, folder)
    reference.verify(model, Head(folder, plan), ids(1))
    wrong = HeadPlan(plan.weight, plan.bias, plan.scale * 1.1, plan.softcap)
    with pytest.raises(SourceError, match=f"logits of {type(model).__name__} cannot be recomputed"):
        reference.verify(model, Head(folder, wrong), ids(1))


def test_a_head_in_slices_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    plan = plan_head(loaded(folder), folder)
    states = torch.randn(7, 64)
    whole = Head(folder, plan).logits(states)
    monkeypatch.setattr("quantool.validation._engines.head.HELD_BYTES", 0)
    monkeypatch.setattr("quantool.validation._engines.head.SLICE_BYTES", 4 * 64 * 50)
    assert torch.allclose(Head(folder, plan).logits(states), whole, atol=1e-5)
    assert torch.allclose(Head(folder, plan, 300).logits(states), whole[:, :300], atol=1e-5)


def test_missing_weights_and_changed_heads_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    kind: Any = LlamaForCausalLM
    kind(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    model = loaded(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    torch.nn.init.normal_(model.lm_head.weight)
    with pytest.raises(SourceError, match="head of LlamaForCausalLM is not among the tensors"):
        plan_head(model, tmp_path)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks weights of LlamaForCausalLM: model\.layers\.1\.mlp\.up"):
        loaded(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(SourceError, match="transformers cannot load"):
        loaded(tmp_path)


def test_windows_are_cut_as_llama_perplexity_does() -> None:
    stream = np.arange(100, dtype=np.int32)
    cut = _windows.cut_windows(stream, 16, 70, bos=999, name="c")
    assert cut.shape == (4, 16)
    assert cut[:, 0].tolist() == [999] * 4
    assert cut[2, 1:].tolist() == list(range(33, 48))
    assert _windows.cut_windows(stream, 16, 1000, bos=None, name="c")[1, 0] == 16
    assert len(_windows.scored(512)) == 255
    assert list(_windows.scored(16)) == list(range(8, 15))
    with pytest.raises(ConfigError, match="'c' has 100 tokens, less than one window of 128"):
        _windows.cut_windows(stream, 128, 1000, bos=None, name="c")
    with pytest.raises(ConfigError, match="may use 8 tokens"):
        _windows.cut_windows(stream, 16, 8, bos=None, name="c")


def test_texts_are_joined_and_chats_stand_alone() -> None:
    class Tokenizer:
        chat_template = "t"

        def __call__(
            self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
        ) -> dict[str, Any]:
            return {"input_ids": [text, add_special_tokens]}

        def apply_chat_template(self, messages: Any, tools: Any = None, *, tokenize: bool = True) -> str:
            return "chat"

    chat = Document(messages=({"role": "user", "content": "x"},))
    found = list(_windows.token_ids([Document("a"), Document("b"), chat, chat], Tokenizer()))
    assert found == [["a\n\nb", True], ["chat", False], ["chat", False]]


@pytest.mark.parametrize(
    ("vocabulary", "layout"),
    [(8192, Layout(4, 255)), (32_768, Layout(2, 255)), (128_256, Layout(1, 130)), (256_000, Layout(1, 65))],
)
def test_decodes_hold_no_more_logits_than_planned(vocabulary: int, layout: Layout) -> None:
    assert Layout.of(vocabulary, 512) == layout
    covered = [position for piece in layout.pieces(512) for position in piece]
    assert covered == list(_windows.scored(512))


FULL = """
import pathlib, sys
import numpy as np, torch
from quantool.errors import DependencyError
from quantool.runtime.workspace import written
from quantool.validation._engines.hidden_states import save_states

try:
    with written(pathlib.Path(sys.argv[1])) as part:
        for _ in save_states([(64, torch.zeros(64, 8, 4096))], np.zeros((64, 16), np.int32), part):
            pass
except DependencyError as error:
    print(error)
"""


def test_a_disk_that_is_full_while_the_reference_is_written(tmp_path: Path) -> None:
    """T13: the file is mapped, so that without room for all of it writing would end the process by SIGBUS."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        done = subprocess.run(
            [sys.executable, "-c", FULL, str(disk / "a.hidden.npy")],
            capture_output=True, text=True, check=False, env=process.environment(),
        )  # fmt: skip
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"cannot write {disk}/a.hidden.npy: No space left on device"


def test_a_processor_without_bfloat16_computes_in_float32(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights; float32 differs from what they give in float64 by less than bfloat16 does."""
    import torch

    np.save(tmp_path / "w.npy", ids())
    request = {
        "folder": str(folder),
        "dtype": "bfloat16",
        "device": "cpu",
        "trust_remote_code": False,
        "windows": [str(tmp_path / "w.npy")],
        "outputs": [str(tmp_path / "h.npy")],
    }
    states, used = {}, {}
    for limit in ("AVX2", "DEFAULT"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        if limit == "DEFAULT":
            monkeypatch.setattr(arithmetic, "native", lambda: ("bfloat16",))
        used[limit] = reference.capture(request, lambda *_: None)["arithmetic"]
        states[limit] = hidden_states.as_tensor(hidden_states.read_hidden(tmp_path / "h.npy"))
    assert used == {"AVX2": "float32", "DEFAULT": "bfloat16"}
    assert {kind: values.dtype for kind, values in states.items()} == {
        "AVX2": torch.float32,
        "DEFAULT": torch.bfloat16,
    }
    exact = loaded(folder).double()
    with torch.no_grad(), reference.tapped(exact, _windows.scored(32), keep_logits=False) as seen:
        exact(input_ids=torch.from_numpy(ids()).long(), use_cache=False)
    off = {kind: float((values.double() - seen[0]).abs().max()) for kind, values in states.items()}
    assert off["AVX2"] < 1e-4
    assert off["AVX2"] < off["DEFAULT"] / 50
