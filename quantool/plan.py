"""Everything decided before weights are touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quantool import __version__, gates, registry
from quantool.config import Config, Quantization
from quantool.errors import ConfigError, DependencyError
from quantool.progress import amount
from quantool.records import Gates, OutputPlan, Plan, Source, StagePlan
from quantool.registry import Outline
from quantool.sandbox import read_card_template
from quantool.workspace import Workspace

JUDGED_FROM = 1_000_000_000
"""Parameters from which the default gates hold."""

DISTRIBUTIONS = (
    "compressed-tensors", "datasets", "gguf", "huggingface-hub", "llama-cpp-python", "llmcompressor", "lm_eval",
    "numpy", "safetensors", "tokenizers", "torch", "transformers", "xllamacpp",
)  # fmt: skip
"""Libraries whose version is recorded."""


OWN_NAMES = {"logs", "records", "plots", "plan.json", "report.md", "report.json", "junit.xml"}
"""What a run keeps in the output folder beside the folders to publish."""


@dataclass(frozen=True)
class Request:
    """What a method is asked to outline: one entry of ``quantizations`` on a source."""

    config: Config
    source: Source
    levels: tuple[str, ...]
    repo_id: str | None
    workspace: Workspace
    gates: Callable[[str], Gates]
    """Gates of a level: the defaults under what the configuration says."""


def make_plan(config: Config, source: Source, workspace: Workspace, *, downloads: int = 0) -> Plan:
    """Ask every method for its outline and add up what the run needs.

    ``downloads`` is the bytes of weights still to fetch. Raises ConfigError for outputs that would overwrite each
    other or the checkpoint, for texts and windows that the checks would refuse hours later, for a card template that
    is no template, and what the methods raise. Nothing is
    written to the output folder.
    """
    _refuse_texts(config, source)
    if config.card.template is not None:
        read_card_template(config.card.template)
    _ask_checks(config, source)
    outlines = [_outline(config, source, workspace, wanted) for wanted in config.requested()]
    outputs = tuple(output for outline in outlines for output in outline.outputs)
    _refuse_collisions(outputs)
    _refuse_own_folder(source, workspace.root, outputs)
    stages = _stages(source, outlines, outputs, downloads)
    free = shutil.disk_usage(_existing(workspace.root)).free
    notes = [
        *source.notes,
        *(note for outline in outlines for note in outline.warnings),
        *_advice(source, config),
    ]
    return Plan(
        config=config.model_dump(mode="json", exclude_unset=True),
        source=source,
        outputs=outputs,
        stages=stages,
        peak_disk=_peak_disk(stages, outputs, bounded=config.disk_bounded),
        free_disk=free,
        seed=config.seed,
        versions=versions(),
        warnings=tuple(dict.fromkeys(notes)),
    )


def options_of(wanted: Quantization, method: registry.Method) -> registry.Options:
    """The method's typed options; ``config.load`` has reported their mistakes already."""
    fields = method.options.model_fields
    given = {k: v for k, v in wanted.quantization_config.items() if v is not None or k not in fields}
    return method.options.model_validate(given)


def _outline(config: Config, source: Source, workspace: Workspace, wanted: Quantization) -> Outline:
    method = registry.find_method(wanted.method)
    chosen = partial(gates.resolve, configured=config.validation.gates)
    request = Request(config, source, tuple(wanted.levels()), wanted.repo_id, workspace, chosen)
    return method.outline(request, options_of(wanted, method))


def _refuse_texts(config: Config, source: Source) -> None:
    from quantool import corpus

    corpus.require_texts(config)
    settings = config.validation
    asked = "context" in settings.model_fields_set  # the default may be for a check that is not run
    if asked and settings.context > source.facts.context:
        raise ConfigError(
            f"validation.context is {settings.context}, but {source.name} reads no more than "
            f"{source.facts.context} tokens"
        )


def _ask_checks(config: Config, source: Source) -> None:
    """Let each check that has a section of the configuration say what it cannot judge."""
    settings = config.validation
    for name in settings.checks or registry.names("checks"):
        if name in settings.model_fields_set and (require := registry.find_check(name).require) is not None:
            require(config, source)


