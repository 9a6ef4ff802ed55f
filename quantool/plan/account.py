"""The ledger of each output: every tensor and file of the source is accounted for, or the plan is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from quantool.config.schema import Config
from quantool.errors import ConfigError, QuantoolError, SourceError, nearest
from quantool.formats.safetensors import TensorHeader, some
from quantool.ledger import MTP, TOWERS, Fate, Ledger, TensorLine, grouped
from quantool.plan.files import file_lines
from quantool.plugins.contract import Outline
from quantool.records import OutputPlan, Source
from quantool.source.loaders import loader
from quantool.source.parts import Parts, sizes

DROPPABLE = (*TOWERS, MTP)
ON_PURPOSE = "left out on purpose: drop"


def refuse_unjudged(
    config: Config, source: Source, parts: Parts, tensors: Mapping[str, TensorHeader]
) -> None:
    """Refuse what could be made and never judged, before anything is fetched.

    Raises SourceError for a checkpoint that no class of transformers loads, for one that lacks what its config.json
    promises, and for towers that the configuration does not leave out; ConfigError for a part to leave out that is not
    there.
    """
    if loader(source) is None:
        raise SourceError(
            f"{source.name} cannot be judged: transformers loads {source.facts.architecture} (model type "
            f"{source.facts.model_type}) as no text model, so there is no reference to compare with",
            hint="save its language model as a checkpoint of its own (…ForCausalLM) and start from that",
        )
    present = sizes(parts, tensors)
    if lost := [part for part in config.drop if part not in present and part not in source.absent]:
        raise ConfigError(
            f"drop: {some(lost)}, but the checkpoint has no such part",
            hint=nearest(lost[0], list(present)) or f"its parts: {', '.join(present)}",
        )
    parts.refuse_absent(source, tensors)
    towers = {part: present[part] for part in TOWERS if part in present and part not in config.drop}
    if towers:
        listed = ", ".join(
            f"{part} ({count} tensors, {weights:,} weights)" for part, (count, weights) in towers.items()
        )
        raise SourceError(
            f"the checkpoint holds more than a language model: {listed}, which nothing here judges",
            hint=f"drop: [{', '.join(towers)}] makes a declared text-only file of it, whose text part is judged",
        )


def with_ledgers(
    outline: Outline, config: Config, source: Source, parts: Parts, tensors: Mapping[str, TensorHeader]
) -> Outline:
    """The outline with a ledger in each of its outputs, and warnings of parts that its method leaves out of its own accord.

    Raises SourceError naming tensors that would be lost without a reason, ConfigError for a part that the method cannot
    leave out, QuantoolError for a method whose lines are not those of this checkpoint.
    """
    outputs, notes = [], []
    for output in outline.outputs:
        ledger = _ledger(output, outline, config, source, parts, tensors)
        outputs.append(output.model_copy(update={"ledger": ledger, "repo": _repo(output, ledger)}))
        notes += [
            f"{output.id}: {part} left out: {_reason(ledger, part)}"
            for part in ledger.parts_left_out()
            if part not in config.drop
        ]
    return Outline(tuple(outputs), outline.stages, (*outline.warnings, *notes), outline.lines, outline.drops)


def _repo(output: OutputPlan, ledger: Ledger) -> str:
    """Its folder; that of a text-only file says so, unless the user named it."""
    text_only = output.repo_id is None and ledger.parts_left_out().keys() & TOWERS
    return f"{output.repo}-text-only" if text_only else output.repo


def _reason(ledger: Ledger, part: str) -> str:
    return next(line.reason for line in ledger.tensors if line.part == part and line.fate is Fate.DROPPED)


def _ledger(
    output: OutputPlan,
    outline: Outline,
    config: Config,
    source: Source,
    parts: Parts,
    tensors: Mapping[str, TensorHeader],
) -> Ledger:
    given = outline.lines.get(output.id)
    lines = [*_whole(tensors)] if given is None else given
    _check_names(output, lines, tensors)
    completed = [_with_part(line, parts, outline.drops, config, traced=given is not None) for line in lines]
    joined = grouped(completed)
    _refuse_kept(output, joined, config)
    _refuse_unexplained(output, joined)
    return Ledger(tensors=joined, files=file_lines(output, source), traced=given is not None)


def _whole(tensors: Mapping[str, TensorHeader]) -> Iterator[TensorLine]:
    """For a method that does not say more: everything is in, somewhere."""
    for name, tensor in tensors.items():
        yield TensorLine(name=name, dtype=tensor.dtype, shape=tensor.shape, fate=Fate.CONVERTED)


def _check_names(
    output: OutputPlan, lines: Sequence[TensorLine], tensors: Mapping[str, TensorHeader]
) -> None:
    named = [line.name for line in lines if line.fate is not Fate.ADDED]
    strange = sorted(set(named) - tensors.keys())
    missing = sorted(tensors.keys() - set(named))
    if strange or missing or len(named) != len(set(named)):
        problem = (
            f"knows nothing of {some(missing)}"
            if missing
            else f"speaks of {some(strange)}, which the checkpoint lacks"
            if strange
            else "has two lines for one tensor"
        )
        raise QuantoolError(f"{output.id}: the method {output.method} {problem}", hint="its outline is wrong")


def _with_part(
    line: TensorLine, parts: Parts, drops: Mapping[str, str], config: Config, *, traced: bool
) -> TensorLine:
    """The line with its part, and with the reason that the method or the user gives for leaving that out."""
    if line.fate is Fate.ADDED:
        return line
    part = parts.part_of(line.name)
    fate, reason = line.fate, line.reason
    if not traced and part in drops:
        fate = Fate.DROPPED
    if fate is Fate.DROPPED and not reason:
        reason = drops.get(part) or (ON_PURPOSE if part in config.drop else "")
    if (part, fate, reason) == (line.part, line.fate, line.reason):
        return line  # there can be a hundred thousand
    return line.model_copy(update={"part": part, "fate": fate, "reason": reason})


def _refuse_kept(output: OutputPlan, lines: Sequence[TensorLine], config: Config) -> None:
    kept = [line for line in lines if line.part in config.drop and line.fate.is_in]
    if kept:
        raise ConfigError(
            f"drop: {kept[0].part}, but {output.method} keeps it: {some([line.name for line in kept])}",
            hint="the method gguf leaves it out; or start from a checkpoint without it",
        )


def _refuse_unexplained(output: OutputPlan, lines: Sequence[TensorLine]) -> None:
    lost = [line for line in lines if line.fate is Fate.DROPPED and not line.reason]
    if not lost:
        return
    count, weights = sum(line.count() for line in lost), sum(line.elements() for line in lost)
    parts = [part for part in dict.fromkeys(line.part for line in lost) if part in DROPPABLE]
    raise SourceError(
        f"{output.id} would lose {count} tensors ({weights:,} weights) without a reason: "
        f"{some([line.name for line in lost])}",
        hint=f"drop: [{', '.join(parts)}] leaves them out on purpose"
        if len(parts) == len({line.part for line in lost})
        else "the tools do not know these tensors: a newer version may, or they do not belong to this model",
    )
