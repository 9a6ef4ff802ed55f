"""The plan of fitted files: what their types are chosen from, how large they may get, and what cannot be reached."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantool import gates
from quantool.config.schema import Config
from quantool.errors import ConfigError, nearest
from quantool.footprint import running_bytes
from quantool.formats.tensor_types import read_recipe
from quantool.methods._llama_cpp import dry_run, level_plan
from quantool.methods._llama_cpp.fit import candidates, search, yardstick
from quantool.methods._llama_cpp.fit.costs import BASE_TYPES
from quantool.methods._llama_cpp.fit.targets import CONTEXT, FitTarget
from quantool.methods._llama_cpp.importance import imatrix
from quantool.methods._llama_cpp.options import LevelOptions
from quantool.records import Source
from quantool.runtime.toolchain import ggml_types
from quantool.texts import corpus

STOCK = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
"""Levels by which a fitted file is named, and whose gates it has to keep."""
MARK = "_FIT"
"""Behind the level in a fitted file's name: ``-hf repo:Q4_K_M`` does not find it, the Hub's label takes capitals there."""
PUBLISHED = 1.7
"""What ``gates`` allow over the published mean KLD of a level."""
LOWEST_KLD = 1e-3
"""Nats: bf16 arithmetic alone reaches that (``quantool.gates``)."""
FILES = 3
"""Files that one choice measures, the unquantized one counted; a divergence may take two more."""
SPAN = 200 << 20
"""Bytes that a search needs beside the base in memory: libraries, and scores of a few windows."""


@dataclass(frozen=True)
class Room:
    """What a fitted file is made of: ``sizes`` (tensor to candidate type to padded bytes), and the ``fixed`` rest."""

    stock: str
    """The stock level whose types the tensors have that are not chosen."""
    sizes: Mapping[str, Mapping[str, int]]
    types: Mapping[str, str]
    """Of the stock level, for every tensor in the file's order."""
    fixed: int
    """Bytes of header and of all tensors that are not chosen."""
    elements: Mapping[str, int]
    """Weights of every tensor."""

    @property
    def smallest(self) -> int:
        """Bytes of the smallest file."""
        return self.fixed + sum(min(own.values()) for own in self.sizes.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest file."""
        return self.fixed + sum(max(own.values()) for own in self.sizes.values())


def stock_types(rehearsal: dry_run.Rehearsal, options: LevelOptions) -> dict[str, dict[str, str]]:
    """The types of every tensor at every stock level, by llama.cpp's own dry run."""
    runs = level_plan.dry_runs(
        rehearsal, dict.fromkeys(STOCK, options.settings()), imatrix=bool(options.imatrix)
    )
    return {level: dict(run["types"]) for level, run in zip(STOCK, runs, strict=True)}


def stock_bytes(rehearsal: dry_run.Rehearsal, types: Mapping[str, str], extra: int) -> int:
    """Bytes of one file with ``types``."""
    (size,) = dry_run.split_bytes(rehearsal, dict(types), extra, 0)
    return size


def room_of(
    rehearsal: dry_run.Rehearsal, options: LevelOptions, stock: str, types: Mapping[str, str], extra: int
) -> Room:
    """What can be chosen where the rest is as at the level ``stock``; tensors that options name a type for are not."""
    sizes = {}
    for name, kind in types.items():
        tensor = rehearsal.tensors[name]
        known = candidates.types_for(
            tensor.shape[-1], importance=bool(options.imatrix) and name.startswith("blk.")
        )
        if kind.lower() == tensor.type.lower() or not known or is_named(name, options):
            continue
        kinds = (*known, *(own for own in BASE_TYPES if own == tensor.type.lower()))
        sizes[name] = {one: dry_run.padded_bytes(tensor, one) for one in kinds}
    whole = stock_bytes(rehearsal, types, extra)
    chosen = sum(dry_run.padded_bytes(rehearsal.tensors[name], types[name]) for name in sizes)
    elements = {name: math.prod(tensor.shape) for name, tensor in rehearsal.tensors.items()}
    return Room(stock, sizes, types, whole - chosen, elements)


def is_named(name: str, options: LevelOptions) -> bool:
    """Whether the options name a type for the tensor."""
    alone = {"token_embd.weight": options.token_embedding_type, "output.weight": options.output_tensor_type}
    return bool(alone.get(name)) or any(re.search(one.lower(), name) for one in options.tensor_types)


def nearest_level(sizes: Mapping[str, int], target: FitTarget, budget: int | None) -> str:
    """The stock level nearest in size to ``budget``; for a divergence the one whose published mean KLD is nearest."""
    if budget is not None:
        return min(STOCK, key=lambda level: abs(sizes[level] - budget))
    wanted = target.kld or 1.0

    def distance(level: str) -> float:
        published = (gates.default_gates(level).max_mean_kld or 1.0) / PUBLISHED
        return abs(math.log(published / wanted))

    return min(STOCK, key=distance)


def names_of(levels: Sequence[str]) -> list[str]:
    """Names of fitted files nearest to ``levels``: ``Q4_K_M_FIT``, and ``Q4_K_M_FITB`` for a second one."""
    found: list[str] = []
    for level in levels:
        endings = ("", *"BCDEFGHIJKLMNOPQRSTUVWXYZ")
        free = next((end for end in endings if f"{level}{MARK}{end}" not in found), None)
        if free is None:
            raise ConfigError(f"fit: more than {len(endings)} entries come nearest to {level}")
        found.append(f"{level}{MARK}{free}")
    return found


def budget_of(target: FitTarget, source: Source, rehearsal: dry_run.Rehearsal, room: Room) -> int | None:
    """Bytes of the file that a target allows; None for a divergence and a recipe."""
    if target.bpw is not None:
        stored = sum(dry_run.tensor_bytes(rehearsal.tensors[name], kind) for name, kind in room.types.items())
        return int(target.bpw * rehearsal.elements() / 8) + stock_overhead(rehearsal, room, stored)
    return target.budget(source.facts)


def stock_overhead(rehearsal: dry_run.Rehearsal, room: Room, stored: int) -> int:
    """Bytes of a file that are no tensor data: header and padding."""
    chosen = sum(dry_run.padded_bytes(rehearsal.tensors[n], room.types[n]) for n in room.sizes)
    return room.fixed + chosen - stored


def refuse(
    target: FitTarget, source: Source, budget: int, room: Room, rehearsal: dry_run.Rehearsal, limit: int
) -> None:
    """ConfigError for a budget that no file meets, with the nearest entry that one does."""
    if budget < room.smallest or budget > room.largest:
        small = budget < room.smallest
        bound = room.smallest if small else room.largest
        word = "smaller" if small else "larger"
        raise ConfigError(
            f"fit: {target.describe()} leaves {max(0, budget):,} bytes for the file; none of {source.name} is {word} than "
            f"{bound:,} bytes",
            hint=f"the nearest that can be met: {_nearest(target, source, bound, rehearsal, room, up=small)}",
        )
    refuse_split(target, budget, limit)


def refuse_split(target: FitTarget, size: int, limit: int) -> None:
    """ConfigError for a file of ``size`` bytes where files are split at ``limit``: a fitted one is not."""
    if size > limit:
        raise ConfigError(
            f"fit: {target.describe()}: {size:,} bytes are more than one file may have ({limit:,} bytes, max_shard_size), and "
            "a fitted file is one",
            hint=f"set max_shard_size to {-(-size // 10**9)}G or more",
        )


def _nearest(
    target: FitTarget, source: Source, bound: int, rehearsal: dry_run.Rehearsal, room: Room, *, up: bool
) -> str:
    if target.bpw is not None:
        stored = sum(dry_run.tensor_bytes(rehearsal.tensors[name], kind) for name, kind in room.types.items())
        bits = 8 * (bound - stock_overhead(rehearsal, room, stored)) / rehearsal.elements()
        return f"bpw: {(math.ceil if up else math.floor)(bits * 1000) / 1000:g}"
    if target.vram is not None:
        bound = running_bytes(
            source.facts, bound, target.context or min(CONTEXT, source.facts.context), target.kv or "f16"
        )
    unit, size = next(
        ((u, s) for u, s in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)) if bound >= 10 * s), ("KB", 10**3)
    )
    number = (math.ceil if up else math.floor)(bound / size * 100) / 100
    return f"{'vram' if target.vram is not None else 'size'}: {number:g}{unit}"


