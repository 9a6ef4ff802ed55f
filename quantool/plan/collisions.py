"""Outputs that would overwrite each other, the checkpoint, or the run's own records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantool.errors import ConfigError
from quantool.records import OutputPlan, Source

OWN_NAMES = {"logs", "records", "plots", "plan.json", "report.md", "report.json", "junit.xml"}
"""What a run keeps in the output folder beside the folders to publish."""

FILE_ENGINES = {"llama.cpp"}
"""Engines whose artifacts are files, several of which may share a folder."""


def refuse_collisions(outputs: Sequence[OutputPlan]) -> None:
    """ConfigError for outputs asked for twice, or two that would write one file or share one folder."""
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
    _refuse_shared_checkpoints(outputs)


def _refuse_shared_checkpoints(outputs: Sequence[OutputPlan]) -> None:
    """ConfigError for a checkpoint that would not have its folder for itself.

    A GGUF is one file among others; a checkpoint of transformers is its folder: configuration, tokenizer, index and card
    describe one model, and a second artifact beside it would be judged, described and downloaded as part of it.
    """
    for output in outputs:
        others = [other.id for other in outputs if other.repo == output.repo and other.id != output.id]
        if output.engine not in FILE_ENGINES and others:
            raise ConfigError(
                f"{output.id} is a checkpoint that needs the folder {output.repo} for itself, and {others[0]} goes there "
                "too",
                hint="give each entry of quantizations a repo_id of its own, or leave repo_id out",
            )


def refuse_own_folder(source: Source, root: Path, outputs: Sequence[OutputPlan]) -> None:
    """ConfigError when a run would write into the folder that it reads, or over its own records."""
    if taken := OWN_NAMES & {output.repo for output in outputs}:
        raise ConfigError(
            f"{min(taken)} cannot be the name of a repository: the output folder has its own {min(taken)}",
            hint="name it differently in repo_id",
        )
    own = {path.resolve() for path in (source.folder, source.tokenizer) if path is not None}
    if source.prepared is not None:
        found = (source.prepared.origin, source.prepared.adapter)
        own |= {origin.folder.resolve() for origin in found if origin is not None}
    own |= {(source.folder / file.name).resolve().parent for file in source.files}  # behind links
    for folder in (root, *(root / output.repo for output in outputs)):
        place = folder.resolve()
        if place in own or (folder != root and any(read.is_relative_to(place) for read in own)):
            raise ConfigError(
                f"{folder} is where the checkpoint is read from; the run would write into it",
                hint="choose another output_path",
            )
