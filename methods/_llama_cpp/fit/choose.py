"""The types of one fitted file: from its recipe, or by a search whose measurements and result are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantool.errors import QuantizationError
from quantool.formats.gguf_header import read_header
from quantool.formats.tensor_types import ENDING, pattern, write_recipe
from quantool.gates import stock_level
from quantool.methods._llama_cpp import dry_run
from quantool.methods._llama_cpp.fit import costs, outline, search, yardstick
from quantool.methods._llama_cpp.fit.live_model import NO_REUSE
from quantool.methods._llama_cpp.fit.outline import Room
from quantool.methods._llama_cpp.importance import imatrix
from quantool.methods._llama_cpp.level_plan import dry_runs
from quantool.methods._llama_cpp.options import LevelOptions
from quantool.plugins.contract import Job
from quantool.plugins.keys import Depends, key_of
from quantool.records import FileRecord, Source, file_record, fingerprint, sha256_of
from quantool.runtime import process
from quantool.runtime.gpus import NO_GPU
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import write_text

SEARCH = Depends(libraries=("llama-cpp-python", "numpy", "torch"))
"""Measured costs and chosen types; base, matrix and text count by their keys."""
CODE = (
    "candidates.py",
    "costs.py",
    "live_model.py",
    "outline.py",
    "search.py",
    "yardstick.py",
    "../../_fit/allocation.py",
)
"""Files, beside this one, that decide what is measured and chosen."""


@dataclass(frozen=True)
class Chosen:
    """``tensor_types`` as the quantizer takes them, expression to type; ``found``: how the search went, for the record."""

    tensor_types: dict[str, str]
    types: dict[str, str]
    """Every tensor that is no float32, by name."""
    found: dict[str, Any]


@dataclass(frozen=True)
class WrittenRecipe:
    """The recipe beside a finished file, and what the file's record says of it."""

    file: FileRecord
    details: dict[str, Any]
    bits_per_weight: float


def choice_key(options: LevelOptions, text: str) -> str:
    """What a fitted file depends on beside base, matrix and level; ``text`` is the hash of the calibration ids."""
    (target,) = options.fit
    if target.recipe is not None:
        return sha256_of(target.recipe)
    code = [sha256_of(Path(__file__).parent / name) for name in CODE]
    return fingerprint(target, text, code)


def choose(
    job: Job,
    options: LevelOptions,
    base: Path,
    keys: tuple[str, str],
    matrix: Path | None,
    progress: Progress,
) -> Chosen:
    """The types of a fitted file.

    ``keys`` are those of base and importance matrix; ``options.fit`` has one entry. Raises QuantizationError for a goal that
    no choice reaches, ConfigError for a file that would have to be split.
    """
    (target,) = options.fit
    source, stock = job.plan.source, stock_level(job.output.level)
    kind = base.parent.name.partition("-")[2]
    rehearsal = dry_run.rehearse(source, options, kind)
    stem = job.output.files[0].name.rpartition(f"-{job.output.level}")[0]
    extra = imatrix.metadata_bytes(options.imatrix, job.config, stem)
    if target.recipe is not None:
        given = outline.recipe_types(target, rehearsal)
        settings = options.settings() | {"tensor_types": options.tensor_types | given}
        (run,) = dry_runs(rehearsal, {stock: settings}, imatrix=bool(options.imatrix))
        return Chosen(options.tensor_types | given, _quantized(run["types"]), {})
    types = outline.stock_types(rehearsal, options)[stock]
    room = outline.room_of(rehearsal, options, stock, types, extra)
    request = _request(job, base, matrix, progress)
    measured = _measured(job, room, request, keys, progress)
    room = _without(room, measured["unread"], rehearsal)
    budget = outline.budget_of(target, source, rehearsal, room)
    found = _searched(job, options, room, request | {"costs": measured["costs"]}, budget, keys, progress)
    chosen = {name: str(one) for name, one in found["types"].items()}
    size = outline.stock_bytes(rehearsal, types | chosen, extra)
    if budget is not None and size > budget:
        raise QuantizationError(
            f"fit: {target.describe()}: the chosen types take {size:,} bytes, {budget:,} are allowed"
        )
    outline.refuse_split(target, size, options.split_bytes())
    own = {pattern(name): one for name, one in chosen.items()}
    details = {key: found[key] for key in ("predicted", "measured", "bound", "rounds")}
    if target.kld is not None:
        details["kld"] = target.kld
    return Chosen(
        options.tensor_types | own, _quantized(types | chosen), details | {"unread": measured["unread"]}
    )