def refuse_task(source: Source) -> None:
    """ConfigError for a model that predicts no text: what is measured is its predictions."""
    if not source.facts.task.generates:
        raise ConfigError(
            f"fit: {source.name} is a model for {source.facts.task.kind}, and what a search measures is predicted text",
            hint="name levels, or types in tensor_types; an entry recipe needs no search",
        )


def refuse_texts(config: Config) -> None:
    """ConfigError without calibration text, and for one that is a held-out text as well: what is chosen by it would look good on it."""
    origin = corpus.calibration_corpus(config)
    if origin is None:
        raise ConfigError(
            "fit measures on calibration text, and the configuration names none",
            hint="set dataset_path (a .txt, .jsonl or .parquet file) or dataset_id",
        )
    own = corpus.identity(origin)
    for entry in corpus.corpora(config):
        same = own is not None and own == corpus.identity(entry)
        listed = origin.dataset is not None and (origin.dataset, origin.config, origin.split) == (
            entry.dataset, entry.config, entry.split,
        )  # fmt: skip
        if same or listed:
            raise ConfigError(
                f"fit: the calibration text is the held-out text {entry.name!r} as well",
                hint="choose by one text and judge by another: another dataset_path, or other validation.corpora",
            )


def refuse_divergence(target: FitTarget) -> None:
    """ConfigError for a divergence below what two engines differ by without any quantization."""
    if target.kld is not None and target.kld < LOWEST_KLD:
        raise ConfigError(
            f"fit: kld: {target.kld:g} is lower than what arithmetic alone makes of an unquantized file",
            hint=f"the nearest that can be met: kld: {LOWEST_KLD:g}; or take the level F16 of the method fp16",
        )


