"""A plan as stages that can be done each by itself, and what each waits for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from quantool.config.schema import Config
from quantool.plan.effort import judge_step, make_step
from quantool.plugins import find
from quantool.records import OutputPlan, Plan, fingerprint

SOURCE, REFERENCE = "source", "reference"


class Kind(StrEnum):
    """What is done in a stage."""

    SOURCE = "source"
    """Prepare the checkpoint if it needs that, read and hash its weights."""
    SHARE = "share"
    """Make what several outputs are made from: the base, the importance matrix."""
    REFERENCE = "reference"
    """Let the checks ask the checkpoint itself all that artifacts are compared with."""
    BASE = "base"
    """Score the base that several outputs were made from."""
    MAKE = "make"
    JUDGE = "judge"
    PACK = "pack"


@dataclass(frozen=True)
class RunStage:
    """A part of a run that one job does."""

    name: str
    kind: Kind
    outputs: tuple[str, ...]
    """Ids of the outputs that it is for."""
    after: tuple[str, ...]
    """Names of the stages that must be done before."""


def graph_of(plan: Plan, config: Config) -> tuple[RunStage, ...]:
    """The stages of a run, each behind those that it waits for."""
    ids = tuple(output.id for output in plan.outputs)
    stages = [RunStage(SOURCE, Kind.SOURCE, ids, ())]
    entries = _entries(plan.outputs)
    shares = {
        name: RunStage(f"share {name}", Kind.SHARE, _ids(outputs), (SOURCE,))
        for name, outputs in entries.items()
        if len(outputs) > 1 and find.find_method(outputs[0].method).at_once is not None
    }
    stages += shares.values()
    compared = any(
        check.compare is not None for check in find.active_checks(config, plan.source.facts.task).values()
    )
    if compared:
        stages.append(RunStage(REFERENCE, Kind.REFERENCE, ids, (SOURCE,)))
    stages += _makes(plan.outputs, entries, shares)
    bases = {
        name: RunStage(f"base {name}", Kind.BASE, _ids(outputs), (REFERENCE, make_step(outputs[0])))
        for name, outputs in entries.items()
        if compared and len(outputs) > 1 and outputs[0].needs
    }
    stages += bases.values()
    for name, outputs in entries.items():
        before = ((REFERENCE,) if compared else ()) + ((bases[name].name,) if name in bases else ())
        stages += [
            RunStage(judge_step(output.id), Kind.JUDGE, (output.id,), (make_step(output), *before))
            for output in outputs
        ]
    for repo in dict.fromkeys(output.repo for output in plan.outputs):
        own = [output for output in plan.outputs if output.repo == repo]
        judged = tuple(judge_step(output.id) for output in own)
        stages.append(RunStage(f"pack {repo}", Kind.PACK, _ids(own), judged))
    return tuple(stages)


def entry_of(output: OutputPlan) -> str:
    """What outputs of one entry of the configuration have in common."""
    return fingerprint(output.method, output.options, output.repo)


def _entries(outputs: Sequence[OutputPlan]) -> dict[str, list[OutputPlan]]:
    """The outputs by entry, under its method's name, from the second on with a number."""
    groups: dict[str, list[OutputPlan]] = {}
    for output in outputs:
        groups.setdefault(entry_of(output), []).append(output)
    named: dict[str, list[OutputPlan]] = {}
    for group in groups.values():
        method = group[0].method
        number = sum(name.partition(" ")[0] == method for name in named) + 1
        named[method if number == 1 else f"{method} {number}"] = group
    return named


def _ids(outputs: Iterable[OutputPlan]) -> tuple[str, ...]:
    return tuple(output.id for output in outputs)


def _makes(
    outputs: Sequence[OutputPlan], entries: Mapping[str, list[OutputPlan]], shares: Mapping[str, RunStage]
) -> list[RunStage]:
    """The stages that make outputs: behind what makes their needs, which is the first of them where no stage of its own is."""
    makers = {need: shares[name].name for name in shares for output in entries[name] for need in output.needs}
    made = []
    for name, group in entries.items():
        for output in group:
            own = [shares[name].name] if name in shares else []
            before = dict.fromkeys([*own, *(makers[need] for need in output.needs if need in makers)])
            made.append(RunStage(make_step(output), Kind.MAKE, (output.id,), tuple(before) or (SOURCE,)))
            for need in output.needs:
                makers.setdefault(need, make_step(output))
    order = {output.id: number for number, output in enumerate(outputs)}
    needed = {before for stage in made for before in stage.after}
    return sorted(made, key=lambda stage: (stage.name not in needed, order[stage.outputs[0]]))


def waiting(stages: Sequence[RunStage], done: Collection[str]) -> tuple[RunStage, ...]:
    """The stages still to do: those that are not done, but what nobody needs any more is left out."""
    needed: set[str] = set()
    for stage in reversed(stages):
        wanted = stage.kind is Kind.PACK or any(
            stage.name in other.after for other in stages if other.name in needed
        )
        if wanted and stage.name not in done:
            needed.add(stage.name)
    return tuple(stage for stage in stages if stage.name in needed)
