"""A run on a cluster: its stages are sent, watched, and what they made is published from here."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from quantool.attest.signature import require_signer
from quantool.attest.since import earlier_releases
from quantool.cluster.find_scheduler import find_scheduler
from quantool.cluster.graph import graph_of, waiting
from quantool.cluster.marks import (
    Mark,
    Outcome,
    RunOrder,
    forget_marks,
    mark_done,
    read_marks,
    read_order,
    save_order,
)
from quantool.cluster.resources import require_time, resources_of
from quantool.cluster.scheduler import Scheduler, StageOrder
from quantool.cluster.status import Phase, Progressing, phases, table
from quantool.config.cluster import Cluster
from quantool.config.schema import Config
from quantool.errors import BY_NAME, ConfigError, DependencyError, QuantizationError
from quantool.pipeline import RunResult, ask_hub
from quantool.plugins import find
from quantool.publish.package import pack
from quantool.publish.publish import Order, private_of, publish_passed
from quantool.records import Plan
from quantool.run import judging
from quantool.run.preparing import planned_to_submit
from quantool.run.stages import StageJob, config_of, done_stages, order_of, require_devices
from quantool.runtime import claims, gpus
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import WHOLE_RUN, Workspace
from quantool.texts import corpus

POLL = 10.0
"""Seconds between two looks at a scheduler."""
PATIENCE = 30
"""Looks in a row that a scheduler may fail to answer: a controller that is restarted takes minutes."""


def submit(config: Config, progress: Progress, *, dry_run: bool = False) -> str:
    """Send the stages that are neither done nor on their way; what to tell the user, or with ``dry_run`` what would be sent.

    Raises ConfigError or DependencyError before anything is sent for what the scheduler, the plan or a compute node says.
    """
    cluster = _cluster_of(config)
    judging.checks_of(config)
    require_signer(config.sign)
    require_devices(config)
    scheduler = find_scheduler(cluster, config.output_path)
    scheduler.node()  # says what is missing before anything is planned
    if config.push_to_hub and not dry_run:
        ask_hub(config)
    workspace = Workspace(config.output_path.absolute())
    if dry_run:
        return _send(config, workspace, scheduler, progress, dry_run=True)
    with workspace.submission():
        return _send(config, workspace, scheduler, progress, dry_run=False)


def _cluster_of(config: Config) -> Cluster:
    if config.cluster is None:
        raise ConfigError(
            "the configuration names no cluster",
            hint="add for example  cluster: {slurm: {account: …, qos: …}},  or use `quantool run`",
        )
    if config.disk_bounded:
        raise ConfigError(
            "disk_bounded uploads level by level, which compute nodes cannot",
            hint="drop it, or use `quantool run`",
        )
    return config.cluster


def _send(
    config: Config, workspace: Workspace, scheduler: Scheduler, progress: Progress, *, dry_run: bool
) -> str:
    before = read_order(workspace)
    alive = _alive(before, scheduler, read_marks(workspace))
    if before is not None and alive and not dry_run:
        _refuse_another(before, config, alive)
    node, cluster = scheduler.node(), _cluster_of(config)
    with progress.whole(), gpus.of_nodes(node.gpus):  # a login node has none
        plan, machine = planned_to_submit(config, workspace, progress, fetch=not dry_run)
        if not dry_run:
            _fetch(config, plan)
    graph = graph_of(plan, config)
    done = done_stages(config, plan, machine, workspace, graph)
    todo = [stage for stage in waiting(graph, done) if stage.name not in alive]
    if not todo and alive:
        return f"{shown(config.output_path)}\nnothing to send: {len(alive)} stages are on their way already"
    if not todo:
        if not dry_run:  # what `status` goes by, and where `status --wait` publishes to
            save_order(workspace, order_of(config, plan, graph, machine.seconds, cluster.name))
            mark_done(workspace, [stage.name for stage in graph])
        return _nothing_to_send(config)
    needed = resources_of(todo, plan, config, node)
    require_time(needed, node.minutes, "cluster.slurm.time" if _own_time(cluster) else "the partition")
    going = {stage.name for stage in todo} | alive.keys()
    orders = [
        StageOrder(
            stage.name,
            StageJob(str(workspace.root), stage.name),
            needed[stage.name],
            tuple(name for name in stage.after if name in going),
        )
        for stage in todo
    ]
    if dry_run:
        return scheduler.scripts(orders)
    scheduler.check(orders, progress)
    seconds = {name: each.seconds for name, each in needed.items()}
    order = order_of(config, plan, graph, seconds, cluster.name)
    _Sent(workspace, order, alive).send(
        scheduler, orders, [each.name for each in graph if each.name not in going]
    )
    return (
        f"{shown(config.output_path)}\n"
        f"sent {len(orders)} stages; follow them: quantool status {config.output_path} (--wait)"
    )


def _own_time(cluster: Cluster) -> bool:
    return cluster.slurm is not None and cluster.slurm.time is not None


def _fetch(config: Config, plan: Plan) -> None:
    """Bring data sets that texts and tasks come from into this machine's caches; the weights are there."""
    calibration = corpus.calibration_corpus(config)
    for text in (*corpus.corpora(config), *([calibration] if calibration is not None else [])):
        if text.dataset is not None:
            corpus.read(text, characters=1, cache_dir=config.dataset_cache_dir)
    for check in find.active_checks(config, plan.source.facts.task).values():
        if check.fetch is not None:
            check.fetch(config, plan.source)


