"""Structure models as GGUF files and quantized folders, and damaged copies of them.

``gguf_of`` converts each structure once in a test session through llama.cpp's own converter, ``fp8_of`` and ``packed_of``
quantize it. ``tampered`` copies a GGUF with keys changed or left out, ``edited`` one with other numbers in it, ``spoilt`` a
folder with other tensors or another config.json.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import making
from making import shared

from quantool.config.schema import Config
from quantool.formats.safetensors import INDEX, check_index
from quantool.methods._compressed.autoawq import convert as convert_to_autoawq
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Finding, Gates, OutputPlan, Source, Verdict
from quantool.runtime.progress import Progress
from quantool.runtime.toolchain import locate
from quantool.runtime.worker import Report
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve

STRUCTURES = ("spm_llama", "qwen3", "gemma3", "moe")
EMBEDDINGS = ("model.embed_tokens",)

CONVERT = """
import sys
root = sys.argv.pop(1)
sys.path[:0] = [root, root + "/gguf-py"]
import conversion.base
import convert_hf_to_gguf
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
convert_hf_to_gguf.main()
"""


@cache
def _room() -> Path:
    """Of this process alone: workspaces."""
    room = tempfile.TemporaryDirectory(prefix="quantool-structures-")
    atexit.register(room.cleanup)
    return Path(room.name)


def folder_of(name: str) -> Path:
    """The checkpoint of a structure, written once."""
    return making.model(name)


@shared
def gguf_of(name: str, kind: str = "bf16") -> Path:
    """The structure as a GGUF, converted once by llama.cpp's converter."""
    return convert(folder_of(name), making.room() / f"{name}-{kind}.gguf", kind)


def convert(folder: Path, output: Path, kind: str = "bf16") -> Path:
    """Convert a checkpoint in a child process; unknown pre-tokenizers are taken for Qwen2's."""
    environment = {key: value for key, value in os.environ.items() if key != "NO_LOCAL_GGUF"}
    arguments = [str(folder), "--outfile", str(output), "--outtype", kind, "--model-name", folder.name]
    subprocess.run(
        [sys.executable, "-c", CONVERT, str(locate().folder), *arguments],
        check=True,
        capture_output=True,
        env=environment | {"OMP_WAIT_POLICY": "PASSIVE"},
    )
    return output


