"""A model with a multi-token-prediction head through GGUF, FP8 and AWQ, and heads that were lost or spoilt afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import making
import mtp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tampering import edited, source_of

from quantool import pipeline
from quantool.config.schema import Config
from quantool.errors import ConfigError, SourceError
from quantool.formats.gguf_header import read_header
from quantool.formats.safetensors import check_index
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Artifact, Finding, Gates, Verdict
from quantool.runtime.workspace import Workspace
from quantool.source.mtp import head_tensors

pytestmark = pytest.mark.e2e
TEXT = making.TEXT / "heldout.en.txt"
SETTINGS = {"max_tokens": 2048, "context": 256, "corpora": [{"name": "docs", "path": str(TEXT)}]}
CALIBRATED = {
    "dataset_path": making.CALIBRATION,
    "sample_size": 4,
    "calibration_config": {"max_seq_length": 64, "max_tokens": 2048},
}
ATTENTION = [["re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]]]
AWQ = {"group_size": 64, "duo_scaling": False, "n_grid": 2, "mappings": ATTENTION}
HEAD = "model.layers.4."


@making.shared
def checkpoint() -> Path:
    return mtp.write_mtp(making.room() / "tiny-mtp")


@making.shared
def ggufs() -> list[Artifact]:
    """Q8_0, and a level that needs an importance matrix, which no text through the head gives entries for."""
    wanted = making.config(
        checkpoint(),
        making.room() / "mtp-gguf",
        ["Q8_0", "IQ2_XXS"],
        quantization_config={"imatrix": True},
        **CALIBRATED,
    )
    with making.own_cache():
        return making.make(wanted)[1]


@making.shared
def folders(method: str, level: str, options: tuple[tuple[str, Any], ...] = ()) -> Artifact:
    output = making.room() / f"mtp-{method}-{level}-{len(options)}"
    named = {"model_id": str(checkpoint()), "output_path": output, "method": method, "quant_level": level}
    config = Config.model_validate(named | CALIBRATED | {"quantization_config": dict(options)})
    return making.make(config)[1][0]


def judged(
    artifact: Path, check: str = "mtp", base: Path | None = None, **details: Any
) -> Mapping[str, Finding]:
    config = Config.model_validate({"model_id": str(checkpoint()), "method": "gguf", "validation": SETTINGS})
    engine = "transformers" if artifact.is_dir() else "llama.cpp"
    workspace = Workspace(making.room() / "mtp-judged")
    case = Case(
        artifact, engine, f"given/{artifact.name}", source_of(checkpoint()), config, Gates(), workspace, base=base,
        details=details,
    )  # fmt: skip
    with workspace.lock():
        found = find_check(check).judge(case, making.QUIET)
    return {finding.metric: finding for finding in found}


def gguf(level: str) -> Path:
    found = next(artifact for artifact in ggufs() if artifact.level == level)
    return found.folder / found.files[0].name


def spoilt(target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The FP8 folder after somebody changed its tensors."""
    shutil.copytree(folders("fp8", "FP8_DYNAMIC").folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_heads_drafts_are_as_good_in_every_file() -> None:
    for artifact in (
        gguf("Q8_0"),
        folders("fp8", "FP8_DYNAMIC").folder,
        folders("awq", "W4A16", tuple(AWQ.items())).folder,
    ):
        found = judged(artifact)
        drafts = found["accepted_drafts"]
        assert (found["head"].verdict, drafts.verdict) == (Verdict.PASS, Verdict.PASS), (
            artifact,
            drafts.detail,
        )
        assert isinstance(drafts.reference, float)
        assert isinstance(drafts.measured, float)
        assert drafts.reference > 0.3
        assert abs(drafts.measured - drafts.reference) < 0.02


def test_folders_hold_the_sources_head_and_say_that_it_is_not_quantized() -> None:
    given = load_file(checkpoint() / "model.safetensors")
    for artifact in (folders("fp8", "FP8_DYNAMIC"), folders("awq", "W4A16", tuple(AWQ.items()))):
        stored = load_file(artifact.folder / "model.safetensors")
        names = head_tensors(given, mtp.LAYERS)
        assert len(names) == 27
        for name in names:
            assert torch.equal(stored[name].view(torch.uint8), given[name].view(torch.uint8)), name
        config = json.loads((artifact.folder / "config.json").read_text())
        assert r"re:^model\.layers\.4\..*" in config["quantization_config"]["ignore"]


def test_a_quantized_head_is_judged_by_its_drafts() -> None:
    artifact = folders("fp8", "FP8_DYNAMIC", (("mtp", "quantize"),))
    kinds = {name: tensor.dtype for name, tensor in check_index(artifact.folder).items()}
    assert kinds[f"{HEAD}self_attn.q_proj.weight"] == "F8_E4M3"
    assert kinds[f"{HEAD}eh_proj.weight"] == "BF16"
    found = judged(artifact.folder)
    assert "19 quantized" in str(found["head"].measured)
    assert found["accepted_drafts"].verdict is Verdict.PASS


def test_a_level_that_needs_a_matrix_keeps_the_head_and_the_expert_counts() -> None:
    """No text goes through the head, so that llama.cpp would not make it at two bits."""
    found = judged(gguf("IQ2_XXS"))
    assert {finding.verdict for finding in found.values()} == {Verdict.PASS}
    artifact = next(artifact for artifact in ggufs() if artifact.level == "IQ2_XXS")
    kinds = {tensor.name: tensor.type for tensor in read_header(gguf("IQ2_XXS")).tensors}
    assert {kinds[f"blk.4.{part}.weight"] for part in ("attn_q", "ffn_down_exps", "nextn.eh_proj")} == {
        "q8_0"
    }
    assert kinds["blk.1.attn_q.weight"] == "iq2_xxs"
    seen = artifact.details["expert_tokens"]
    assert isinstance(seen, dict)
    assert [*seen] == ["blk.3"]
    assert sum(seen["blk.3"]) == 2 * 2048  # type: ignore[arg-type]
    (experts,) = judged(gguf("IQ2_XXS"), "experts").values()
    assert experts.measured == min(seen["blk.3"])  # type: ignore[arg-type,type-var]
    integrity = judged(gguf("IQ2_XXS"), "integrity")
    for metric in ("tensors", "weights", "bits_per_weight", "tensor_types", "imatrix", "scales"):
        assert integrity[metric].verdict is Verdict.PASS, integrity[metric].detail


def test_a_head_that_only_config_json_has_is_left_out_on_purpose(tmp_path: Path) -> None:
    """llama.cpp would convert the checkpoint, and then miss the head's tensors in the file."""
    folder = tmp_path / "headless"
    shutil.copytree(checkpoint(), folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in head_tensors(tensors, mtp.LAYERS)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with making.own_cache():
        with pytest.raises(SourceError, match=rf"the weights have none: neither {HEAD}eh_proj"):
            pipeline.plan(making.config(folder, tmp_path / "out", "Q8_0"), making.QUIET)
        plan = pipeline.plan(making.config(folder, tmp_path / "out", "Q8_0", drop=["mtp"]), making.QUIET)
    assert any(
        "mtp left out" in note for note in plan.warnings
    )  # and llama.cpp has loaded the rehearsed file


def test_a_level_that_would_need_a_matrix_of_the_head_is_refused_by_the_plan() -> None:
    options = {"imatrix": True, "mtp_type": "level"}
    wanted = making.config(
        checkpoint(), making.room() / "mtp-refused", ["IQ2_XXS"], quantization_config=options, **CALIBRATED
    )
    with making.own_cache(), pytest.raises(ConfigError, match=r"IQ2_XXS cannot be made: .* of blk\.4\."):
        making.make(wanted)


def test_a_head_of_one_bit_is_found_by_its_drafts() -> None:
    wanted = making.config(
        checkpoint(), making.room() / "mtp-low", "Q4_K_M", quantization_config={"mtp_type": "q1_0"}
    )
    with making.own_cache():
        artifact = making.make(wanted)[1][0]
    found = judged(artifact.folder / artifact.files[0].name)
    assert (found["head"].verdict, found["accepted_drafts"].verdict) == (Verdict.PASS, Verdict.REGRESSION)


def test_a_dropped_head_is_found_by_name(tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in head_tensors(tensors, mtp.LAYERS):
            del tensors[name]

    (finding,) = judged(spoilt(tmp_path / "dropped", drop)).values()
    assert finding.verdict is Verdict.REGRESSION
    assert f"missing: {HEAD}eh_proj.weight" in finding.detail


def test_a_head_of_another_checkpoint_is_found_by_name(tmp_path: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{HEAD}hnorm.weight"] = tensors[f"{HEAD}hnorm.weight"] + 0.01

    (finding,) = judged(spoilt(tmp_path / "other", swap)).values()
    assert finding.verdict is Verdict.REGRESSION
    assert finding.detail == f"not the source's: {HEAD}hnorm.weight"


@pytest.mark.parametrize("kind", ["zeroed", "other"])
def test_a_spoilt_head_of_a_gguf_is_found_by_its_drafts(tmp_path: Path, kind: str) -> None:
    dice = np.random.default_rng(0)

    def change(rows: Any) -> None:
        rows[:] = 0 if kind == "zeroed" else dice.permutation(np.array(rows))

    path = edited(gguf("Q8_0"), tmp_path / "spoilt-Q8_0.gguf", "blk.4.nextn.eh_proj.weight", change)
    found = judged(path)
    assert found["head"].verdict is Verdict.PASS
    assert found["accepted_drafts"].verdict is Verdict.REGRESSION


def test_a_gguf_that_lost_its_head_since_its_base_is_found(tmp_path: Path) -> None:
    """Blocks behind the last layer cut off, the promise in the metadata with them."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(gguf("Q8_0"))
    path = tmp_path / "cut-Q8_0.gguf"
    writer = GGUFWriter(path, arch="glm4moe")
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.4."):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (lost,) = judged(path, base=gguf("Q8_0")).values()
    assert lost.verdict is Verdict.REGRESSION
    assert "the multi-token-prediction head was lost: its base has" in lost.detail
    (left,) = judged(path).values()
    assert left.verdict is Verdict.SKIPPED
    assert "converter leaves the multi-token-prediction head" in left.detail
