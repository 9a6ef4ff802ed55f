"""The importance matrix of a run: computed once from the calibration text, or the user's own, in the folder to publish."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quantool.config.schema import Config
from quantool.errors import ConfigError, QuantizationError
from quantool.formats.json_file import read_json
from quantool.gates import MIN_EXPERT_TOKENS
from quantool.methods._llama_cpp import base_file
from quantool.methods._llama_cpp.importance import imatrix_collect
from quantool.methods._llama_cpp.importance.imatrix_file import read_matrix
from quantool.plugins.contract import Job, Request
from quantool.plugins.keys import Depends, key_of
from quantool.records import FileRecord, Source, file_record, sha256_of
from quantool.runtime import process
from quantool.runtime.gpus import NO_GPU, devices
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace, written
from quantool.source.experts import coverage_note
from quantool.texts import inputs

IMATRIX_CONTEXT = 512  # llama-imatrix's default (0c1e570, tools/imatrix/imatrix.cpp)
IMATRIX_TOKENS = 1 << 18
TEXT = Depends(
    fields=("split", "sample_size", "shuffle", "dataset_seed", "calibration_config"),
    inputs=(inputs.calibration_by_name,),
    libraries=("datasets", "transformers", "tokenizers"),
)
"""The token ids of the calibration text."""
MATRIX = Depends(fields=("device",), libraries=("llama-cpp-python", "numpy"))
"""A computed importance matrix; its text counts by the hash of the ids, and by its name, which the file holds."""


def label(config: Config) -> str:
    """Name of the calibration text, as the files' metadata has it; ConfigError when the configuration names none."""
    if config.dataset_path is not None:
        return config.dataset_path.name
    if config.dataset_id is not None:
        return config.dataset_id
    raise ConfigError(
        "imatrix: true needs calibration text, and the configuration names none",
        hint="set dataset_path (a .txt, .jsonl or .parquet file) or dataset_id",
    )


def file_name(stem: str) -> str:
    """Name of the published matrix."""
    return f"{stem}-imatrix.gguf"


def key_bytes(stem: str, text: str) -> int:
    """Bytes of the ``quantize.imatrix.*`` keys that a level carries: key, type and value; ``text`` is the label."""
    strings = {"quantize.imatrix.file": file_name(stem), "quantize.imatrix.dataset": text}
    size = sum(8 + len(key) + 4 + 8 + len(value.encode()[:127]) for key, value in strings.items())
    return size + sum(8 + len(f"quantize.imatrix.{key}") + 4 + 4 for key in ("entries_count", "chunks_count"))


def metadata_bytes(wanted: bool | Path, config: Config, stem: str) -> int:
    """``key_bytes`` of what a level will carry; ``wanted`` is the option ``imatrix``."""
    if isinstance(wanted, Path):
        return key_bytes(stem, read_matrix(wanted).label)
    return key_bytes(stem, label(config)) if wanted else 0


def known_text(config: Config, source: Source, workspace: Workspace) -> str | None:
    """The hash of the calibration ids, when an earlier run left them."""
    ids = workspace.recall("imatrix-ids", text_key(config, source))
    return None if ids is None else str(ids["sha256"])


def known_key(
    wanted: bool | Path, config: Config, source: Source, base_key: str, workspace: Workspace
) -> str | None:
    """The key that ``matrix`` will answer, when that can be told before the work: empty where none is wanted."""
    if wanted is False:
        return ""
    if isinstance(wanted, Path):
        return sha256_of(wanted)
    ids = known_text(config, source, workspace)
    return None if ids is None else _matrix_key(config, source, base_key, ids)