def _refuse_collisions(outputs: Sequence[OutputPlan]) -> None:
    names = [output.id for output in outputs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{', '.join(twice)} is asked for twice", hint="drop one of the entries")
    owners: dict[tuple[str, str], str] = {}
    repositories: dict[str, str | None] = {}
    for output in outputs:
        if repositories.setdefault(output.repo, output.repo_id) != output.repo_id:
            raise ConfigError(
                f"{repositories[output.repo]} and {output.repo_id} would share the folder {output.repo}",
                hint="give the repositories different names",
            )
        for file in output.files:
            first = owners.setdefault((output.repo, file.name), output.id)
            if first != output.id:
                raise ConfigError(
                    f"{first} and {output.id} would both write {output.repo}/{file.name}",
                    hint="drop one of them, or give them different repo_id",
                )


def _refuse_own_folder(source: Source, root: Path, outputs: Sequence[OutputPlan]) -> None:
    """ConfigError when a run would write into the folder that it reads, or over its own records."""
    if taken := OWN_NAMES & {output.repo for output in outputs}:
        raise ConfigError(
            f"{min(taken)} cannot be the name of a repository: the output folder has its own {min(taken)}",
            hint="name it differently in repo_id",
        )
    own = {path.resolve() for path in (source.folder, source.tokenizer) if path is not None}
    own |= {(source.folder / file.name).resolve().parent for file in source.files}  # behind links
    for folder in (root, *(root / output.repo for output in outputs)):
        place = folder.resolve()
        if place in own or (folder != root and any(read.is_relative_to(place) for read in own)):
            raise ConfigError(
                f"{folder} is where the checkpoint is read from; the run would write into it",
                hint="choose another output_path",
            )


def _stages(
    source: Source, outlines: Sequence[Outline], outputs: Sequence[OutputPlan], downloads: int
) -> tuple[StagePlan, ...]:
    """The steps of the run in order; a stage that several methods share stands once."""
    shared = {stage.name: stage for outline in outlines for stage in outline.stages}
    scanned = all(file.sha256 for file in source.files)
    stages = [StagePlan(name="download", writes=downloads, peak_ram=0, done=not downloads)]
    stages.append(StagePlan(name="scan", writes=0, peak_ram=100 << 20, done=scanned))
    stages += shared.values()
    for output in outputs:
        size = sum(file.bytes for file in output.files)
        stages.append(StagePlan(name=output.id, writes=size, peak_ram=output.peak_ram, done=output.done))
    weights = sum(file.bytes for file in source.files if file.name.endswith(".safetensors"))
    stages.append(StagePlan(name="judge", writes=0, peak_ram=weights + (2 << 30), done=False))
    return tuple(stages)


def _peak_disk(stages: Sequence[StagePlan], outputs: Sequence[OutputPlan], *, bounded: bool) -> int:
    """Bytes that the steps still to do write; of levels that are deleted one after the other the largest alone."""
    waiting = sum(stage.writes for stage in stages if not stage.done)
    heavy = [
        sum(file.bytes for file in output.files if file.name.endswith((".gguf", ".safetensors")))
        for output in outputs
        if not output.done
    ]
    return waiting - sum(heavy) + max(heavy, default=0) if bounded else waiting


def _advice(source: Source, config: Config) -> list[str]:
    settings = config.validation
    notes = [
        f"validation.{name} has no effect: validation.checks leaves {name} out"
        for name in registry.names("checks")
        if settings.checks is not None and name in settings.model_fields_set and name not in settings.checks
    ]
    if source.facts.parameters < JUDGED_FROM and "*" not in config.validation.gates:
        notes.append(
            f"the default gates hold for models of {amount(JUDGED_FROM, '')} parameters and more; this one has "
            f"{amount(source.facts.parameters, '')}: set validation.gates if a sound level fails"
        )
    return notes


def check_disk(plan: Plan, root: Path) -> None:
    """DependencyError when the run would not fit."""
    if plan.peak_disk > plan.free_disk:
        raise DependencyError(
            f"the run writes {amount(plan.peak_disk, 'B')}, {amount(plan.free_disk, 'B')} are free in {root}",
            hint="free some, choose fewer levels, or set output_path to another disk",
        )


def versions() -> dict[str, str]:
    """Versions of quantool, Python's libraries and llama.cpp's commit that take part in a run."""
    from quantool import toolchain

    found = {"quantool": __version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        found["llama.cpp"] = toolchain.locate().commit or "unknown"
    except DependencyError:
        found["llama.cpp"] = "not installed"
    return found


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
