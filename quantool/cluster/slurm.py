"""Slurm: jobs are written and sent by submitit; what it refuses and what became of them, Slurm's own commands say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from quantool import __version__
from quantool.cluster.resources import GIB, NodeShape
from quantool.cluster.scheduler import JobState, StageOrder
from quantool.config.cluster import TIME, Cluster, Slurm
from quantool.errors import ConfigError, DependencyError
from quantool.runtime.progress import Progress, span
from quantool.runtime.workspace import write_text

ROUNDS = 3
"""Times that a job which reached its limit is begun again: every time it goes on where it was."""
NOTICE = 90
"""Seconds before its limit that a job is told of it."""
PATIENCE = 60
"""Seconds that Slurm may take to answer."""
IMMEDIATE = 20
"""Seconds that a probe of a node waits for one."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "SRUN_CPUS_PER_TASK": "$SLURM_CPUS_PER_TASK",  # srun does not take it from sbatch since 22.05
}
"""Of every job. Compute nodes have no internet; what they need was fetched before."""


class SlurmScheduler:
    """One site's Slurm."""

    def __init__(self, cluster: Cluster, output: Path) -> None:
        self.cluster = cluster
        self.settings = cluster.slurm or Slurm()
        self.output = output.absolute()
        self.folder = self.output / ".quantool" / "jobs"

    def node(self) -> NodeShape:
        """The largest node of the partition, as ``sinfo`` has it, under what the configuration says."""
        nodes = self._nodes()
        if not nodes:
            where = f"partition {self.settings.partition}" if self.settings.partition else "this Slurm"
            raise ConfigError(f"cluster.slurm: {where} has no nodes", hint="sinfo lists the partitions")
        given = self.cluster
        gpus = max(gpus for *_, gpus in nodes)
        if given.gpus_per_node and gpus < given.gpus_per_node:
            raise ConfigError(
                f"cluster.gpus_per_node is {given.gpus_per_node}, but nodes of partition "
                f"{self.settings.partition or '(default)'} have {gpus or 'no'} GPUs",
                hint="choose another partition (sinfo -o '%P %G' lists their GPUs), or set gpus_per_node: 0",
            )
        memory, own = given.memory_per_node, limit_minutes(self.settings.time)
        most = self._most_minutes()
        if own is not None and most is not None and own > most:
            raise ConfigError(
                f"cluster.slurm.time is {self.settings.time}, but the partition allows no more than {span(60 * most)}",
                hint="choose another partition, or leave time out",
            )
        return NodeShape(
            given.cpus_per_node or max(cpus for cpus, *_ in nodes),
            _bytes(memory) if memory else max(memory for _, memory, _ in nodes),
            gpus if given.gpus_per_node is None else given.gpus_per_node,
            own or most,
        )

    def _most_minutes(self) -> int | None:
        """The partition's limit of a job; None where it has none."""
        limits = [line[4] for line in self._lines()]
        found = [limit_minutes(text) for text in limits if re.fullmatch(TIME, text)]
        return max((minutes for minutes in found if minutes is not None), default=None)

    def _nodes(self) -> list[tuple[int, int, int]]:
        """Processors, bytes of memory and GPUs of the kinds of nodes in the partition."""
        found = []
        for line in self._lines():
            cpus, memory = (int(number.rstrip("+")) for number in line[1:3])
            gpus = sum(int(count) for count in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", line[3]))
            found.append((cpus, memory << 20, gpus))
        return found

    def _lines(self) -> list[list[str]]:
        """What ``sinfo`` says of the partition, or the default one: name, processors, memory, resources, limit."""
        chosen = ["-p", self.settings.partition] if self.settings.partition else []
        lines = [line.split("|") for line in self._ask("sinfo", "-h", "-o", "%P|%c|%m|%G|%l", *chosen)]
        return lines if chosen else [line for line in lines if line[0].endswith("*")] or lines

    def check(self, orders: Sequence[StageOrder], progress: Progress) -> None:
        """Let ``sbatch --test-only`` judge every kind of job, and a node, if one is free, look at the output folder."""
        for script in {_without_name(script): script for _, script in self._scripts(orders)}.values():
            self._refuse(script)
        self._probe(progress)

    def _refuse(self, script: str) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
            file.write(script)
            file.flush()
            tested = _run(["sbatch", "--test-only", file.name])
        if tested.returncode:
            raise ConfigError(
                f"Slurm refuses such jobs: {_one_line(tested.stderr)}",
                hint="see cluster.slurm: account, partition, qos, time, options; `quantool submit CONFIG --dry-run` shows them",
            )

    def _probe(self, progress: Progress) -> None:
        """Compare version and output folder as a compute node sees them; where none is free, the first job does."""
        token = self.folder / f"probe-{uuid.uuid4().hex}"
        write_text(token, __version__)
        request = ["srun", f"--immediate={IMMEDIATE}", "--ntasks=1", "--time=5", "--job-name=quantool-probe"]
        request += [f"--{name}={value}" for name, value in self._site().items() if name != "time"]
        program = ["-c", "from quantool.cluster.probe import main; main()", str(token)]
        try:
            probed = _run([*request, sys.executable, *program], 4 * PATIENCE)
        except DependencyError as error:
            progress.warn(f"{error.message}: no node was probed, the first job does it")
            return
        finally:
            token.unlink(missing_ok=True)
        told = next((line for line in probed.stdout.splitlines() if line.startswith('{"host"')), None)
        if told is None and ("nable to allocate" in probed.stderr or "expired" in probed.stderr):
            progress.say(f"no node is free to be probed, the first job does it ({_one_line(probed.stderr)})")
        elif told is None:
            raise DependencyError(
                f"a compute node cannot run quantool: {_one_line(probed.stderr) or 'it said nothing'}",
                hint=f"{sys.executable} and its libraries must be on a folder that compute nodes see",
            )
        else:
            compare_node(json.loads(told), self.output)

    def scripts(self, orders: Sequence[StageOrder]) -> str:
        """The batch scripts, each under the stage's name and what it waits for."""
        named = {order.stage: order for order in orders}
        parts = []
        for stage, script in self._scripts(orders):
            after = ", ".join(named[stage].after)
            parts.append(f"# === {stage}{f' (after {after})' if after else ''} ===\n{script}")
        return "\n".join(parts)

    def _scripts(self, orders: Sequence[StageOrder]) -> Iterator[tuple[str, str]]:
        for order in orders:
            made = self._executor([order], ())
            yield order.stage, made._make_submission_file_text(made._submitit_command_str, "")  # noqa: SLF001

    def submit(
        self, orders: Sequence[StageOrder], jobs: Mapping[str, str], keep: Callable[[str, str], None]
    ) -> None:
        """Send the stages; those that wait for the same ones as one array.

        Raises DependencyError with Slurm's own message where it takes no more of them; those sent before stay.
        """
        known = dict(jobs)
        left = list(orders)
        while left:
            ready = [order for order in left if not {other.stage for other in left} & {*order.after}]
            left = [order for order in left if order not in ready]
            for group in _alike(ready):
                needed = [known[name] for name in group[0].after if name in known]
                sent = _send(self._executor(group, needed), group)
                for order, job in zip(group, sent, strict=True):
                    known[order.stage] = job
                    keep(order.stage, job)

    def _executor(self, orders: Sequence[StageOrder], jobs: Sequence[str]) -> Any:
        """submitit's, for orders that are sent together, behind ``jobs``."""
        try:
            from submitit import SlurmExecutor
        except ImportError as error:
            raise DependencyError(
                "cluster.slurm needs submitit", hint="pip install 'quantool[cluster]'"
            ) from error
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise DependencyError(NO_SLURM, hint=WHERE)
        first, most = orders[0].needs, self._most_minutes()
        minutes = max(order.needs.minutes for order in orders)
        memory = max(order.needs.memory for order in orders)
        site = self._site()
        further: dict[str, Any] = {"kill-on-invalid-dep": "yes", "requeue": True, **self.settings.options}
        further |= {name: site[name] for name in ("time", "reservation") if name in site}
        executor = SlurmExecutor(self.folder / "%j", max_num_timeout=ROUNDS)
        wanted: dict[str, Any] = {
            "job_name": f"quantool {orders[0].stage}" if len(orders) == 1 else f"quantool {_kind(orders)}",
            "time": limit_minutes(self.settings.time) or min(minutes, most or minutes),
            "cpus_per_task": max(order.needs.cpus for order in orders),
            "mem": f"{memory // GIB}G",
            "gpus_per_node": first.gpus or None,
            "dependency": "afterok:" + ":".join(jobs) if jobs else None,
            "setup": [
                *(f"export {name}={value}" for name, value in ENVIRONMENT.items()),
                *self.settings.setup,
            ],
            "signal_delay_s": NOTICE,
            "stderr_to_stdout": True,
            "additional_parameters": further,
        }
        wanted |= {
            name: value
            for name, value in site.items()
            if name in ("account", "partition", "qos", "constraint")
        }
        executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
        return executor

    def _site(self) -> dict[str, str]:
        """What the configuration says of the site, by sbatch's names."""
        names = ("account", "partition", "qos", "time", "constraint", "reservation")
        found = {name: getattr(self.settings, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """Those of ``jobs`` that wait or run, from ``squeue``."""
        wanted = set(jobs)
        found = {}
        for line in self._ask("squeue", "--noheader", "--me", "--array", "--format=%i|%T|%L|%N|%r"):
            number, state, left, node, reason = line.split("|", 4)
            if number in wanted:
                found[number] = JobState(state.lower().replace("completing", "running"), left, node, reason)
        return found

    def _ask(self, *words: str) -> list[str]:
        """Lines that a command of Slurm's prints; DependencyError with its own message where it fails."""
        if shutil.which(words[0]) is None:
            raise DependencyError(NO_SLURM, hint=WHERE)
        answered = _run([*words])
        if answered.returncode:
            raise DependencyError(f"{words[0]}: {_one_line(answered.stderr)}")
        return [line for line in answered.stdout.splitlines() if line]


NO_SLURM = "there is no Slurm here: sbatch, srun, sinfo and squeue are not all to be found"
WHERE = "run `quantool submit` on a login node of the cluster"


def compare_node(seen: Mapping[str, Any], output: Path) -> None:
    """Raise DependencyError for what a compute node (``probe.look``) sees otherwise than this machine."""
    if not seen["sees"]:
        raise DependencyError(
            f"{seen['host']} does not see {output}",
            hint="set output_path to a folder on the shared file system",
        )
    if seen["quantool"] != __version__:
        raise DependencyError(
            f"quantool is {__version__} here and {seen['quantool']} on {seen['host']}",
            hint="let both use the same environment, on a folder that both see",
        )


def _send(executor: Any, orders: Sequence[StageOrder]) -> list[str]:
    """The jobs of orders sent as one array; DependencyError where sbatch refuses it."""
    from submitit.core.utils import FailedJobError

    try:
        with executor.batch():
            sent = [executor.submit(order.work) for order in orders]
    except FailedJobError as error:
        raise DependencyError(
            f"Slurm did not take {', '.join(order.stage for order in orders)}: {_one_line(str(error))}",
            hint="what was sent before goes on; `quantool submit` again sends what is missing",
        ) from error
    return [str(job.job_id) for job in sent]


def limit_minutes(text: str | None) -> int | None:
    """Minutes of a limit as sbatch(1) reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours…; at least one."""
    if text is None:
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return max(1, (int(days or 0) * 24 + hours) * 60 + minutes + (1 if seconds else 0))


def _bytes(text: str) -> int:
    return int(text[:-1]) << (30 if text[-1] == "G" else 40)


def _alike(orders: Sequence[StageOrder]) -> list[list[StageOrder]]:
    """Orders that may be one array: behind the same jobs, of the same kind, with the same GPUs and processors."""

    def kind(order: StageOrder) -> tuple[Any, ...]:
        return (order.after, order.stage.partition(" ")[0], order.needs.gpus, order.needs.cpus)

    return [list(group) for _, group in groupby(sorted(orders, key=kind), kind)]


def _kind(orders: Sequence[StageOrder]) -> str:
    return orders[0].stage.partition(" ")[0]


def _without_name(script: str) -> str:
    return re.sub(r"(?m)^#SBATCH --job-name=.*$", "", script)


def _one_line(text: str) -> str:
    """What a command complained of, without its own name and in one line."""
    lines = [re.sub(r"^(sbatch|srun|squeue|sinfo): (error: )?", "", line) for line in text.splitlines()]
    return "; ".join(line.strip() for line in lines if line.strip())


def _run(words: Sequence[str], seconds: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """A command of Slurm's that has ended, well or not; DependencyError for one that does not in so many seconds."""
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DependencyError(f"{words[0]} did not answer in {seconds:.0f} s") from error