def _quantized(types: Mapping[str, str]) -> dict[str, str]:
    return {name: kind.lower() for name, kind in types.items() if kind.lower() != "f32"}


def write_types(job: Job, name: str, chosen: Chosen) -> WrittenRecipe:
    """Leave the types that the finished file ``name`` was to have beside it; QuantizationError where it has others."""
    header = read_header(job.folder / name)
    found = {tensor.name: tensor.type for tensor in header.tensors}
    for tensor, kind in chosen.types.items():
        if found.get(tensor) != kind:
            raise QuantizationError(f"{name}: {tensor} is {found.get(tensor)}, {kind} was chosen")
    file = f"{name.removesuffix('.gguf')}{ENDING}"
    write_text(job.folder / file, write_recipe(chosen.types))
    (target,) = LevelOptions.model_validate(job.output.options).fit
    details: dict[str, Any] = {"fit": target.describe(), "recipe": chosen.types, **chosen.found}
    bits = (
        8 * sum(tensor.bytes for tensor in header.tensors) / sum(tensor.elements for tensor in header.tensors)
    )
    return WrittenRecipe(file_record(job.folder, file), details, bits)


def _request(job: Job, base: Path, matrix: Path | None, progress: Progress) -> dict[str, Any]:
    """What both workers need; the calibration ids are there when it returns."""
    ids, text = imatrix.calibration_ids(job, progress)
    yardstick.require_text(int(text["windows"]))
    folder = job.workspace.work / "fit"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "base": str(base), "imatrix": None if matrix is None else str(matrix), "ids": str(ids), "folder": str(folder),
    }  # fmt: skip


def _measured(
    job: Job, room: Room, request: dict[str, Any], keys: tuple[str, str], progress: Progress
) -> dict[str, Any]:
    """The file of measured costs, and the matrices that cannot be measured."""
    source, workspace = job.plan.source, job.workspace
    tensors = {name: [*sizes] for name, sizes in room.sizes.items()}
    text = imatrix.known_text(job.config, source, workspace)
    key = _key(source, keys, text, tensors)
    path = Path(request["folder"]) / f"costs-{key[:32]}.jsonl"

    def produce() -> tuple[list[Path], dict[str, Any]]:
        with progress.bar("measure matrices", "matrices") as bar:
            result = process.call(
                costs.measure,
                request | {"costs": str(path), "tensors": tensors},
                log=workspace.logs / "fit.log",
                bar=bar,
                variables=NO_GPU | NO_REUSE,
            )
        return [path], {"unread": result["unread"]}

    result = workspace.stage(f"fit-costs-{key[:12]}", key, produce)
    return {"costs": str(path), "unread": list(result["unread"])}


def _searched(
    job: Job,
    options: LevelOptions,
    room: Room,
    request: dict[str, Any],
    budget: int | None,
    keys: tuple[str, str],
    progress: Progress,
) -> dict[str, Any]:
    (target,) = options.fit
    workspace, level = job.workspace, job.output.level
    asked = request | {
        "sizes": room.sizes,
        "budget": None if budget is None else budget - room.fixed,
        "kld": target.kld,
        "elements": sum(room.elements[name] for name in room.sizes),
    }
    text = imatrix.known_text(job.config, job.plan.source, workspace)
    key = _key(job.plan.source, keys, text, [asked["sizes"], asked["budget"], asked["kld"]])

    def produce() -> tuple[list[Path], dict[str, Any]]:
        with progress.bar(f"choose types of {level}", "files") as bar:
            log = workspace.logs / "fit.log"
            return [], process.call(search.search, asked, log=log, bar=bar, variables=NO_GPU | NO_REUSE)

    return workspace.stage(f"fit-{level}", key, produce)


def _key(source: Source, keys: tuple[str, str], text: str | None, part: Any) -> str:
    code = [sha256_of(Path(__file__).parent / name) for name in CODE]
    return key_of(SEARCH, source, keys, text, part, code)


def _without(room: Room, unread: list[str], rehearsal: dry_run.Rehearsal) -> Room:
    """The room in which matrices that nothing measures have the stock level's types."""
    left = {name: sizes for name, sizes in room.sizes.items() if name not in unread}
    added = sum(
        dry_run.padded_bytes(rehearsal.tensors[name], room.types[name])
        for name in room.sizes
        if name in unread
    )
    return replace(room, sizes=left, fixed=room.fixed + added)
