"""GGUF at every level that llama-quantize of the installed llama.cpp knows."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError, nearest
from quantool.formats.gguf_header import shard_names
from quantool.gates import stock_level
from quantool.methods._artifacts.files import finished, need_disk
from quantool.methods._llama_cpp import account, base_file, dry_run, level_files, level_plan, lora
from quantool.methods._llama_cpp.fit.choose import choice_key, choose, write_types
from quantool.methods._llama_cpp.fit.planned import Fitted, planned
from quantool.methods._llama_cpp.importance import imatrix
from quantool.methods._llama_cpp.importance.imatrix_file import check_matrix, expert_tokens, read_matrix
from quantool.methods._llama_cpp.level_plan import dry_runs
from quantool.methods._llama_cpp.mtp import head_pattern, require_types, with_head
from quantool.methods._llama_cpp.options import LevelOptions
from quantool.plugins.contract import Job, Outline, Request, method
from quantool.plugins.keys import Depends, key_of
from quantool.records import (
    Artifact,
    OutputPlan,
    PlannedFile,
    Source,
    StagePlan,
)
from quantool.runtime import machine, toolchain
from quantool.runtime.progress import Progress
from quantool.source.tensor_headers import headers as source_headers

GGUF = Depends(
    libraries=("llama-cpp-python",),
    without=("threads", "base_type", "imatrix", "llama_cpp_path", "max_shard_size"),
)
"""A level; the options left out count by the key of the base, that of the matrix, and where files are split."""
LOGITS_WINDOWS = 4
CORES = 4
"""For each level that is quantized at once."""
BY_LEVEL = "level"
IMATRIX_RAM = 400 << 20
"""Of the libraries, and of the activations of a batch."""


class Options(LevelOptions):
    """``quantization_config`` of the method gguf."""


def levels() -> dict[str, str]:
    """Levels of llama-quantize with its own one-line descriptions."""
    return {level.name: level.description for level in toolchain.levels().values()}


def outline(request: Request, options: Options) -> Outline:
    """Plan every level by llama.cpp's own dry run: exact sizes, and whether it needs an importance matrix."""
    source = request.source
    _validate(options)
    kind, note = base_file.choose_type(source, options.base_type)
    rehearsal = dry_run.rehearse(source, options, kind)
    _validate_names(rehearsal, options)
    levelled = {
        level: _with_head(source, options, level).model_copy(update={"fit": ()}) for level in request.levels
    }
    runs = dry_runs(
        rehearsal,
        {level: own.settings() for level, own in levelled.items()},
        imatrix=bool(options.imatrix),
    )
    _require_matrix(request.levels, runs, options)
    _require_head_types(rehearsal, request, options)
    stem = base_file.file_stem(source, options, str(rehearsal.keys["general.size_label"]))
    repo = request.repo_id.rpartition("/")[2] if request.repo_id else f"{source.name}-GGUF"
    extra = imatrix.metadata_bytes(options.imatrix, request.config, stem)
    outputs = []
    for level, run in zip(request.levels, runs, strict=True):
        if options.keep_split:
            sizes = dry_run.file_bytes(rehearsal, run["types"], extra)
        else:
            sizes = dry_run.split_bytes(rehearsal, run["types"], extra, options.split_bytes())
        names = shard_names(f"{stem}-{level}.gguf", len(sizes))
        outputs.append(
            OutputPlan(
                id=f"gguf/{level}",
                method="gguf",
                level=level,
                options=levelled[level].model_dump(mode="json"),
                engine="llama.cpp",
                repo=repo,
                repo_id=request.repo_id,
                files=tuple(PlannedFile(name=n, bytes=b) for n, b in zip(names, sizes, strict=True)),
                bits_per_weight=dry_run.bits_per_weight(rehearsal, run["types"]),
                peak_ram=level_plan.quantize_ram(rehearsal, run["types"]),
                operations=level_plan.operations(level) * rehearsal.elements(),
                gates=request.gates(level),
                done=_is_done(request, levelled[level], kind, level, names),
                needs=("base", "imatrix") if options.imatrix else ("base",),
            )
        )
    coverage = imatrix.coverage(request) if options.imatrix is True else []
    aliases = [
        f"level {name} is llama.cpp's {level.description}"
        for name, level in toolchain.levels().items()
        if name in request.levels and level.description.startswith("alias")
    ]
    fitted = _fitted(request, options, rehearsal, kind, (stem, repo))
    types = {output.id: run["types"] for output, run in zip(outputs, runs, strict=True)} | {**fitted.types}
    return Outline(
        (*outputs, *fitted.outputs),
        (*_stages(request, rehearsal, options, kind), *fitted.stages, *_splitting(outputs, options)),
        tuple(filter(None, (note, *dry_run.notes(rehearsal, source), *aliases, *coverage, *fitted.notes))),
        {name: account.lines(source, rehearsal, own) for name, own in types.items()},
    )


