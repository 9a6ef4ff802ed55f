"""Fitted files in a plan: one output for each entry of ``fit``, and the stage that measures for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantool.gates import stock_level
from quantool.ledger import CHOSEN
from quantool.methods._llama_cpp import dry_run, level_plan
from quantool.methods._llama_cpp.fit import outline, yardstick
from quantool.methods._llama_cpp.fit.outline import Room
from quantool.methods._llama_cpp.fit.targets import FitTarget
from quantool.methods._llama_cpp.importance import imatrix
from quantool.methods._llama_cpp.options import LevelOptions
from quantool.plugins.contract import Request
from quantool.records import Gates, OutputPlan, PlannedFile, StagePlan

COSTS = "fit-costs"
"""Name of the stage that measures every matrix."""
Done = Callable[[LevelOptions, str, list[str]], bool]
"""Whether an output of these options, this level and these files is there."""


@dataclass(frozen=True)
class Fitted:
    """What the plan gains: outputs, stages, and by output the type of every tensor (``CHOSEN`` where it is to come)."""

    outputs: tuple[OutputPlan, ...]
    stages: tuple[StagePlan, ...]
    types: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Frame:
    request: Request
    options: LevelOptions
    rehearsal: dry_run.Rehearsal
    stem: str
    repo: str
    extra: int
    done: Done


def planned(
    request: Request,
    options: LevelOptions,
    rehearsal: dry_run.Rehearsal,
    names: tuple[str, str],
    done: Done,
) -> Fitted:
    """The outputs of ``options.fit``; ``names`` are the stem of file names and the folder.

    Raises ConfigError for what cannot be reached, with the nearest that can.
    """
    targets = options.fit
    if any(target.recipe is None for target in targets):
        outline.refuse_task(request.source)
        outline.refuse_texts(request.config)
        yardstick.require_text(imatrix.tokens_at_most(request.config) // imatrix.IMATRIX_CONTEXT)
    extra = imatrix.metadata_bytes(options.imatrix, request.config, names[0])
    frame = _Frame(request, options, rehearsal, *names, extra, done)
    stock = outline.stock_types(rehearsal, options)
    sizes = {level: outline.stock_bytes(rehearsal, types, extra) for level, types in stock.items()}
    found = [_placed(frame, target, stock, sizes) for target in targets]
    levels = outline.names_of([room.stock for room, *_ in found])
    outputs, types = [], {}
    for target, level, (room, budget, chosen) in zip(targets, levels, found, strict=True):
        output = _output(frame, target, level, room, budget, chosen)
        outputs.append(output)
        types[output.id] = chosen or {
            name: CHOSEN if name in room.sizes else kind for name, kind in room.types.items()
        }
    searched = [output for output, target in zip(outputs, targets, strict=True) if target.recipe is None]
    stages = tuple(_stages(frame, found[0][0], searched)) if searched else ()
    notes = tuple(outline.note(target) for target in targets if target.kld is not None)
    return Fitted(tuple(outputs), stages, types, notes)


def _placed(
    frame: _Frame, target: FitTarget, stock: Mapping[str, Mapping[str, str]], sizes: Mapping[str, int]
) -> tuple[Room, int | None, dict[str, str]]:
    """What a target chooses from, the bytes that it allows, and the types of its recipe."""
    source, options, rehearsal = frame.request.source, frame.options, frame.rehearsal
    if target.recipe is not None:
        given = options.tensor_types | outline.recipe_types(target, rehearsal)
        settings = options.settings() | {"tensor_types": given}
        runs = level_plan.dry_runs(
            rehearsal, dict.fromkeys(outline.STOCK, settings), imatrix=bool(options.imatrix)
        )
        types = {level: dict(run["types"]) for level, run in zip(outline.STOCK, runs, strict=True)}
        size = outline.stock_bytes(rehearsal, types[outline.STOCK[0]], frame.extra)
        level = outline.nearest_level(sizes, target, size)
        room = outline.room_of(rehearsal, options, level, stock[level], frame.extra)
        size = outline.stock_bytes(rehearsal, types[level], frame.extra)
        outline.refuse_split(target, size, options.split_bytes())
        return room, size, types[level]
    outline.refuse_divergence(target)
    first = outline.room_of(rehearsal, options, outline.STOCK[0], stock[outline.STOCK[0]], frame.extra)
    budget = outline.budget_of(target, source, rehearsal, first)
    if budget is not None:
        outline.refuse(target, source, budget, first, rehearsal, options.split_bytes())
    else:
        outline.refuse_split(target, first.smallest, options.split_bytes())
    level = outline.nearest_level(sizes, target, budget)
    return outline.room_of(rehearsal, options, level, stock[level], frame.extra), budget, {}


def _output(
    frame: _Frame, target: FitTarget, level: str, room: Room, budget: int | None, chosen: Mapping[str, str]
) -> OutputPlan:
    rehearsal, request = frame.rehearsal, frame.request
    options = frame.options.model_copy(update={"fit": (target,)})
    name = f"{frame.stem}-{level}.gguf"
    types = chosen or room.types
    _, choosing = outline.search_operations(request.source.facts.parameters, room)
    base = sum(tensor.bytes for tensor in rehearsal.tensors.values())
    return OutputPlan(
        id=f"gguf/{level}",
        method="gguf",
        level=level,
        options=options.model_dump(mode="json"),
        engine="llama.cpp",
        repo=frame.repo,
        repo_id=request.repo_id,
        files=(PlannedFile(name=name, bytes=room.largest if budget is None else budget),),
        bits_per_weight=dry_run.bits_per_weight(rehearsal, dict(chosen)) if chosen else None,
        peak_ram=max(level_plan.quantize_ram(rehearsal, types), 0 if chosen else base + outline.SPAN),
        operations=level_plan.operations("Q4_K_M") * rehearsal.elements() + (0.0 if chosen else choosing),
        gates=_gates(request, target, stock_level(level)),
        done=frame.done(options, level, [name]),
        needs=("base", *("imatrix",) * bool(options.imatrix), *(COSTS,) * (not chosen)),
    )


def _gates(request: Request, target: FitTarget, stock: str) -> Gates:
    """Those of the stock level; a divergence that was asked for is its own."""
    own = request.gates(stock)
    return own if target.kld is None else own.model_copy(update={"max_mean_kld": target.kld})


def _stages(frame: _Frame, room: Room, outputs: Sequence[OutputPlan]) -> Iterator[StagePlan]:
    facts = frame.request.source.facts
    base = sum(tensor.bytes for tensor in frame.rehearsal.tensors.values())
    measuring, _ = outline.search_operations(facts.parameters, room)
    yield StagePlan(
        name=COSTS,
        writes=yardstick.scored_bytes(facts.vocabulary),
        peak_ram=base + outline.SPAN + facts.largest_tensor,
        operations=measuring,
        done=all(output.done for output in outputs),
    )
