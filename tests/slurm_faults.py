"""Faults of a cluster at random points: ``python -m tests.slurm_faults [--faults 20] [--seed 0] [--config FILE] [--publish]``.

A run is submitted to a real Slurm on this machine; jobs are cancelled, their steps killed, requeued, the node drained, the
controller killed and begun again, until so many faults have been. After those that end jobs, ``quantool submit`` sends what is
missing. At the end all bytes and findings are those of ``quantool run``, and no finished stage was done twice. The exit code is
1 when any of that does not hold. With ``--publish`` what passed goes to a Hub on loopback in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kills import (
    MARK,
    ROOT,
    SETTINGS,
    cold_cache,
    contents,
    findings,
    finished,
    half_named,
    parts,
    run,
)
from tests.loopback_hub import serving
from tests.one_node import OneNode, missing, one_node, steps
from tests.pushing import WritableHub

PAUSE = (1.0, 9.0)
"""Seconds between two faults, drawn evenly."""
ENDS = 900.0
"""Seconds that the rest of a run may take."""


@dataclass
class Campaign:
    """What happened, and what should not have."""

    slurm: OneNode
    dice: random.Random
    output: Path
    words: tuple[str, ...]
    variables: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    done: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def quantool(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line at the root of the checkout."""
        ended = subprocess.run(
            [sys.executable, "-m", "quantool", *words],
            cwd=ROOT, env=self.slurm.environment() | self.variables, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL, timeout=ENDS,
        )  # fmt: skip
        if check and ended.returncode:
            self.faults.append(f"{words[0]} ended with {ended.returncode}: {ended.stderr}")
        return ended

    def submit(self) -> str:
        return self.quantool("submit", *self.words, "--quiet").stdout

    def stages(self) -> list[dict[str, Any]]:
        ended = self.quantool("status", str(self.output), "--json")
        known: list[dict[str, Any]] = json.loads(ended.stdout or "[]")
        return known

    def jobs(self, state: str) -> list[str]:
        lines = self.slurm.ask("squeue", "-h", "--array", "-o", "%i %T").splitlines()
        return [line.split()[0] for line in lines if line.endswith(state)]

    def cancel(self) -> bool:
        """Cancel a job that runs or waits."""
        jobs = self.jobs("RUNNING") + self.jobs("PENDING")
        if jobs:
            self.slurm.ask("scancel", self.dice.choice(jobs))
        return bool(jobs)

    def kill_step(self) -> bool:
        """Kill what minds a job's step."""
        alive = steps(self.slurm.folder)
        if alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.dice.choice(alive), signal.SIGKILL)
        return bool(alive)

    def requeue(self) -> bool:
        """Begin a running job again."""
        jobs = self.jobs("RUNNING")
        with contextlib.suppress(subprocess.CalledProcessError):  # it has ended meanwhile
            for job in jobs[:1]:
                self.slurm.ask("scontrol", "requeue", job)
        return bool(jobs)

    def drain(self) -> bool:
        """Take the node out of service for a while."""
        self.slurm.ask("scontrol", "update", "nodename=localhost", "state=drain", "reason=test")
        time.sleep(self.dice.uniform(1, 5))
        self.slurm.ask("scontrol", "update", "nodename=localhost", "state=resume")
        return True

    def restart(self) -> bool:
        """Kill the controller and begin it again."""
        self.slurm.kill("slurmctld")
        time.sleep(self.dice.uniform(0, 3))
        self.slurm.begin("slurmctld")
        self.slurm.wait_idle()
        return True

    def disturb(self) -> None:
        """One fault, and what the folder says after it."""
        kinds: tuple[Callable[[], bool], ...] = (
            self.cancel, self.kill_step, self.requeue, self.drain, self.restart,
        )  # fmt: skip
        fault = kinds[sum(self.counts.values()) % len(kinds)]
        for _ in range(40):
            if fault():
                break
            time.sleep(0.25)
        self.counts[fault.__name__] += 1
        self.look(fault.__name__)

    def look(self, what: str) -> None:
        """Compare what was finished before with what is there."""
        now = finished(self.output)
        if redone := [name for name, known in self.done.items() if now.get(name) != known]:
            self.faults.append(f"{what}: done again: {redone}")
        self.done = now

    def again(self) -> bool:
        """Send what is missing as long as there is anything; whether a stage still goes on."""
        phases = {stage["phase"] for stage in self.stages()}
        if phases & {"failed", "held back"}:
            time.sleep(0.5)  # what it leaves to die dies
            self.submit()
            return True
        return bool(phases & {"waiting", "running"})


