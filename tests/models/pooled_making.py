"""Artifacts of the models that make one vector or a few logits, made once a session, and cases that judge damaged copies."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import making
import pooled_structures
import tampering
from making import shared

from quantool import gates
from quantool.config.schema import Config
from quantool.plugins.contract import Case
from quantool.records import Finding, Source
from quantool.runtime.workspace import Workspace

EMBEDDING = "embedding"
VALIDATION = {
    "context": 128,
    "max_tokens": 4096,
    "corpora": [{"name": "docs", "path": str(making.TEXT / "heldout.en.txt")}],
}


@shared
def checkpoint(name: str) -> Path:
    """``embedding`` (the trained one) or a structure of ``pooled_structures``."""
    if name == EMBEDDING:
        return pooled_structures.EMBEDDING
    written: Path = getattr(pooled_structures, f"write_{name}")(making.room() / name)
    return written


def settings(name: str, method: str, level: str, output: Path, **keys: Any) -> Config:
    """A configuration for one output of a model."""
    options = {"pre_tokenizer": "roberta-bpe"} if name.startswith("roberta") else {}
    options = {"pre_tokenizer": "qwen2"} if name == EMBEDDING else options
    return Config.model_validate(
        {
            "model_id": str(checkpoint(name)), "output_path": str(output), "method": method, "quant_level": level,
            "quantization_config": options if method == "gguf" else {}, "validation": VALIDATION,
        }
        | keys
    )  # fmt: skip


@shared
def gguf(name: str, level: str = "Q8_0") -> Path:
    """The GGUF of a model, made by the method of that name."""
    with making.own_cache():
        _, (artifact,) = making.make(settings(name, "gguf", level, making.room() / f"gguf-{name}-{level}"))
    return artifact.folder / artifact.files[0].name


@shared
def fp8(name: str) -> Path:
    """The folder of a model at FP8_DYNAMIC."""
    _, (artifact,) = making.make(settings(name, "fp8", "FP8_DYNAMIC", making.room() / f"fp8-{name}"))
    return artifact.folder


@cache
def _case(name: str) -> Case:
    """Of this process alone: the reference is computed once."""
    config = settings(name, "gguf", "Q8_0", making.room())
    source: Source = tampering.source_of(checkpoint(name))
    room = tampering._room() / f"pooled-{name}"
    kind = source.facts.task.kind
    return Case(Path(), "", "t/x", source, config, gates.default_gates("Q8_0", kind), Workspace(room))


def findings(check: str, name: str, artifact: Path) -> dict[str, Finding]:
    """What a check finds in an artifact of a model, by metric."""
    engine = "transformers" if artifact.is_dir() else "llama.cpp"
    label = f"{artifact.parent.name}/{artifact.name}"
    level = "FP8" if artifact.is_dir() else "Q8_0"
    limits = gates.resolve(level, {}, tampering.source_of(checkpoint(name)).facts.task.kind)
    chosen = replace(_case(name), artifact=artifact, engine=engine, name=label, gates=limits)
    found = tampering.findings(check, chosen)
    return {metric.partition(":")[0]: finding for metric, finding in found.items()}


def copied(folder: Path, target: Path) -> Path:
    """A copy of a folder, to be damaged."""
    shutil.copytree(folder, target)
    return target