def _alive(order: RunOrder | None, scheduler: Scheduler, marks: Mapping[str, Mark]) -> dict[str, str]:
    """The stages whose jobs wait or run, with these."""
    if order is None:
        return {}
    jobs = {stage.name: stage.job for stage in order.stages if stage.job is not None}
    known = scheduler.states([*jobs.values()])
    done = {
        name for name, mark in marks.items() if mark.outcome is Outcome.DONE
    }  # its job may be ending still
    return {name: job for name, job in jobs.items() if job in known and name not in done}


def _refuse_another(before: RunOrder, config: Config, alive: dict[str, str]) -> None:
    """DependencyError when what is on its way was ordered by another configuration."""
    if before.config != config.model_dump(mode="json", exclude_unset=True):
        raise DependencyError(
            f"{len(alive)} stages of another configuration are on their way in {config.output_path}: "
            f"{', '.join(f'{name} ({job})' for name, job in list(alive.items())[:4])}",
            hint="wait for them or cancel them (scancel), or choose another output_path",
        )


def _nothing_to_send(config: Config) -> str:
    end = (
        f"quantool status {config.output_path} --wait"
        if config.push_to_hub
        else str(config.output_path / "report.md")
    )
    return f"nothing to send: everything is done; see {end}"


class _Sent:
    """The order of a submission, kept anew with every job that a stage gets: a killed submit loses none."""

    def __init__(self, workspace: Workspace, order: RunOrder, alive: dict[str, str]) -> None:
        self.workspace, self.alive = workspace, alive
        self.jobs = dict(alive)
        self.order = order

    def send(self, scheduler: Scheduler, orders: Sequence[StageOrder], done: Sequence[str]) -> None:
        """Send the orders; ``done`` are stages that need none."""
        self._save()
        forget_marks(self.workspace, [order.stage for order in orders])
        mark_done(self.workspace, done)
        scheduler.submit(orders, self.alive, self._keep)

    def _keep(self, stage: str, job: str) -> None:
        self.jobs[stage] = job
        self._save()

    def _save(self) -> None:
        stages = (stage.model_copy(update={"job": self.jobs.get(stage.name)}) for stage in self.order.stages)
        save_order(self.workspace, self.order.model_copy(update={"stages": tuple(stages)}))