def _fitted(
    request: Request, options: Options, rehearsal: dry_run.Rehearsal, kind: str, names: tuple[str, str]
) -> Fitted:
    """The files whose types are chosen; ``names`` are the stem of their names and their folder."""
    if not options.fit:
        return Fitted((), (), {})

    def done(own: LevelOptions, level: str, files: list[str]) -> bool:
        return _is_done(request, own, kind, level, files)

    return planned(request, _with_head(request.source, options, "Q4_K_M"), rehearsal, names, done)


def _splitting(outputs: list[OutputPlan], options: Options) -> list[StagePlan]:
    """What splitting needs on disk for a while, beside the parts: as much as the largest one."""
    needs = {
        output.id: level_files.temporary([file.bytes for file in output.files], keep_split=options.keep_split)
        for output in outputs
    }
    if not any(needs.values()):
        return []
    done = all(output.done for output in outputs if needs[output.id])
    return [StagePlan(name="gguf/split", writes=max(needs.values()), peak_ram=100 << 20, done=done)]


def _level_key(
    source: Source,
    options: LevelOptions,
    kind: str,
    level: str,
    matrix: str,
    names: list[str],
    text: str = "",
) -> str:
    """The key of a level; ``matrix`` is that of the importance matrix, ``text`` the hash of what types are chosen by."""
    return key_of(
        GGUF, source, base_file.base_key(source, options, kind), toolchain.levels()[stock_level(level)].ftype, level, matrix,
        names, options.split_bytes() if len(names) > 1 and not options.keep_split else 0,
        *([choice_key(options, text)] if options.fit else ()),
        options=options,
    )  # fmt: skip


def _is_done(request: Request, options: LevelOptions, kind: str, level: str, names: list[str]) -> bool:
    source, workspace = request.source, request.workspace
    matrix = _known_matrix(request, options, kind)
    text = imatrix.known_text(request.config, source, workspace) if _searches(options) else ""
    if matrix is None or text is None:
        return False
    key = _level_key(source, options, kind, level, matrix, names, text)
    return workspace.recall(f"gguf/{level}", key) is not None


def _is_made(job: Job, kind: str, matrix: str) -> bool:
    own = Options.model_validate(job.output.options)
    text = imatrix.known_text(job.config, job.plan.source, job.workspace) if _searches(own) else ""
    if text is None:
        return False
    names = [file.name for file in job.output.files]
    key = _level_key(job.plan.source, own, kind, job.output.level, matrix, names, text)
    return job.workspace.recall(job.output.id, key) is not None


def _searches(options: LevelOptions) -> bool:
    """Whether an output's types are chosen by measuring."""
    return any(target.recipe is None for target in options.fit)


def _known_matrix(request: Request, options: LevelOptions, kind: str) -> str | None:
    """Key of the importance matrix as far as earlier work tells; None while the weights have not been hashed."""
    source = request.source
    if not all(file.sha256 for file in source.files):
        return None
    base_key = base_file.base_key(source, options, kind)
    return imatrix.known_key(options.imatrix, request.config, source, base_key, request.workspace)


