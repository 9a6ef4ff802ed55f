"""Handing packed folders to the Hub: those of a run that passed, or one that the user names later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from quantool.config.rules import AFTER_MERGE, NOT_YET
from quantool.config.schema import Config, Publish
from quantool.errors import ConfigError, PublicationError
from quantool.hub.client import publishing
from quantool.publish import preupload
from quantool.publish.packed_folder import (
    PackedFolder,
    destination,
    outgoing_files,
    read_packed_folder,
    require_complete,
    require_publishable,
)
from quantool.publish.permissions import preflight
from quantool.publish.push import DamagedUploadError, push
from quantool.records import Publication
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace, write_text


@dataclass(frozen=True)
class Order:
    """How a folder is to be published; None stands for what the run's configuration said."""

    repo_id: str | None = None
    private: bool | None = None
    settings: Publish | None = None
    allow_regression: bool = False
    """Whether artifacts that did not pass may go out. No configuration says this."""


def private_of(config: Config) -> bool | None:
    """What the user said; None (create as private, take an existing repository as it is) when nothing."""
    return config.private if "private" in config.model_fields_set else None


def publish_passed(
    config: Config, folders: Sequence[PackedFolder], order: Order, progress: Progress
) -> tuple[tuple[Publication, ...], tuple[PublicationError, ...]]:
    """Publish the folders without a failed artifact; one that the Hub refuses does not keep the next one back."""
    done, refused = [], []
    for packed in folders:
        failed = [report.artifact.output for report in packed.failed]
        if failed and not order.allow_regression:
            remark = (
                "; what was uploaded of the others is named by no commit, nobody can see it"
                if config.disk_bounded
                else ""
            )
            progress.warn(f"{packed.folder.name} is not published: {', '.join(failed)} did not pass{remark}")
            continue
        try:
            done.append(_deliver(packed, order, progress, hash_large=False))
        except PublicationError as error:
            refused.append(error)
    return tuple(done), tuple(refused)


def publish_folder(
    folder: Path, order: Order, given: Mapping[str, str | float | None], progress: Progress
) -> Publication:
    """Publish a folder that a run packed.

    ``given`` are keys of ``publish`` from the command line; they take the place of what the run's configuration said.
    """
    packed = read_packed_folder(folder.absolute())
    require_publishable(packed, allow_regression=order.allow_regression)
    order = replace(
        order,
        repo_id=destination(packed, order.repo_id),
        private=packed.private if order.private is None else order.private,
        settings=_overridden(packed.settings, given),
    )
    workspace = Workspace(packed.folder.parent)
    require_complete(_with_uploads(packed, order, workspace))
    preflight({order.repo_id or "": order.private}, order.settings)
    with workspace.lock() if workspace.state.is_dir() else nullcontext():  # elsewhere no run can be writing
        return _deliver(packed, order, progress, hash_large=True)


def _overridden(settings: Publish, given: Mapping[str, str | float | None]) -> Publish:
    """The settings with those of the command line over them; ConfigError for some that cannot be."""
    from_command_line = {key: value for key, value in given.items() if value is not None}
    before = settings.model_dump(exclude_unset=True)
    if from_command_line.get("mode") == "pull_request":  # tag and collection follow the merge
        before = {key: value for key, value in before.items() if key not in AFTER_MERGE}
    try:
        settings = Publish.model_validate(before | from_command_line)
    except ValidationError as error:
        keys = ", ".join(f"{entry['loc'][0]} {entry['input']!r}" for entry in error.errors())
        raise ConfigError(
            f"cannot publish like this: {keys}",
            hint="mode is commit or pull_request; no value is empty; time-outs are seconds up to 3600",
        ) from error
    if settings.mode == "pull_request" and (late := [key for key in AFTER_MERGE if getattr(settings, key)]):
        raise ConfigError(f"{' and '.join(late)}: {NOT_YET}")
    return settings


def _with_uploads(packed: PackedFolder, order: Order, workspace: Workspace) -> PackedFolder:
    """The folder, knowing which of the files that are gone were uploaded to its repository."""
    gone = set(packed.missing)
    if not gone or (order.repo_id is None and len(packed.repo_ids) != 1):
        return packed
    files = [file for report in packed.reports for file in report.artifact.files if file.name in gone]
    names = preupload.recorded(workspace, destination(packed, order.repo_id), files)
    return replace(packed, uploaded=frozenset(names))


def _deliver(packed: PackedFolder, order: Order, progress: Progress, *, hash_large: bool) -> Publication:
    for report in packed.failed:
        progress.warn(
            f"{report.artifact.output} did not pass ({report.verdict()}) and is published all the same: "
            "--allow-regression"
        )
    require_publishable(packed, allow_regression=order.allow_regression)
    folder, workspace = packed.folder, Workspace(packed.folder.parent)
    repo_id = destination(packed, order.repo_id)
    packed = _with_uploads(replace(packed, settings=order.settings or packed.settings), order, workspace)
    files = outgoing_files(packed, progress, hash_large=hash_large)
    settings = packed.settings
    try:
        with publishing(settings.connect_timeout, settings.read_timeout):
            made = push(packed, files, repo_id, private=order.private, progress=progress)
    except DamagedUploadError as error:
        gone = [file.record for file in files if file.name in packed.uploaded]
        damaged = [file for file in gone if not error.names or file.name in error.names]
        preupload.forget(workspace, repo_id, folder, damaged)
        raise
    write_text(folder.parent / "records" / f"{folder.name}.publication.json", made.model_dump_json(indent=1))
    return made
