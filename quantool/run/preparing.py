"""From a configuration to a plan: the checkpoint is found, fetched, prepared and read, before anything is made of it."""

from __future__ import annotations

import json

from quantool.card.user_template import read_card_template
from quantool.config.schema import Config
from quantool.plan import make as planning
from quantool.plan.disk import check_disk, check_ram
from quantool.records import MachineState, Plan, Source
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace, write_text
from quantool.source.prepare import prepare, to_fetch
from quantool.source.prepare import recall as recall_prepared
from quantool.source.resolve import overlay, resolve
from quantool.source.scan import recall_scan, scan_source


def planned(config: Config, workspace: Workspace, progress: Progress) -> tuple[Plan, MachineState]:
    """The plan, with the source fetched and looked at; what a plan refuses is refused before weights are fetched."""
    with progress.step(f"read {config.model_id}"):
        source = resolve(config, weights=False, progress=progress)
        if missing := to_fetch(source):
            require_room(config, *checked_plan(config, source, workspace, downloads=missing))
        if source.commit is not None or missing:
            source = resolve(config, weights=True, progress=progress)
        source = overlay(source, workspace.work / "source")
    with progress.step("work out files, sizes and memory"):
        known = recall_scan(recall_prepared(source, workspace), workspace)
        plan, machine = checked_plan(config, known, workspace)
    require_room(config, plan, machine)
    source = prepare(source, workspace, progress)
    with progress.step("scan weights"):
        source = scan_source(source, workspace, progress)
    plan, machine = checked_plan(config, source, workspace)
    warned = _warned(workspace)
    for note in plan.warnings:
        if note not in warned:
            progress.warn(note)
    save_plan(plan, workspace)
    return plan, machine


def planned_beside_others(
    config: Config, workspace: Workspace, progress: Progress
) -> tuple[Plan, MachineState]:
    """The plan in one job of many, whose weights are on the shared folder; the first one reads and hashes them."""
    with progress.step(f"read {config.model_id}"):
        source = resolve(config, weights=True, progress=progress)
        source = prepare(overlay(source, workspace.work / "source"), workspace, progress)
    with progress.step("scan weights"):
        source = scan_source(source, workspace, progress)
    return checked_plan(config, source, workspace)


def planned_to_submit(
    config: Config, workspace: Workspace, progress: Progress, *, fetch: bool
) -> tuple[Plan, MachineState]:
    """The plan before stages are sent elsewhere: with ``fetch`` the weights are brought here, nobody has to have read them."""
    with progress.step(f"read {config.model_id}"):
        source = resolve(config, weights=False, progress=progress)
        missing = to_fetch(source)
        plan, machine = checked_plan(config, source, workspace, downloads=missing)
        check_disk(machine, config.output_path)
        if fetch and (source.commit is not None or missing):
            source = resolve(config, weights=True, progress=progress)
        if fetch:
            source = overlay(source, workspace.work / "source")
            source = recall_scan(recall_prepared(source, workspace), workspace)
            plan, machine = checked_plan(config, source, workspace)
            save_plan(plan, workspace)
    for note in plan.warnings:
        progress.warn(note)
    return plan, machine


def save_plan(plan: Plan, workspace: Workspace) -> None:
    """Keep the plan for those who look at the output folder later."""
    write_text(workspace.root / "plan.json", plan.model_dump_json(indent=1))


def require_room(config: Config, plan: Plan, machine: MachineState) -> None:
    """DependencyError when disk or memory of this machine do not hold what the plan needs."""
    check_disk(machine, config.output_path)
    check_ram(plan, machine, config)


def _warned(workspace: Workspace) -> frozenset[str]:
    """What an earlier run of this folder has warned of: once is enough, and ``plan.json`` keeps it."""
    try:
        saved = json.loads((workspace.root / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return frozenset()
    notes = saved.get("warnings") if isinstance(saved, dict) else None
    return (
        frozenset(note for note in notes if isinstance(note, str)) if isinstance(notes, list) else frozenset()
    )


def checked_plan(
    config: Config, source: Source, workspace: Workspace, *, downloads: int = 0
) -> tuple[Plan, MachineState]:
    """The plan of a configuration whose card template is one; ConfigError with file and line when it is none."""
    if config.card.template is not None:
        read_card_template(config.card.template)
    return planning.plan_here(config, source, workspace, downloads=downloads)