def _validate(options: Options) -> None:
    from quantool.methods._llama_cpp.quantize import ggml_type

    single = (options.output_tensor_type, options.token_embedding_type, _head_type(options))
    for name in (*options.tensor_types.values(), *single):
        if name is not None:
            ggml_type(name)
    for pattern in options.tensor_types:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"tensor_types: {pattern!r} is no regular expression: {error}") from error
    if isinstance(options.imatrix, Path) and not options.imatrix.is_file():
        raise ConfigError(f"imatrix: {options.imatrix} does not exist")
    options.split_bytes()


def _validate_names(rehearsal: dry_run.Rehearsal, options: Options) -> None:
    """Refuse what llama.cpp would pass over without a word: a pattern that no tensor has, another model's matrix."""
    for pattern in options.tensor_types:
        if not any(re.search(pattern.lower(), name) for name in rehearsal.tensors):
            layers = sorted({re.sub(r"blk\.\d+\.", "", name) for name in rehearsal.tensors})
            raise ConfigError(
                f"tensor_types: {pattern!r} matches no tensor of this model",
                hint=nearest(pattern, layers) or f"its tensors: {', '.join(layers)}",
            )
    if isinstance(options.imatrix, Path):
        shapes = {name: tensor.shape for name, tensor in rehearsal.tensors.items()}
        check_matrix(options.imatrix, shapes)


def _head_type(options: Options) -> str | None:
    """The head's own ggml type; None where it has the level's."""
    return None if options.mtp_type == BY_LEVEL else options.mtp_type


def _with_head(source: Source, options: Options, level: str) -> Options:
    """The options of a level, a multi-token-prediction head among its ``tensor_types``; so they stand in the plan."""
    types = with_head(
        options.tensor_types, head_pattern(source, source_headers(source)), _head_type(options), level
    )
    return options.model_copy(update={"tensor_types": types})


def _require_matrix(names: tuple[str, ...], runs: list[dict[str, Any]], options: Options) -> None:
    missing = [name for name, run in zip(names, runs, strict=True) if run["needs_imatrix"]]
    if missing and not options.imatrix:
        raise ConfigError(
            f"{', '.join(missing)} cannot be made without an importance matrix",
            hint="set quantization_config.imatrix: true and calibration text (dataset_path), or a path",
        )


def _require_head_types(rehearsal: dry_run.Rehearsal, request: Request, options: Options) -> None:
    """Refuse a head at a level whose type needs an importance matrix of it, which llama.cpp says when it has none."""
    pattern = head_pattern(request.source, source_headers(request.source))
    if pattern is None or _head_type(options) is not None:
        return
    runs = dry_runs(rehearsal, dict.fromkeys(request.levels, options.settings()), imatrix=False)
    for level, run in zip(request.levels, runs, strict=True):
        head = [name for name in run["types"] if re.search(pattern, name)]
        require_types(level, head, needs_matrix=run["needs_imatrix"])


def _stages(
    request: Request, rehearsal: dry_run.Rehearsal, options: Options, kind: str
) -> tuple[StagePlan, ...]:
    source, workspace = request.source, request.workspace
    base_bytes = sum(dry_run.file_bytes(rehearsal, {n: t.type for n, t in rehearsal.tensors.items()}, 0))
    stages = [base_file.base_stage(request, kind, base_bytes, dry_run.conversion_ram(rehearsal), options)]
    if options.imatrix is True:
        logits = 4 * source.facts.vocabulary * imatrix.IMATRIX_CONTEXT * LOGITS_WINDOWS
        columns = sum(8 * t.shape[-1] for t in rehearsal.tensors.values())
        matrix = _known_matrix(request, options, kind)
        done = matrix is not None and workspace.recall("imatrix", matrix) is not None
        tokens = imatrix.tokens_at_most(request.config)
        stages.append(
            StagePlan(
                name="imatrix",
                writes=columns,
                peak_ram=base_bytes + logits + IMATRIX_RAM,
                operations=2.0 * source.facts.parameters * tokens,
                done=done,
            )
        )
    return tuple(stages)