def look(output: Path) -> tuple[Progressing, ...]:
    """Where the stages of the run in an output folder are. Raises ConfigError where there is none."""
    workspace = Workspace(output.absolute())
    order = read_order(workspace)
    if order is None:
        raise ConfigError(f"no run was begun in {output}", hint="give the output_path of a run")
    jobs = {}
    if order.engine:
        cluster = config_of(order, workspace.root).cluster
        if cluster is None:
            raise AssertionError
        sent = [stage.job for stage in order.stages if stage.job is not None]
        jobs = find_scheduler(cluster, output).states(sent)
    marks = read_marks(workspace)
    return phases(order, marks, jobs, is_run=not order.engine and WHOLE_RUN in workspace.holders())


def shown(output: Path, *, as_json: bool = False) -> str:
    """The stages as a table, or as JSON."""
    stages = look(output)
    if as_json:
        return json.dumps([asdict(stage) for stage in stages], indent=1, ensure_ascii=False)
    return table(stages)


def wait(output: Path, progress: Progress, *, allow_regression: bool = False) -> RunResult:
    """Wait until no stage goes on, then publish what passed if that was configured.

    Raises the error of a stage that failed; whatever was packed nevertheless is published before.
    """
    stages = _watched(output, progress)
    workspace = Workspace(output.absolute())
    order = read_order(workspace)
    if order is None:
        raise AssertionError
    plan = Plan.model_validate_json((workspace.root / "plan.json").read_bytes())
    found = (judging.saved_report(workspace, each.id) for each in plan.outputs)
    result = RunResult(plan, tuple(report for report in found if report is not None))
    config = config_of(order, workspace.root)
    if config.push_to_hub:
        _wait_for_claims(workspace)
        ready = {stage.name.removeprefix("pack ") for stage in stages if stage.phase is Phase.DONE}
        with workspace.lock():  # packed anew: what changed since the release before is told by the Hub alone
            packed = pack(plan, result.reports, workspace, ready, earlier_releases(config, plan, progress))
            orders = Order(private=private_of(config), allow_regression=allow_regression)
            done, refused = publish_passed(config, packed, orders, progress)
        result = replace(result, publications=done, refused=refused)
    _raise_failed(stages, read_marks(workspace))
    return result


def _wait_for_claims(workspace: Workspace) -> None:
    """Let go by the claims of stages that have ended: a killed one's on another node lives until it lapses."""
    until = time.monotonic() + 2 * claims.LAPSE
    while any(name.startswith("stage ") for name in workspace.holders()) and time.monotonic() < until:
        time.sleep(claims.POLL)


def _watched(output: Path, progress: Progress) -> tuple[Progressing, ...]:
    """The stages once none of them goes on; says what changes."""
    known: dict[str, Phase] = {}
    silent = 0
    while True:
        try:
            stages = look(output)
        except DependencyError as error:  # Slurm's controller may be restarted
            silent += 1
            if silent > PATIENCE:
                raise
            progress.warn(f"{error.message}; looking again")
            time.sleep(POLL)
            continue
        silent = 0
        for stage in stages:
            if known.get(stage.name) is not stage.phase:
                known[stage.name] = stage.phase
                progress.say(
                    " ".join(filter(None, (f"{stage.name}: {stage.phase}", stage.place, stage.note)))
                )
        if not any(stage.phase.goes_on for stage in stages):
            return stages
        time.sleep(POLL)


def _raise_failed(stages: Sequence[Progressing], marks: dict[str, Mark]) -> None:
    failed = [stage for stage in stages if stage.phase in (Phase.FAILED, Phase.HELD)]
    first = next((stage for stage in failed if stage.phase is Phase.FAILED), None)
    if first is None:
        return
    mark = marks.get(first.name)
    kind = BY_NAME.get(mark.kind if mark is not None else "", QuantizationError)
    others = f" ({len(failed) - 1} more stages are not done)" if len(failed) > 1 else ""
    hint = mark.hint if mark is not None else ""
    raise kind(
        f"{first.name}: {first.note}{others}", hint=hint or "quantool submit CONFIG sends what is missing"
    )
