"""Every level is what llama-quantize makes, byte for byte; wrong options are refused."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import making
import pytest

from quantool.errors import ConfigError, DependencyError, QuantizationError
from quantool.methods._llama_cpp import quantize
from quantool.methods._llama_cpp.quantize import ggml_type
from quantool.runtime import process, toolchain

pytestmark = pytest.mark.e2e

MATRIX, LABEL = "some-imatrix.gguf", making.CALIBRATION.name
WITH_MATRIX = ("IQ4_XS", "Q4_K_M", "Q2_K", "Q8_0", "IQ3_S", "Q4_0")

# settings of _quantizer, and the options of llama-quantize that say the same
SETTINGS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "tensor_types": (
        "Q4_K_M",
        {"tensor_types": {r"blk\.[01]\.ffn_down": "Q6_K", "ATTN_V": "q8_0"}},
        ("--tensor-type", r"blk\.[01]\.ffn_down=Q6_K", "--tensor-type", "ATTN_V=q8_0"),
    ),
    "output_tensor_type": ("Q4_0", {"output_tensor_type": "Q5_K"}, ("--output-tensor-type", "Q5_K")),
    "token_embedding_type": ("Q4_K_S", {"token_embedding_type": "f16"}, ("--token-embedding-type", "f16")),
    "pure": ("Q4_K_M", {"pure": True}, ("--pure",)),
    "leave_output_tensor": ("Q8_0", {"leave_output_tensor": True}, ("--leave-output-tensor",)),
}  # fmt: skip


@cache
def copied(name: str) -> Path:
    """Base and importance matrix of a model in one folder of their own, the matrix as ``MATRIX``."""
    folder = making.room() / f"quantizer-{name}"
    folder.mkdir()
    (folder / "base.gguf").hardlink_to(making.made(name).base)
    (folder / MATRIX).hardlink_to(making.made(name).matrix)
    return folder


@pytest.mark.upstream
def test_levels_are_those_of_the_tool() -> None:
    done = subprocess.run(
        [str(making.upstream("llama-quantize")), "--help"], capture_output=True, text=True, check=False
    )
    said = [line.split() for line in done.stdout.splitlines() if "  or  " in line]
    assert [words[2] for words in said] == [*toolchain.levels()][: len(said)]


@pytest.mark.upstream
@pytest.mark.parametrize("level", [*toolchain.levels()])
def test_level_has_the_bytes_of_llama_quantize(level: str, tmp_path: Path) -> None:
    plain, weighed = making.every_level()
    one = making.made(making.SMALL)
    (tmp_path / one.matrix.name).hardlink_to(one.matrix)
    (tmp_path / "base.gguf").hardlink_to(one.base)
    matrix = ("--imatrix", one.matrix.name)
    theirs = making.upstream_quantize(
        tmp_path / "base.gguf",
        tmp_path / "theirs.gguf",
        level,
        *(matrix if level in making.NEEDS_MATRIX else ()),
    )
    assert plain.get(level, weighed[level]).read_bytes() == theirs.read_bytes()
    if level in WITH_MATRIX:
        making.upstream_quantize(tmp_path / "base.gguf", theirs, level, *matrix)
        assert weighed[level].read_bytes() == theirs.read_bytes()
        assert weighed[level].read_bytes() != plain[level].read_bytes()


@pytest.mark.upstream
@pytest.mark.parametrize("name", ["tiny-chat", "moe"])
def test_other_models_have_the_bytes_of_llama_quantize(name: str) -> None:
    folder = copied(name)
    wanted = ("Q4_K_M", "MXFP4_MOE", "Q2_K")
    making.quantized(
        folder / "base.gguf",
        [making.run(level, folder / f"{level}.gguf", folder / MATRIX, LABEL) for level in wanted],
    )
    for level in wanted:
        theirs = making.upstream_quantize(
            folder / "base.gguf", folder / "theirs.gguf", level, "--imatrix", MATRIX
        )
        assert (folder / f"{level}.gguf").read_bytes() == theirs.read_bytes(), level


@cache
def with_settings() -> dict[str, Path]:
    folder = copied("tiny-chat")
    runs = {
        name: making.run(level, folder / f"{name}.gguf", **settings)
        for name, (level, settings, _) in SETTINGS.items()
    }
    making.quantized(folder / "base.gguf", list(runs.values()))
    return {name: Path(run["output"]) for name, run in runs.items()}


@pytest.mark.upstream
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_have_the_effect_of_the_options(name: str) -> None:
    level, _, options = SETTINGS[name]
    folder = copied("tiny-chat")
    theirs = making.upstream_quantize(folder / "base.gguf", folder / "theirs.gguf", level, *options)
    without = making.upstream_quantize(folder / "base.gguf", folder / "without.gguf", level)
    ours = with_settings()[name].read_bytes()
    assert ours == theirs.read_bytes()
    assert ours != without.read_bytes()


def test_named_tensors_get_their_types() -> None:
    from gguf import GGUFReader

    types = {
        tensor.name: tensor.tensor_type.name for tensor in GGUFReader(with_settings()["tensor_types"]).tensors
    }
    assert {types[f"blk.{n}.ffn_down.weight"] for n in (0, 1)} == {"Q6_K"}
    assert {types[f"blk.{n}.attn_v.weight"] for n in range(4)} == {"Q8_0"}
    left = {
        tensor.name: tensor.tensor_type.name
        for tensor in GGUFReader(with_settings()["leave_output_tensor"]).tensors
    }
    assert left["output.weight"] == "F16"
    pure = {tensor.tensor_type.name for tensor in GGUFReader(with_settings()["pure"]).tensors}
    assert pure == {"Q4_K", "F32"}


def test_ggml_type_takes_any_case_and_names_the_nearest() -> None:
    assert ggml_type("Q6_K") == ggml_type("q6_k") == 14
    with pytest.raises(ConfigError) as caught:
        ggml_type("q6k")
    assert "'q6k'" in caught.value.message
    assert "q6_k" in caught.value.hint


@pytest.mark.parametrize(
    ("level", "settings", "reason"),
    [
        ("IQ2_XXS", {}, "importance matrix"),
        ("Q4_K_M", {"tensor_types": {"blk.(": "q8_0"}}, "regular expression"),
    ],
)
def test_llama_cpp_says_why_it_refuses(
    level: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    base = copied("tiny-chat") / "base.gguf"
    with pytest.raises(QuantizationError, match=reason):
        making.quantized(base, [making.run(level, tmp_path / "out.gguf", **settings)])


def test_damaged_base_is_an_error_with_its_reason(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    shutil.copyfile(copied("tiny-chat") / "base.gguf", base)
    with base.open("r+b") as file:
        file.truncate(base.stat().st_size - 100_000)
    with pytest.raises(QuantizationError, match=r"base\.gguf.*(corrupted|not within the file bounds)"):
        making.quantized(base, [making.run("Q8_0", tmp_path / "out.gguf")])


def test_quantized_base_is_refused_unless_allowed(tmp_path: Path) -> None:
    folder = copied("tiny-chat")
    making.quantized(folder / "base.gguf", [making.run("Q8_0", tmp_path / "q8.gguf")])
    again = making.run("Q4_0", tmp_path / "q4.gguf")
    with pytest.raises(QuantizationError, match="requantizing"):
        making.quantized(tmp_path / "q8.gguf", [again])
    making.quantized(tmp_path / "q8.gguf", [making.run("Q4_0", tmp_path / "q4.gguf", allow_requantize=True)])
    assert (tmp_path / "q4.gguf").stat().st_size < (tmp_path / "q8.gguf").stat().st_size


def test_full_disk_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(DependencyError, match=r"cannot write .*disk/q8\.gguf: the disk is full"):
            making.quantized(copied("tiny-chat") / "base.gguf", [making.run("Q8_0", folder / "q8.gguf")])
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_probe_says_why_a_file_does_not_load(tmp_path: Path) -> None:
    for name, content in {"empty.gguf": b"", "text.gguf": b"not a model at all"}.items():
        (tmp_path / name).write_bytes(content)
        request = {"path": str(tmp_path / name), "vocabulary_only": False}
        with pytest.raises(QuantizationError, match=f"cannot load {name}: .+"):
            process.call(quantize.probe, request, log=tmp_path / "log")
    request = {"path": str(copied("tiny-chat") / "base.gguf"), "vocabulary_only": False}
    assert process.call(quantize.probe, request, log=tmp_path / "log") == {"tokens": 4096}
