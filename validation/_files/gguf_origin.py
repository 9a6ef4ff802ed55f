"""What a GGUF was made from, as far as it says: its importance matrix and its source."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.gguf_keys import COMMIT, UNREAD, WEIGHTS, weights_sha256
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import some
from quantool.plugins.contract import Case
from quantool.records import Finding
from quantool.validation._files.gguf_file import LAYER, MATRIX_FILE, Header
from quantool.validation._files.gguf_levels import FLOATS, class_of, is_matrix, options_of
from quantool.validation._findings.builder import FindingBuilder

DATASET, ENTRIES, CHUNKS = (f"quantize.imatrix.{key}" for key in ("dataset", "entries_count", "chunks_count"))
LONGEST = 127
"""Bytes of a text in ``llama_model_kv_override``."""
RECORD = "quantool.json"


def judge_matrix(case: Case, header: Header, build: FindingBuilder) -> list[Finding]:
    """An importance matrix was used where the plan asks for one, and it is this model's.

    Nothing to say of a file without a plan that carries no sign of one.
    """
    keys = header.keys
    present = keys.get(MATRIX_FILE)
    wanted = options_of(case).get("imatrix") if case.output is not None else None
    if present is None and not wanted:
        return []
    problems = []
    if present is None:
        problems.append(f"the plan asks for an importance matrix, the file has no {MATRIX_FILE}")
    elif case.output is not None and not wanted:
        problems.append(f"the plan asks for no importance matrix, the file was made with {present}")
    if present is not None:
        problems += _entries(header, case.source.facts.layers)
        problems += _covered(header)
        problems += _text(case, header, wanted)
    measured = f"{present}: {keys.get(ENTRIES)} weights, {keys.get(DATASET)}" if present else "none"
    return [build.fact("imatrix", measured, "; ".join(problems))]


def _entries(header: Header, layers: int) -> list[str]:
    """The number of weights that the matrix had is one that this model can have.

    llama-imatrix collects what is multiplied: the matrices of the ``layers``, routers too, and the output head if asked.
    A multi-token-prediction head behind the layers is not run.
    """
    count = header.keys.get(ENTRIES)
    if not isinstance(count, int):
        return [f"{ENTRIES} is missing"]
    most = sum(len(tensor.shape) >= 2 for tensor in header.tensors)
    run = [
        tensor
        for tensor in header.tensors
        if (matched := LAYER.match(tensor.name)) and int(matched[1]) < layers and is_matrix(tensor)
    ]
    least = sum(tensor.type not in FLOATS for tensor in run if class_of(tensor.name) != "experts")
    if count > most:
        return [f"the importance matrix is of another model: {count} weights, this one has {most} matrices"]
    if count < least:
        return [
            f"the importance matrix covers {count} weights, {least} are quantized: it is of another model"
        ]
    return []


def _covered(header: Header) -> list[str]:
    """The matrix that lies beside the file is the one it was made with, and fits its tensors."""
    if header.matrix is None:
        return []
    problems = []
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    wrong = [
        name
        for name, columns in header.matrix.items()
        if name not in shapes or columns != math.prod(shapes[name][:-2]) * shapes[name][-1]
    ]
    if wrong:
        problems.append(
            f"{header.keys[MATRIX_FILE]} beside the file is of another model: it has {some(wrong)}, "
            "with another shape or not among the file's tensors"
        )
    if len(header.matrix) != header.keys.get(ENTRIES):
        problems.append(
            f"{header.keys[MATRIX_FILE]} has {len(header.matrix)} weights, the file says {header.keys.get(ENTRIES)}"
        )
    for theirs, ours in (("imatrix.datasets", DATASET), ("imatrix.chunk_count", CHUNKS)):
        value = header.matrix_keys.get(theirs)
        value = _cut(value[0]) if isinstance(value, list) and value else value
        if value is not None and header.keys.get(ours) is not None and value != header.keys[ours]:
            problems.append(f"{ours} is {header.keys[ours]!r}, the matrix beside the file says {value!r}")
    return problems


def _cut(text: object) -> str:
    return str(text).encode()[:LONGEST].decode("utf-8", "ignore")


def _text(case: Case, header: Header, wanted: object) -> list[str]:
    """A matrix that the run computed itself is of the calibration text of the configuration."""
    if wanted is not True:
        return []
    config = case.config
    text = config.dataset_path.name if config.dataset_path else config.dataset_id
    found = header.keys.get(DATASET)
    if text is None or found == _cut(text):
        return []
    return [f"{DATASET} is {found!r}, the calibration text is {text!r}"]


def judge_source(case: Case, keys: Mapping[str, Any], build: FindingBuilder) -> Finding:
    """The checkpoint that the artifact was made from is the one that it is compared with: its commit, its weights."""
    folder = case.artifact if case.artifact.is_dir() else case.artifact.parent
    recorded = {name: str(keys[name]) for name in (COMMIT, WEIGHTS) if keys.get(name) not in (None, UNREAD)}
    where = "the file"
    if not recorded and case.output is None:
        recorded, where = _recorded(folder / RECORD), RECORD
    commit, weights = case.source.commit, weights_sha256(case.source)
    if case.output is not None and case.engine != "llama.cpp":
        # The plan that made the folder holds the source; where a local one lies is nobody's business.
        return build.fact("source_commit", case.source.label() if commit else case.source.name)
    if not recorded:
        return build.skip("source_commit", f"{where} does not say which checkpoint it was made from")
    problems = []
    if commit is not None and recorded.get(COMMIT, commit) != commit:
        problems.append(f"{where} was made from commit {recorded[COMMIT]}, the reference is {commit}")
    if weights is not None and recorded.get(WEIGHTS, weights) != weights:
        problems.append(
            f"{where} was made from weights {recorded[WEIGHTS][:12]}…, the reference's are {weights[:12]}…: "
            "another checkpoint, or another commit of it"
        )
    measured = recorded.get(COMMIT) or recorded[WEIGHTS]
    return build.fact("source_commit", measured, "; ".join(problems), commit or weights)


def _recorded(path: Path) -> dict[str, str]:
    """The source in the record of a packed folder, as keys of a GGUF."""
    if not path.is_file():
        return {}
    try:
        source = read_json(path)["plan"]["source"]
        hashes = [file["sha256"] for file in source["files"] if file["name"].endswith(".safetensors")]
        commit = source["commit"]
    except (SourceError, KeyError, TypeError, AttributeError, json.JSONDecodeError):
        return {}  # not a record of ours
    found = {COMMIT: str(commit)} if commit else {}
    if hashes and all(hashes):
        from quantool.records import fingerprint

        found[WEIGHTS] = fingerprint(sorted(hashes))
    return found