def matrix(
    job: Job, options: base_file.GgufOptions, wanted: bool | Path, kind: str, progress: Progress
) -> tuple[tuple[FileRecord, str] | None, str]:
    """The matrix in the folder to publish, its text's label, and the key of both; None where not wanted.

    ``wanted`` is the option ``imatrix``; ``kind`` the type of the base that activations are collected on.
    """
    if wanted is False:
        return None, ""
    target = job.folder / file_name(job.output.files[0].name.rpartition(f"-{job.output.level}")[0])
    if isinstance(wanted, Path):
        digest = sha256_of(wanted)
        if not target.is_file() or sha256_of(target) != digest:
            with written(target) as part:  # no link: the user's file may change, the published one must not
                shutil.copyfile(wanted, part)
        return (file_record(job.folder, target.name), read_matrix(wanted).label), digest
    result, key = _computed(job, options, kind, target, progress)
    return (FileRecord.model_validate(result["file"]), result["label"]), key


def _token_limit(config: Config) -> int:
    return int(str((config.calibration_config or {}).get("max_tokens") or IMATRIX_TOKENS))


def tokens_at_most(config: Config) -> int:
    """Tokens of calibration text that are run: a text file cannot have more than it has bytes, usually a quarter."""
    limit = _token_limit(config)
    path = config.dataset_path
    if path is None or not path.is_file() or path.suffix == ".parquet":
        return limit
    return min(limit, path.stat().st_size // 4)


def coverage(request: Request) -> list[str]:
    """A warning when the matrix would see too few tokens for the experts that the model has."""
    limits = [request.gates(level).min_expert_tokens or MIN_EXPERT_TOKENS for level in request.levels]
    model = read_json(request.source.folder / "config.json")
    return coverage_note(model, tokens_at_most(request.config), max(limits, default=MIN_EXPERT_TOKENS))


def text_key(config: Config, source: Source) -> str:
    """The key of the calibration ids: weights do not change them."""
    return key_of(TEXT, source.without_weights(), IMATRIX_CONTEXT, config=config)


def _matrix_key(config: Config, source: Source, base_key: str, ids: str) -> str:
    """The key of a computed importance matrix; ``ids`` is the hash of its token ids."""
    return key_of(MATRIX, source, base_key, ids, label(config), config=config)


def calibration_ids(job: Job, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Token ids of the calibration text as an array in a file; made again only when text or tokenizer changed."""
    ids = job.workspace.work / "imatrix-ids.npy"
    source, workspace, config = job.plan.source, job.workspace, job.config
    limit = _token_limit(config)
    key = text_key(config, source)

    def produce() -> tuple[list[Path], dict[str, Any]]:
        request = {
            "config": config.model_dump(mode="json"),
            "model": str(source.folder),
            "context": IMATRIX_CONTEXT,
            "max_tokens": limit,
        }
        log = workspace.logs / "imatrix.log"
        with written(ids) as part, progress.bar("tokenize calibration text", "tok") as bar:
            request["output"] = str(part)
            result = process.call(imatrix_collect.tokenize, request, log=log, bar=bar)
        return [ids], result

    return ids, workspace.stage("imatrix-ids", key, produce)


def _computed(
    job: Job, options: base_file.GgufOptions, kind: str, target: Path, progress: Progress
) -> tuple[dict[str, Any], str]:
    """Collect activations of the calibration text on the base; skipped when both are unchanged."""
    workspace, config = job.workspace, job.config
    ids, text = calibration_ids(job, progress)
    name = label(config)
    source = job.plan.source
    key = _matrix_key(config, source, base_file.base_key(source, options, kind), text["sha256"])

    def produce() -> tuple[list[Path], dict[str, Any]]:
        base, _ = base_file.base(job, options, kind, progress)
        wanted = devices(config.device)
        on_gpu = wanted.kind == "cuda"
        request = {"base": str(base), "ids": str(ids), "label": name, "gpu": on_gpu}
        with written(target) as part, progress.bar("importance matrix", "tok") as bar:
            request["output"] = str(part)
            log = workspace.logs / "imatrix.log"
            variables = wanted.variables() if on_gpu else NO_GPU
            result = process.call(imatrix_collect.collect, request, log=log, bar=bar, variables=variables)
        return [target], {
            "file": file_record(job.folder, target.name).model_dump(),
            "label": name,
            **text,
            **result,
        }

    result = workspace.stage("imatrix", key, produce)
    if not result["entries"]:
        raise QuantizationError("the importance matrix is empty")
    return result, key