def levels_at_once(waiting: int, cores: int, free: int, peak: int) -> int:
    """How many levels are quantized side by side: llama.cpp reads and writes on one core while the others wait.

    Each gets threads for all cores, which are there for a part of a tensor only: the last level then has them all. Where
    there are few cores they are busy with one, and memory is for half of what is ``free`` bytes, ``peak`` for each.
    """
    return max(1, min(waiting, cores // CORES, free // 2 // max(1, peak)))


def at_once(jobs: Sequence[Job], options: Options, progress: Progress) -> int:
    """Make base and matrix, then say how many levels may be quantized at the same time; split ones are not."""
    first = jobs[0]
    source, workspace = first.plan.source, first.workspace
    kind, _ = base_file.choose_type(source, options.base_type)
    _, matrix = imatrix.matrix(first, options, options.imatrix, kind, progress)
    waiting = [job.output for job in jobs if not _is_made(job, kind, matrix)]
    if not waiting:
        return 1
    base_file.base(first, options, kind, progress)
    if len(waiting) < 2 or any(len(job.output.files) > 1 for job in jobs):
        return 1
    need_disk(workspace, sum(file.bytes for output in waiting for file in output.files))
    peak = max(output.peak_ram for output in waiting)
    return levels_at_once(len(waiting), machine.cores(), machine.free_ram(), peak)


@method(
    "gguf",
    options=Options,
    levels=levels,
    outline=outline,
    needs=("llama_cpp", "gguf"),
    depends=GGUF | base_file.BASE | imatrix.TEXT | imatrix.MATRIX,
    at_once=at_once,
    adapters=True,
)
def quantize(job: Job, options: Options, progress: Progress) -> Artifact:
    """Make one level: to a temporary file, loaded once, then renamed."""
    source, output, workspace = job.plan.source, job.output, job.workspace
    kind, note = base_file.choose_type(source, options.base_type)
    level = toolchain.levels()[stock_level(output.level)]
    matrix, matrix_key = imatrix.matrix(job, options, options.imatrix, kind, progress)
    names = [file.name for file in output.files]
    text = str(imatrix.calibration_ids(job, progress)[1]["sha256"]) if _searches(options) else ""
    key = _level_key(source, options, kind, output.level, matrix_key, names, text)
    if (kept := workspace.recall(output.id, key)) is not None:
        return Artifact.model_validate(kept)
    base, base_key = base_file.base(job, options, kind, progress)
    started = time.monotonic()
    file = job.folder / matrix[0].name if matrix else None
    chosen = choose(job, options, base, (base_key, matrix_key), file, progress) if options.fit else None
    sizes = [file.bytes for file in output.files]
    need_disk(workspace, sum(sizes) + level_files.temporary(sizes, keep_split=options.keep_split))
    log = workspace.logs / f"quantize-{output.level}.log"
    request = {
        "base": str(base),
        "ftype": level.ftype,
        "copy": level.name == "COPY",
        "settings": options.settings() | ({"tensor_types": chosen.tensor_types} if chosen else {}),
        "imatrix": {"path": str(file), "label": matrix[1]} if matrix else None,
    }
    remarks = level_files.write_level(job, request, key, options.split_bytes(), log, progress)
    if matrix and (seen := expert_tokens(read_matrix(job.folder / matrix[0].name))):
        remarks["expert_tokens"] = seen
    recipe = write_types(job, names[0], chosen) if chosen else None
    return finished(
        job,
        key,
        names,
        started,
        {"base": kind, "note": note, **remarks, **(recipe.details if recipe else {})},
        bits_per_weight=recipe.bits_per_weight if recipe else None,
        shared=(
            *([matrix[0]] if matrix else []),
            *([recipe.file] if recipe else []),
            *lora.placed(job, base),
        ),
        made_from=str(base.relative_to(workspace.root)),
    )
