"""Everything decided before weights are touched."""

from __future__ import annotations

import shutil
from contextlib import suppress
from functools import partial

from quantool import gates
from quantool.config.schema import Config, Quantization
from quantool.errors import ConfigError, DependencyError
from quantool.formats.safetensors import some
from quantool.plan import disk, effort
from quantool.plan.account import refuse_unjudged, with_ledgers
from quantool.plan.collisions import refuse_collisions, refuse_own_folder
from quantool.plan.depends import depends_of
from quantool.plan.files import unknown_files
from quantool.plan.loading import refuse_unloadable
from quantool.plugins import contract, find
from quantool.plugins.contract import Outline, Request
from quantool.records import MachineState, Plan, Source
from quantool.runtime import builds, machine
from quantool.runtime.progress import amount
from quantool.runtime.versions import versions
from quantool.runtime.workspace import Workspace
from quantool.source.parts import Parts
from quantool.source.tensor_headers import headers
from quantool.tasks import PIPELINE_TAGS, TaskKind

JUDGED_FROM = 1_000_000_000
"""Parameters from which the default gates hold."""


def make_plan(config: Config, source: Source, workspace: Workspace) -> Plan:
    """The plan of ``plan_here`` without what this machine has."""
    return plan_here(config, source, workspace)[0]


def plan_here(
    config: Config, source: Source, workspace: Workspace, *, downloads: int = 0
) -> tuple[Plan, MachineState]:
    """Ask every method for its outline and add up what the run needs, and what of it is here.

    ``downloads`` is the bytes of weights still to fetch. Raises ConfigError for outputs that would overwrite each
    other or the checkpoint, for texts and windows that the checks would refuse hours later, and what the methods
    raise. Nothing is written to the output folder.
    """
    parts, tensors = Parts.of(source), headers(source)
    refuse_unjudged(config, source, parts, tensors)
    _refuse_texts(config, source)
    _ask_checks(config, source)
    outlines = [
        with_ledgers(_outline(config, source, workspace, wanted), config, source, parts, tensors)
        for wanted in config.requested()
    ]
    refuse_unloadable(config, source, parts, tensors)  # the methods' own words say more of the same mistakes
    outputs = tuple(output for outline in outlines for output in outline.outputs)
    refuse_collisions(outputs)
    refuse_own_folder(source, workspace.root, outputs)
    steps = disk.stages(
        source,
        outlines,
        outputs,
        downloads,
        _judging(config, source, workspace),
        holds_model=bool(disk.holding(config, source)),
    )
    free = shutil.disk_usage(disk.existing(workspace.root)).free
    notes = [
        *source.notes,
        *(note for outline in outlines for note in outline.warnings),
        *_advice(source, config),
    ]
    decided = Plan(
        config=config.model_dump(mode="json", exclude_unset=True),
        source=source,
        outputs=tuple(output.model_copy(update={"done": False}) for output in outputs),
        stages=tuple(step.model_copy(update={"done": False}) for step in steps),
        seed=config.seed,
        versions=versions(),
        warnings=tuple(dict.fromkeys(notes)),
    )
    here = MachineState(
        free_disk=free,
        peak_disk=disk.peak_disk(steps, outputs, bounded=config.disk_bounded),
        done=tuple(step.name for step in steps if step.done),
        engines=builds.places(config.device),
        seconds=effort.seconds(decided, config),
        untimed=effort.unknown(decided, config),
        ram=machine.total_ram(),
    )
    return decided, here


def options_of(wanted: Quantization, method: contract.Method) -> contract.Options:
    """The method's typed options; ``config.load`` has reported their mistakes already."""
    fields = method.options.model_fields
    given = {k: v for k, v in wanted.quantization_config.items() if v is not None or k not in fields}
    return method.options.model_validate(given)


def _outline(config: Config, source: Source, workspace: Workspace, wanted: Quantization) -> Outline:
    method = find.find_method(wanted.method)
    if not (config.merge or method.adapters):
        raise ConfigError(
            f"merge: false, but {wanted.method} makes no file of an adapter",
            hint="the method gguf does; or leave merge out, and the adapter is merged into the weights",
        )
    chosen = partial(gates.resolve, configured=config.validation.gates, kind=source.facts.task.kind)
    levels, depends = tuple(wanted.levels()), depends_of(method)
    request = Request(config, source, levels, wanted.repo_id, workspace, chosen, depends)
    return method.outline(request, options_of(wanted, method))


def _refuse_texts(config: Config, source: Source) -> None:
    from quantool.texts import corpus

    corpus.require_texts(config)
    settings = config.validation
    is_set = "context" in settings.model_fields_set  # the default may be for a check that is not run
    if is_set and settings.context > source.facts.context:
        raise ConfigError(
            f"validation.context is {settings.context}, but {source.name} reads no more than "
            f"{source.facts.context} tokens"
        )


def _ask_checks(config: Config, source: Source) -> None:
    """Let each check say what it cannot judge, but for those with a section of the configuration that is not set."""
    settings = config.validation
    for name in find.judging_checks(config, source.facts.task):
        if name in settings.model_fields_set:
            check = find.find_check(name)
        elif name in type(settings).model_fields:
            continue
        else:
            try:
                check = find.find_check(name)
            except (ConfigError, DependencyError):  # a run says so before it starts
                continue
        if check.require is not None:
            check.require(config, source)


def _judging(config: Config, source: Source, workspace: Workspace) -> int:
    """Bytes that the checks keep on disk, without those that an earlier run left."""
    wanted = 0
    for name in find.judging_checks(config, source.facts.task):
        with suppress(
            ConfigError, DependencyError
        ):  # one that cannot be loaded: a run says so before it starts
            check = find.find_check(name)
            wanted += check.writes(config, source) if check.writes is not None else 0
    kept = sum(path.stat().st_size for path in (workspace.work / "reference").glob("*") if path.is_file())
    return max(0, wanted - kept)


def _advice(source: Source, config: Config) -> list[str]:
    settings = config.validation
    notes = [
        f"validation.{name} has no effect: validation.checks leaves {name} out"
        for name in find.names("checks")
        if settings.checks is not None and name in settings.model_fields_set and name not in settings.checks
    ]
    notes += [
        f"validation.{name} has no effect: {name} says nothing about models for {source.facts.task.kind}"
        for name in find.names("checks")
        if name in settings.model_fields_set and not find.applies(name, source.facts.task)
    ]
    if source.facts.task.generates and source.card.pipeline_tag == PIPELINE_TAGS[TaskKind.RERANKING]:
        notes.append(
            f"{source.name} ranks texts by the words that it answers: it is judged as a language model, by the logits of all "
            "words; orders of passages are not compared"
        )
    if unknown := unknown_files(source):
        notes.append(f"files that are not carried, because nothing is known of them: {some(unknown)}")
    others = [language for language in source.card.languages if language.partition("-")[0] != "en"]
    if others and not config.validation.corpora and config.eval_dataset is None:
        notes.append(
            f"the held-out text is English, but the model's card names {some(others)}: what these languages lose shows on "
            "validation.corpora of their own"
        )
    if source.facts.parameters < JUDGED_FROM and "*" not in config.validation.gates:
        notes.append(
            f"the default gates hold for models of {amount(JUDGED_FROM, '')} parameters and more; this one has "
            f"{amount(source.facts.parameters, '')}: set validation.gates if a sound level fails"
        )
    return notes
