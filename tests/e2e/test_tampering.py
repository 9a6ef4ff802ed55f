"""A file that is wrong in one place fails the check that is there for it, and only a sound one passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import making
import numpy as np
import pytest
from tampering import tampered

from tests.e2e.conftest import PATIENCE, WIDE, Ended, Run, quantool, write

pytestmark = pytest.mark.e2e

Judge = Callable[[Path], tuple[int, set[str]]]


@pytest.fixture(scope="module")
def sound(runs: Callable[[str], tuple[Run, Ended]]) -> Path:
    run, ended = runs("chat")
    assert ended.code == 0, ended.err
    return run.folder / "tiny-5.2M-chat-Q8_0.gguf"


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Judge:
    """Run `quantool validate`; its exit code and the metrics that failed."""
    folder = tmp_path_factory.mktemp("validated")
    text = {"name": "docs", "path": str(making.TEXT / "heldout.en.txt")}
    settings = {
        "model_id": "anything",
        "method": "gguf",
        "quant_level": "Q8_0",
        "quantization_config": making.QWEN2,
        "validation": {
            "max_tokens": 2048,
            "corpora": [text],
            "gates": {"Q8_0": WIDE["*"] | {"max_mean_kld": 0.05}},
        },
    }
    file = write(folder, "judging", **settings)

    def validate(artifact: Path) -> tuple[int, set[str]]:
        child = quantool(
            "validate", str(artifact), "--reference", str(making.TINY), "--config", str(file),
            "--level", "Q8_0", "--output", str(folder / "out"), "--json", cache=cache,
        )  # fmt: skip
        out, err = child.communicate(timeout=PATIENCE)
        assert child.returncode in (0, 5), err
        findings = json.loads(out)["findings"]
        return child.returncode, {
            finding["metric"] for finding in findings if finding["verdict"] in ("REGRESSION", "ANOMALOUS")
        }

    return validate


def test_sound_file_passes(validated: Judge, sound: Path) -> None:
    assert validated(sound) == (0, set())


def test_permuted_k_fails_on_the_divergence(validated: Judge, sound: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    artifact = tmp_path / "permuted-Q8_0.gguf"
    shutil.copyfile(sound, artifact)
    reader = GGUFReader(artifact, "r+")
    (rows,) = (tensor.data for tensor in reader.tensors if tensor.name == "blk.1.attn_k.weight")
    heads = np.array(rows).reshape(
        2, 32, 2, -1
    )  # neighbours belong together (llama.cpp), half a head apart (HF)
    rows[:] = heads.swapaxes(1, 2).reshape(rows.shape)
    reader.data.flush()
    assert artifact.read_bytes() != sound.read_bytes()
    code, failed = validated(artifact)
    assert code == 5
    assert failed & {"mean_kld", "perplexity", "same_top_p"}
    assert not failed & {"template_text", "rendered_ids"}


def test_swapped_template_fails_on_the_template(validated: Judge, sound: Path, tmp_path: Path) -> None:
    template = making.keys(sound)["tokenizer.chat_template"].replace("<|im_start|>", "<|endoftext|>", 1)
    artifact = tampered(sound, tmp_path / "template-Q8_0.gguf", {"tokenizer.chat_template": template})
    code, failed = validated(artifact)
    assert code == 5
    assert "template_text" in failed
    assert "mean_kld" not in failed


def test_dropped_eos_fails_on_the_stop_tokens(validated: Judge, sound: Path, tmp_path: Path) -> None:
    artifact = tampered(sound, tmp_path / "eos-Q8_0.gguf", drop=["tokenizer.ggml.eos_token_id"])
    code, failed = validated(artifact)
    assert code == 5
    assert any("eos" in metric or "stop" in metric or "end" in metric for metric in failed), failed
    assert "mean_kld" not in failed
