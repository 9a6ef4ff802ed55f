"""A real Slurm on this machine: controller and one node of Debian's packages, in a folder, with ports of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol")
CONF = """\
ClusterName=one
SlurmctldHost=localhost
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={controller}
SlurmdPort={node}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=3
NodeName=localhost CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=localhost MaxTime=5 State=UP
"""


def missing() -> str:
    """Why no Slurm can be started here; empty where one can."""
    absent = [
        name for name in COMMANDS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()
    ]
    if absent:
        return f"{', '.join(absent)} not installed (Debian's slurmctld, slurmd, slurm-client and munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started by root alone"


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass(frozen=True)
class OneNode:
    """A running Slurm."""

    folder: Path

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def ask(self, *words: str) -> str:
        """Output of a command of Slurm's; CalledProcessError where it fails."""
        return subprocess.run(
            words, env=self.environment(), capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def begin(self, daemon: str) -> None:
        """Start ``slurmctld`` or ``slurmd``."""
        path = shutil.which(daemon) or f"/usr/sbin/{daemon}"
        subprocess.run([path], env=self.environment(), check=True, stdin=subprocess.DEVNULL)

    def process(self, daemon: str) -> int:
        return int((self.folder / f"{daemon}.pid").read_text())

    def kill(self, daemon: str) -> None:
        """Kill a daemon, and wait until it is gone."""
        process = self.process(daemon)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        while Path(f"/proc/{process}").exists():
            time.sleep(0.02)

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Wait until the node takes jobs."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(subprocess.CalledProcessError):
                if self.ask("sinfo", "-h", "-p", "main", "-o", "%T").strip() in (
                    "idle",
                    "mixed",
                    "allocated",
                ):
                    return
            if time.monotonic() > until:
                raise TimeoutError((self.folder / "slurmctld.log").read_text()[-2000:])
            time.sleep(0.1)


@contextlib.contextmanager
def one_node(folder: Path) -> Iterator[OneNode]:
    """Start a Slurm in ``folder``; all jobs and daemons end with the block."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    slurm = OneNode(folder)
    slurm.conf.write_text(
        CONF.format(
            folder=folder, controller=_port(), node=_port(), cpus=os.cpu_count(), memory=int(0.8 * room) >> 20
        )
    )
    _munge()
    try:
        slurm.begin("slurmctld")
        slurm.begin("slurmd")
        slurm.wait_idle()
        yield slurm
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            slurm.ask("scancel", "--signal=KILL", "--full", "-u", "root")
            slurm.ask("scancel", "-u", "root")
        for daemon in ("slurmctld", "slurmd"):
            with contextlib.suppress(OSError, ValueError):
                slurm.kill(daemon)
        for step in steps(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(step, signal.SIGKILL)


def steps(folder: Path) -> list[int]:
    """The processes (``slurmstepd``) that mind the steps of jobs of the Slurm in ``folder``."""
    wanted = f"SLURM_CONF={folder / 'slurm.conf'}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_step = entry.name.isdigit() and b"slurmstepd" in (entry / "cmdline").read_bytes()
            if is_step and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def _munge() -> None:
    """The authentication service, started as Debian does it, unless one runs."""
    if Path("/run/munge/munge.socket.2").exists():
        return
    for place in ("/run/munge", "/var/lib/munge", "/var/log/munge"):
        Path(place).mkdir(exist_ok=True)
        shutil.chown(place, "munge", "munge")
    Path("/run/munge").chmod(0o755)
    subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "/usr/sbin/munged"], check=True)
