"""A workstation as a cluster: one stage for each GPU at a time, begun by submitit as their predecessors end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.cluster.resources import NodeShape
from quantool.cluster.scheduler import JobState, StageOrder
from quantool.config.cluster import Cluster
from quantool.errors import DependencyError
from quantool.runtime import machine
from quantool.runtime.gpus import capabilities
from quantool.runtime.progress import Progress

POLL = 0.5
WEEK = 7 * 24 * 60
"""Minutes that a stage may take: nobody else waits for this machine."""


@dataclass(frozen=True)
class Foreman:
    """Begins stages as soon as those before them are done and a slot is free. One that fails holds back what follows it alone."""

    orders: tuple[StageOrder, ...]
    folder: Path
    slots: int
    gpus: int

    def __call__(self) -> None:
        """Begin and watch the stages until none is left to begin."""
        waiting, running = {order.stage: order for order in self.orders}, dict[int, tuple[str, Any]]()
        failed: set[str] = set()
        while waiting or running:
            for slot, (stage, job) in list(running.items()):
                if job.done():
                    del running[slot]
                    if job.exception() is not None:
                        failed.add(stage)
            for stage, order in list(
                waiting.items()
            ):  # in their order, so that one pass finds all that follow
                if failed & {*order.after}:
                    failed.add(stage)
                    del waiting[stage]
            busy = {stage for stage, _ in running.values()} | set(waiting)
            ready = [order for order in waiting.values() if not busy & {*order.after}]
            free = [slot for slot in range(self.slots) if slot not in running]
            for slot, order in zip(free, ready, strict=False):
                running[slot] = (order.stage, self._begin(order, slot))
                del waiting[order.stage]
            time.sleep(POLL)

    def _begin(self, order: StageOrder, slot: int) -> Any:
        executor = executor_of(self.folder)
        if self.gpus:
            executor.update_parameters(timeout_min=WEEK, gpus_per_node=1, visible_gpus=[slot % self.gpus])
        else:
            executor.update_parameters(timeout_min=WEEK)
        return executor.submit(order.work)


class LocalScheduler:
    """The machine that submits."""

    def __init__(self, cluster: Cluster, output: Path) -> None:
        self.cluster = cluster
        self.folder = output.absolute() / ".quantool" / "jobs"
        self.gpus = len(capabilities()) if cluster.gpus_per_node is None else cluster.gpus_per_node
        jobs = cluster.local.jobs if cluster.local is not None else None
        self.slots = jobs or max(1, self.gpus)

    def node(self) -> NodeShape:
        """One slot: its part of the processors, one GPU; memory is shared, and what does not fit is said by the stages."""
        cpus = self.cluster.cpus_per_node or machine.cores()
        return NodeShape(max(1, cpus // self.slots), machine.total_ram(), min(1, self.gpus))

    def check(self, orders: Sequence[StageOrder], progress: Progress) -> None:
        """Raise DependencyError without submitit."""
        del orders, progress
        executor_of(self.folder)

    def scripts(self, orders: Sequence[StageOrder]) -> str:
        """The stages in their order, in words: there are no scripts."""
        lines = [f"{order.stage} (after {', '.join(order.after) or 'nothing'})" for order in orders]
        return "\n".join([f"{self.slots} at once on this machine:", *lines])

    def submit(
        self, orders: Sequence[StageOrder], jobs: Mapping[str, str], keep: Callable[[str, str], None]
    ) -> None:
        """Let one process of its own begin the stages."""
        del jobs
        executor = executor_of(self.folder)
        executor.update_parameters(timeout_min=WEEK)
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited: it outlives the terminal
        try:
            job = executor.submit(Foreman(tuple(orders), self.folder, self.slots, self.gpus))
        finally:
            signal.signal(signal.SIGHUP, before)
        for order in orders:
            keep(order.stage, str(job.job_id))

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """Those whose process lives."""
        return {job: JobState("running", begins_again=False) for job in jobs if _lives(job)}


def executor_of(folder: Path) -> Any:
    """Submitit's executor for this machine; DependencyError without submitit."""
    try:
        from submitit import LocalExecutor
    except ImportError as error:
        raise DependencyError(
            "cluster.local needs submitit", hint="pip install 'quantool[cluster]'"
        ) from error
    return LocalExecutor(folder / "%j")


def _lives(job: str) -> bool:
    """Whether the process of a job of submitit's is there: its number is the job's name."""
    try:
        words = Path(f"/proc/{job}/cmdline").read_bytes()
        state = Path(f"/proc/{job}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return b"submitit" in words and state not in "ZX"
