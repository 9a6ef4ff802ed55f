from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantool.config.schema import Config
from quantool.errors import SourceError
from quantool.records import sha256_of
from quantool.runtime.progress import Progress
from quantool.source import mtp
from quantool.source.resolve import resolve
from quantool.source.tensor_headers import headers
from tests.checkpoint import tensors, write_checkpoint

TRUNK = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "lm_head.weight",
)
NEXTN = tuple(
    f"model.layers.2.{part}.weight"
    for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "mlp.up_proj")
)
QWEN = tuple(
    f"mtp.{part}.weight"
    for part in ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0.mlp.up_proj")
)
MIMO = tuple(
    f"model.mtp_layers.0.{part}.weight"
    for part in ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm", "mlp.up_proj")
)
ERNIE = ("model.mtp_block.0.mlp.up_proj.weight", "model.mtp_linear_proj.0.weight")


@pytest.mark.parametrize("head", [NEXTN, QWEN, MIMO, ERNIE])
def test_the_tensors_of_a_head_are_told_from_the_models(head: tuple[str, ...]) -> None:
    assert mtp.head_tensors((*TRUNK, *head), 2) == head


@pytest.mark.parametrize("head", [NEXTN, QWEN, MIMO, ERNIE])
def test_the_patterns_mean_every_module_of_the_head_and_no_other(head: tuple[str, ...]) -> None:
    from quantool.methods._compressed.schemes import matches

    patterns = mtp.head_patterns((*TRUNK, *head), 2)
    further = (
        "model.layers.20.mlp.up_proj",
        "model.layers.12.enorm",
        "mtp2.fc",
    )  # of a model with more layers
    for name in (*TRUNK, *head, *further):
        assert any(matches(name.removesuffix(".weight"), p) for p in patterns) == (name in head), name


def test_layouts_are_known_by_their_parts() -> None:
    nextn, qwen, mimo = (mtp.layout_of((*TRUNK, *head), 2) for head in (NEXTN, QWEN, MIMO))
    assert nextn is not None
    assert qwen is not None
    assert mimo is not None
    assert (nextn.projection, nextn.block, nextn.hidden_first) == (
        "model.layers.2.eh_proj",
        "model.layers.2.",
        False,
    )
    assert (qwen.projection, qwen.block, qwen.hidden_first) == ("mtp.fc", "mtp.layers.0.", False)
    assert (mimo.final_norm, mimo.hidden_first) == ("model.mtp_layers.0.final_layernorm", True)
    assert mtp.layout_of((*TRUNK, *ERNIE), 2) is None
    assert mtp.layout_of(TRUNK, 2) is None


@pytest.mark.parametrize(
    ("config", "promised"),
    [
        ({}, 0),
        ({"num_nextn_predict_layers": 1}, 1),
        ({"text_config": {"mtp_num_hidden_layers": 2}}, 2),
        ({"num_nextn_predict_layers": None}, 0),
        ({"num_mtp_layers": True}, 0),
    ],
)
def test_what_config_json_promises(config: dict[str, Any], promised: int) -> None:
    assert mtp.promised_layers(config) == promised


def test_a_promised_head_that_the_weights_lack_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        SourceError, match=r"promises 1 layer of .*\(num_nextn_predict_layers: 1\), .* have none"
    ) as refused:
        mtp.is_absent({"num_nextn_predict_layers": 1}, TRUNK, 2, dropped=False)
    for name in ("model.layers.2.eh_proj.weight", "mtp.fc.weight", "model.mtp_layers.0.input_proj.weight"):
        assert name in refused.value.message
    assert "drop: [mtp]" in refused.value.hint
    assert mtp.is_absent({"text_config": {"mtp_num_hidden_layers": 1}}, TRUNK, 2, dropped=True)
    assert not mtp.is_absent({"num_nextn_predict_layers": 0}, TRUNK, 2, dropped=False)
    for head in (NEXTN, QWEN, MIMO, ERNIE):
        assert not mtp.is_absent({"num_nextn_predict_layers": 1}, (*TRUNK, *head), 2, dropped=False)


def test_a_config_json_without_promises() -> None:
    text = {"mtp_num_hidden_layers": 2, "hidden_size": 8}
    config = {"num_nextn_predict_layers": 1, "text_config": text, "vision_config": {"num_mtp_layers": 1}}
    assert mtp.without_promise(config) == {
        "num_nextn_predict_layers": 0,
        "text_config": {"mtp_num_hidden_layers": 0, "hidden_size": 8},
        "vision_config": {"num_mtp_layers": 1},
    }
    assert config["num_nextn_predict_layers"] == 1


def test_a_head_in_part_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"lacks model\.layers\.2\.eh_proj\.weight"):
        mtp.is_absent({"num_nextn_predict_layers": 1}, (*TRUNK, *NEXTN[1:]), 2, dropped=True)
    with pytest.raises(SourceError, match=r"promises 2 layers .* have 1: model\.layers\.2"):
        mtp.is_absent({"num_nextn_predict_layers": 2}, (*TRUNK, *NEXTN), 2, dropped=True)


def test_resolve_refuses_a_head_in_part(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", num_nextn_predict_layers=1)
    lost = {f"model.layers.2.{part}.weight": np.zeros((2, 2), np.float16) for part in ("enorm", "hnorm")}
    save_file(tensors() | lost, folder / "model.safetensors")
    config = Config.model_validate(
        {
            "model_id": str(folder),
            "method": "gguf",
            "quant_level": "Q8_0",
            "output_path": str(tmp_path / "out"),
        }
    )
    with pytest.raises(SourceError, match=r"head lacks model\.layers\.2\.eh_proj\.weight"):
        resolve(config, weights=False, progress=Progress(quiet=True))


def test_a_missing_head_is_refused_unless_it_is_dropped(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", num_nextn_predict_layers=1)
    wanted = {
        "model_id": str(folder),
        "method": "gguf",
        "quant_level": "Q8_0",
        "output_path": str(tmp_path / "out"),
    }
    with pytest.raises(SourceError, match="the weights have none"):
        resolve(Config.model_validate(wanted), weights=False, progress=Progress(quiet=True))
    dropped = Config.model_validate(wanted | {"drop": ["mtp"]})
    source = resolve(dropped, weights=False, progress=Progress(quiet=True))
    assert source.absent == ("mtp",)
    assert json.loads((source.folder / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert headers(source).keys() == tensors().keys()
    assert source == resolve(dropped, weights=True, progress=Progress(quiet=True))
    for file in source.files:
        assert file.sha256 in (None, sha256_of(source.folder / file.name)), file.name