def tampered(
    original: Path,
    target: Path,
    change: Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    without: Collection[str] = (),
    more: Callable[[Any, Any], None] | None = None,
) -> Path:
    """A copy of a GGUF with the values of ``change`` (new keys too), less the keys of ``drop``, the tensors ``without``.

    ``more`` may add to the writer; it is given the tensors of the original.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(original)
    changes = dict(change or {})
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = GGUFWriter(target, arch=str(fields["general.architecture"].contents()))
    for name, field in fields.items():
        if name in drop or name == "general.architecture":
            continue
        value = changes.pop(name) if name in changes else field.contents()
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type)
    for name, value in changes.items():
        kind = GGUFValueType.get_type(value)
        writer.add_key_value(
            name, value, kind, GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        )
    for tensor in reader.tensors:
        if tensor.name not in without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if more is not None:
        more(writer, reader.tensors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def edited(original: Path, target: Path, name: str, change: Callable[[Any], None]) -> Path:
    """A copy of a GGUF in which ``change`` has edited, in place, the array of each tensor whose name holds ``name``."""
    from gguf import GGUFReader

    shutil.copyfile(original, target)
    reader = GGUFReader(target, "r+")
    found = [tensor for tensor in reader.tensors if name in tensor.name]
    assert found, name
    for tensor in found:
        change(tensor.data)
    reader.data.flush()
    assert target.read_bytes() != original.read_bytes()
    return target


@shared
def fp8_of(name: str, level: str = "FP8_DYNAMIC") -> tuple[Path, OutputPlan]:
    """The structure as a folder of FP8 weights, made by the method fp8, and what its plan said."""
    wanted = Config.model_validate(
        {
            "model_id": str(folder_of(name)),
            "output_path": making.room() / f"fp8-{name}-{level}",
            "method": "fp8",
            "quant_level": level,
        }
    )
    plan, artifacts = making.make(wanted)
    return artifacts[0].folder, plan.outputs[0]


@shared
def packed_of(name: str) -> Path:
    """The structure in 4-bit integers with zero points, groups of 128, made by llmcompressor (W4A16_ASYM)."""
    from llmcompressor.entrypoints.model_free import model_free_ptq

    folder = making.room() / f"{name}-W4A16-ASYM"
    model_free_ptq(
        str(folder_of(name)), str(folder), scheme="W4A16_ASYM", ignore=["lm_head", *EMBEDDINGS], device="cpu"
    )
    return folder


@shared
def autoawq_of(name: str) -> Path:
    """The same in the layout of AutoAWQ."""
    folder = making.room() / f"{name}-awq-W4A16-ASYM"
    shutil.copytree(packed_of(name), folder)
    layers = [one.removesuffix(".weight_packed") for one in check_index(folder) if one.endswith("_packed")]
    convert_to_autoawq(
        {"folder": str(folder), "layers": layers, "ignore": ["lm_head"], "group": 128}, lambda *_: None
    )
    return folder


def spoilt(
    original: Path,
    target: Path,
    tensors: Callable[[dict[str, Any]], None] | None = None,
    settings: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A copy of a folder with one safetensors file whose tensors, and config.json, the callables have changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(original, target)
    if tensors is not None:
        found = load_file(target / "model.safetensors")
        tensors(found)
        save_file(found, target / "model.safetensors", metadata={"format": "pt"})
        (target / INDEX).unlink(missing_ok=True)
    if settings is not None:
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        settings(config)
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def case(name: str, artifact: Path | None = None, *, output: str = "gguf/BF16", **settings: Any) -> Case:
    """A case for a check: ``artifact`` (default: the healthy GGUF) against the structure ``name``.

    All cases of a structure share a workspace, so its reference is made once in a test session.
    """
    chosen = artifact or gguf_of(name)
    config = Config.model_validate(
        {"model_id": str(folder_of(name)), "method": "gguf", "validation": settings}
    )
    return Case(
        artifact=chosen,
        engine="transformers" if chosen.is_dir() else "llama.cpp",
        name=output,
        source=source_of(folder_of(name)),
        config=config,
        gates=Gates(),
        workspace=Workspace(_room() / f"run-{name}"),
    )


def findings(check: str, chosen: Case) -> dict[str, Finding]:
    """What a check finds, by metric (with the corpus behind a colon where there is one)."""
    found = find_check(check).judge(chosen, Progress(quiet=True))
    return {one.metric + (f":{one.corpus}" if one.corpus else ""): one for one in found}


def headers(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: what ``_headers`` reads of each of ``paths``."""
    from quantool.validation._files.gguf_file import read_headers

    asked = [{"paths": [path], "largest": None} for path in request["paths"]]
    return {"headers": [read_headers(one, report) for one in asked]}


def regressions(found: Mapping[str, Finding]) -> set[str]:
    """Metrics that are a REGRESSION."""
    return {metric for metric, one in found.items() if one.verdict == Verdict.REGRESSION}


def altered(chosen: Case, **facts: Any) -> Case:
    """The case with other facts of its source."""
    source = chosen.source.model_copy(update={"facts": chosen.source.facts.model_copy(update=facts)})
    return replace(chosen, source=source)


def tokenizer_folder(name: str, target: Path) -> Path:
    """A copy of a structure's small files, as an artifact for transformers has them."""
    target.mkdir(parents=True)
    for path in folder_of(name).iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    return target


@cache
def source_of(folder: Path) -> Source:
    """The source record of a local checkpoint."""
    return resolve(Config(model_id=str(folder), method="gguf"), weights=True, progress=Progress(quiet=True))