def campaign(folder: Path, settings: dict[str, Any], faults: int, seed: int, *, publish: bool) -> Campaign:
    """Disturb runs of ``settings`` until there were so many ``faults``; compare each with ``quantool run``."""
    file = folder / "run.yaml"
    file.write_text(json.dumps(settings | {"cluster": {"slurm": {"partition": "main"}}}))  # JSON is YAML
    undisturbed = folder / "undisturbed"
    for earlier in (undisturbed, *folder.glob("run-*/")):
        shutil.rmtree(
            earlier, ignore_errors=True
        )  # one that is packed already is judged by its SHA256SUMS as well
    words = ("run", str(file), "--set", f"output_path={undisturbed}", "--set", "push_to_hub=false")
    cache = folder / "undisturbed.cache"  # of an earlier campaign, it is warm
    ended, seconds = run(words, cache if cache.exists() else cold_cache(cache), folder / "undisturbed.err")
    if ended.code not in (0, 5):
        sys.exit(f"the undisturbed run ended with {ended.code}:\n{ended.err}")
    print(f"quantool run: {seconds:.0f} s", flush=True)
    expected = contents(undisturbed)
    hub = WritableHub()
    with contextlib.ExitStack() as stack:
        slurm = stack.enter_context(one_node(folder / "slurm"))
        variables = {MARK: "slurm", "XDG_CACHE_HOME": str(cache)}
        pushing = ("--set", f"push_to_hub={str(publish).lower()}")
        if publish:
            stack.enter_context(serving(hub))
            variables |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        rounds, total = 0, Campaign(slurm, random.Random(seed), folder, (), {})
        while not rounds or sum(total.counts.values()) < faults:
            rounds += 1
            output = folder / f"run-{rounds}"
            began = time.monotonic()
            one = Campaign(
                slurm, total.dice, output, (str(file), "--set", f"output_path={output}", *pushing), variables,
                total.counts, total.faults,
            )  # fmt: skip
            one.submit()
            if one.faults:
                return total
            while one.again() and time.monotonic() - began < ENDS:
                if sum(total.counts.values()) < faults:
                    time.sleep(total.dice.uniform(*PAUSE))
                    one.disturb()
                else:
                    time.sleep(1)
            waited = one.quantool("status", str(output), "--wait", check=False)
            if waited.returncode != ended.code:
                one.faults.append(f"status --wait ended with {waited.returncode}: {waited.stderr}")
            one.look("the end")
            if wrong := half_named(output, expected):
                one.faults.append(f"not what it should be: {wrong}")
            if differing := {name for name, _ in contents(output).items() ^ expected.items()}:
                one.faults.append(f"other bytes: {sorted(differing)}")
            if findings(output) != findings(undisturbed):
                one.faults.append("other findings")
            if left := parts(output):
                one.faults.append(f"left behind: {left}")
            print(f"run {rounds}: {time.monotonic() - began:.0f} s, {dict(total.counts)}", flush=True)
            if publish:
                print(waited.stdout, *sorted(hub.repositories), sep="\n")
    return total


def main() -> int:
    """Disturb, count and tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="another run than GGUF, FP8 and AWQ of the tiny model")
    parser.add_argument("--publish", action="store_true", help="publish to a Hub on loopback")
    parser.add_argument("--folder", type=Path, help="work here and keep it; default: a temporary folder")
    options = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    settings = SETTINGS
    if options.config is not None:
        import yaml

        settings = yaml.safe_load(options.config.read_text())
    if options.publish:
        settings = settings | {
            "quantizations": [
                entry | {"repo_id": f"someone/{entry['method']}"} for entry in settings["quantizations"]
            ]
        }
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="quantool-slurm-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        total = campaign(folder.resolve(), settings, options.faults, options.seed, publish=options.publish)
    print(
        *total.faults,
        f"{sum(total.counts.values())} faults of the cluster, {len(total.faults)} of quantool",
        sep="\n",
    )
    return 1 if total.faults else 0


if __name__ == "__main__":
    sys.exit(main())
