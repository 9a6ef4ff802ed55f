"""An adapter that is not merged (``merge: false``): llama.cpp's own converter makes it a GGUF that lies beside those of its base.

Every GGUF of the base names that file (``quantool.adapter``), so that whatever loads one to judge it adds the adapter.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantool.errors import DependencyError, QuantizationError, SourceError
from quantool.formats.safetensors import INDEX
from quantool.ledger import ArtifactTensor, Fate, TensorLine
from quantool.origins import Prepared
from quantool.plugins.contract import Job
from quantool.records import FileRecord, Source, file_record
from quantool.runtime import process, toolchain
from quantool.runtime.worker import Report, preloaded
from quantool.runtime.workspace import written
from quantool.source.adapter import CONFIG, MERGE_IT, WEIGHTS, LoraAdapter, LowRank
from quantool.source.mtp import head_tensors
from quantool.source.prepare import preparation_for

TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Dtype of an adapter to the converter's type that holds it exactly."""
SHARDS = (".safetensors", INDEX)


def apart(source: Source) -> Prepared | None:
    """How the source was prepared, where its adapter stays a file of its own."""
    return source.prepared if source.prepared is not None and source.prepared.apart else None


def adapter_file(name: str) -> str:
    """The adapter's file for models called ``name``. Small letters: ``-hf`` without a tag takes the first name there is."""
    return f"{name}-lora.gguf"


def kind_of(adapter: LoraAdapter) -> str:
    """The dtype that holds all of its matrices: that of them all, else float32."""
    dtypes = {matrix.dtype for pair in adapter.added.values() for matrix in (pair.a, pair.b)}
    (dtype,) = dtypes if len(dtypes) == 1 else ("F32",)
    return dtype if dtype in TYPES else "F32"


def alpha_of(adapter: LoraAdapter) -> float:
    """``adapter.lora.alpha``, which llama.cpp divides by each matrix' rank; SourceError where no single one is right."""
    alphas = {round(pair.scale * pair.a.shape[0], 9) for pair in adapter.added.values()}
    if len(alphas) > 1:
        raise SourceError(
            f"merge: false: the adapter has {len(alphas)} values of alpha, a GGUF adapter holds one",
            hint="leave merge out: merged weights hold any",
        )
    return next(iter(alphas))


def require_separable(source: Source, prepared: Prepared) -> LoraAdapter:
    """The adapter, read from headers; SourceError for one that llama.cpp's format does not hold, or whose base it cannot be added to."""
    adapter = preparation_for(prepared).adapter
    if adapter is None:
        raise AssertionError
    whole = [*adapter.replaced, *(name for name, pair in adapter.added.items() if pair.transposed)]
    problem = (
        f"the base is {prepared.form}"
        if prepared.form
        else f"the adapter changes {whole[0]} as a whole"
        if whole
        else "DoRA gives rows a length, which a GGUF adapter does not hold"
        if any(pair.magnitude for pair in adapter.added.values())
        else f"{source.name} is for {source.facts.task.kind}, and engines here add adapters to text generation alone"
        if not source.facts.task.generates
        else "its head for further tokens would draft for the base"
        if head_tensors(preparation_for(prepared).headers, source.facts.layers)
        else ""
    )
    if problem:
        raise SourceError(
            f"merge: false: {problem}", hint="leave merge out: the adapter is merged into the weights"
        )
    alpha_of(adapter)
    return adapter


