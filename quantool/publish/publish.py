"""Handing packed folders to the Hub: those of a run that passed, or one that the user names later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from quantool.config.rules import AFTER_MERGE, NOT_YET
from quantool.config.schema import Config, Publish
from quantool.errors import ConfigError, PublicationError
from quantool.publish import preupload, push
from quantool.publish.failed_notice import allow
from quantool.publish.parcel import Parcel, destination, read_parcel
from quantool.publish.permissions import preflight
from quantool.records import Publication, Report, Verdict
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
    config: Config,
    reports: Sequence[Report],
    folders: Sequence[Path],
    order: Order,
    progress: Progress,
) -> tuple[tuple[Publication, ...], tuple[PublicationError, ...]]:
    """Publish the folders without a failed artifact; one that the Hub refuses does not keep the next one back."""
    done, refused = [], []
    for folder in folders:
        own = [report for report in reports if report.artifact.folder == folder]
        failed = [report.artifact.output for report in own if report.verdict() is not Verdict.PASS]
        if failed and not order.allow_regression:
            remark = (
                "; what was uploaded of the others is named by no commit, nobody can see it"
                if config.disk_bounded
                else ""
            )
            progress.warn(f"{folder.name} is not published: {', '.join(failed)} did not pass{remark}")
            continue
        try:
            done.append(_deliver(folder, order, own, progress))
        except PublicationError as error:
            refused.append(error)
    return tuple(done), tuple(refused)


def publish(folder: Path, order: Order, progress: Progress) -> Publication:
    """Publish a folder that a run packed."""
    folder = folder.absolute()
    workspace = Workspace(folder.parent)
    parcel = _parcel(folder, order, workspace)
    order = replace(
        order,
        repo_id=destination(parcel, order.repo_id),
        private=parcel.private if order.private is None else order.private,
        settings=order.settings or parcel.settings,
    )
    preflight({order.repo_id or "": order.private}, order.settings)
    with workspace.lock() if workspace.state.is_dir() else nullcontext():  # elsewhere no run can be writing
        return _deliver(folder, order, parcel.failed, progress)


def overridden(folder: Path, order: Order, given: Mapping[str, str | None]) -> Order:
    """The order with what was given on the command line in the place of what the folder's configuration said.

    Raises ConfigError for settings that cannot be.
    """
    said = {key: value for key, value in given.items() if value is not None}
    folder = folder.absolute()
    before = _parcel(folder, order, Workspace(folder.parent)).settings.model_dump(exclude_unset=True)
    if said.get("mode") == "pull_request":  # tag and collection follow the merge
        before = {key: value for key, value in before.items() if key not in AFTER_MERGE}
    try:
        settings = Publish.model_validate(before | said)
    except ValidationError as error:
        keys = ", ".join(f"{entry['loc'][0]} {entry['input']!r}" for entry in error.errors())
        raise ConfigError(
            f"cannot publish like this: {keys}", hint="mode is commit or pull_request; no value is empty"
        ) from error
    if settings.mode == "pull_request" and (asked := [key for key in AFTER_MERGE if getattr(settings, key)]):
        raise ConfigError(f"{' and '.join(asked)}: {NOT_YET}")
    return replace(order, settings=settings)


def _parcel(folder: Path, order: Order, workspace: Workspace) -> Parcel:
    return read_parcel(
        folder,
        repo_id=order.repo_id,
        allow_regression=order.allow_regression,
        recorded=partial(preupload.recorded, workspace),
    )


def _deliver(folder: Path, order: Order, reports: Sequence[Report], progress: Progress) -> Publication:
    workspace = Workspace(folder.parent)
    if order.allow_regression:
        allow(folder, reports, progress)
    parcel = _parcel(folder, order, workspace)
    repo_id = destination(parcel, order.repo_id)
    parcel = replace(parcel, settings=order.settings or parcel.settings)
    try:
        made = push.publish(parcel, repo_id, private=order.private, progress=progress)
    except push.SpoiledError as error:
        sent = [upload.file for upload in parcel.uploads.values()]
        spoiled = [file for file in sent if not error.names or file.name in error.names]
        preupload.forget(workspace, repo_id, folder, spoiled)
        raise
    write_text(folder.parent / "records" / f"{folder.name}.publication.json", made.model_dump_json(indent=1))
    return made