def note(target: FitTarget) -> str:
    """What a divergence that is asked for means while types are chosen."""
    return (
        f"fit: {target.describe()}: kept by the upper {search.CONFIDENCE:.0%} bound of the mean over windows of the calibration "
        "text, so the mean itself is lower; on held-out text it is a gate, which text unlike the calibration text may exceed"
    )


def recipe_types(target: FitTarget, rehearsal: dry_run.Rehearsal) -> dict[str, str]:
    """The recipe's expressions and types; ConfigError for what this model cannot have, with the nearest that it can."""
    if target.recipe is None:
        return {}
    types = read_recipe(target.recipe)
    known = ggml_types()
    for expression, kind in types.items():
        if kind not in known:
            raise ConfigError(f"{target.recipe}: unknown ggml type {kind!r}", hint=nearest(kind, list(known)))
        try:
            matched = [name for name in rehearsal.tensors if re.search(expression, name)]
        except re.error as error:
            raise ConfigError(f"{target.recipe}: {expression!r} is no regular expression: {error}") from error
        if not matched:
            raise ConfigError(
                f"{target.recipe}: {expression!r} matches no tensor of this model",
                hint="it is the recipe of a model with other layers or tensors",
            )
        for name in matched:
            _refuse_width(target, name, kind, rehearsal.tensors[name].shape[-1])
    return types


def _refuse_width(target: FitTarget, name: str, kind: str, width: int) -> None:
    """llama-quantize itself would take another type without failing."""
    known = ggml_types()
    block = known[kind].block
    if width % block == 0:
        return
    bits = known[kind].size / block
    fitting = [one for one in candidates.types_for(width, importance=True) if width % known[one].block == 0]
    near = min(fitting, key=lambda one: abs(known[one].size / known[one].block - bits), default="f16")
    raise ConfigError(
        f"{target.recipe}: {name} cannot be {kind}: its rows of {width} weights are no multiple of {block}",
        hint=f"the nearest type that it can have: {near}",
    )


def search_operations(parameters: int, room: Room) -> tuple[float, float]:
    """Operations of measuring every matrix, and of choosing the types of one file."""
    single = 2.0 * parameters * yardstick.TOKENS * (2 * len(room.sizes) + 1)
    whole = 2.0 * parameters * yardstick.WHOLE_WINDOWS * imatrix.IMATRIX_CONTEXT * FILES
    return single, whole