def lines(
    source: Source, made_of: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[TensorLine]:
    """A line for each tensor of the adapter's file, by the converter's rehearsal on the base: what each tensor is made of, its shape.

    Raises SourceError as ``require_separable`` does, and for weights that llama.cpp joins with others.
    """
    prepared = apart(source)
    if prepared is None:
        return
    adapter = require_separable(source, prepared)
    dtype = kind_of(adapter)
    for target, pair in adapter.added.items():
        names = [name for name, origins in made_of.items() if target in origins]
        if not names or any(len(made_of[name]) > 1 for name in names):
            raise SourceError(
                f"merge: false: llama.cpp has no tensor of {target} alone",
                hint=f"leave merge out, or {MERGE_IT}",
            )
        for name in names:
            yield from _pair(name, shapes[name], pair, dtype)


def _pair(name: str, shape: tuple[int, ...], pair: LowRank, dtype: str) -> Iterator[TensorLine]:
    rank = pair.a.shape[0]
    for end, held, origin in (("a", (rank, shape[-1]), pair.a), ("b", (shape[0], rank), pair.b)):
        to = ArtifactTensor(name=f"{name}.lora_{end}", dtype=dtype, shape=held)
        yield TensorLine(name="", fate=Fate.ADDED, to=(to,), reason=f"{origin.name} of the adapter")


def base_model(source: Source, prepared: Prepared, folder: Path) -> Path:
    """``folder`` with links: the small files of the (merged) source beside the base's own weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept = [(source.folder, file.name) for file in source.files if not file.name.endswith(SHARDS)]
    kept += [
        (prepared.origin.folder, file.name) for file in prepared.origin.files if file.name.endswith(SHARDS)
    ]
    for place, name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to((place / name).resolve())
    return folder


def script_of(tools: toolchain.Toolchain) -> Path:
    """llama.cpp's converter of adapters; DependencyError for a toolchain that an older quantool installed."""
    script = tools.folder / toolchain.ADAPTER_CONVERTER
    if not script.is_file():
        raise DependencyError(f"{tools.origin} has no {script.name}", hint="run `quantool toolchain install`")
    return script


def convert(
    source: Source, prepared: Prepared, model: Path, output: Path, tools: toolchain.Toolchain, log: Path
) -> None:
    """Write the adapter of a source to ``output``; ``model`` is ``base_model``'s folder. Raises DependencyError without the script."""
    script = script_of(tools)
    adapter = require_separable(source, prepared)
    if prepared.adapter is None:
        raise AssertionError
    request = {
        "script": str(script),
        "adapter": str(prepared.adapter.folder),
        "alpha": alpha_of(adapter),
        "model": str(model),
        "output": str(output),
        "type": TYPES[kind_of(adapter)],
    }
    process.call(write_adapter, request, log=log)


@preloaded("transformers")
def write_adapter(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: run llama.cpp's ``script`` on the folder ``adapter``, whose base is ``model``; writes ``output`` as ``type``.

    Its configuration is given anew, with ``alpha`` alone: the script knows nothing of rank-stabilized adapters.
    """
    del report  # seconds
    output = Path(request["output"])
    folder = output.with_name("adapter")
    folder.mkdir()
    settings = json.loads((Path(request["adapter"]) / CONFIG).read_text(encoding="utf-8"))
    settings = {
        "lora_alpha": request["alpha"],
        "base_model_name_or_path": settings.get("base_model_name_or_path"),
    }
    (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    (folder / WEIGHTS).symlink_to((Path(request["adapter"]) / WEIGHTS).resolve())
    os.environ.pop("NO_LOCAL_GGUF", None)
    sys.path.insert(0, str(Path(request["script"]).parent))
    sys.argv = [
        request["script"],
        "--base",
        request["model"],
        "--outfile",
        str(output),
        "--outtype",
        request["type"],
        str(folder),
    ]
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except (SystemExit, AssertionError, ValueError, LookupError, NotImplementedError) as error:
        raise QuantizationError(
            f"llama.cpp cannot convert the adapter: {type(error).__name__}: {error}"
        ) from error
    finally:
        shutil.rmtree(folder)
    return {}


def placed(job: Job, base: Path) -> tuple[FileRecord, ...]:
    """The adapter in the folder to publish, copied from beside ``base``; nothing where it is merged."""
    if apart(job.plan.source) is None:
        return ()
    (made,) = base.parent.glob(adapter_file("*"))
    target = job.folder / made.name
    with job.workspace.alone([made.name]):  # levels are made side by side
        if not target.is_file() or file_record(base.parent, made.name) != file_record(job.folder, made.name):
            with written(target) as part:
                shutil.copyfile(made, part)
    return (file_record(job.folder, made.name),)
