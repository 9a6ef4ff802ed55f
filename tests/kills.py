"""Random kills of a run: ``python -m tests.kills [--kills 50] [--seed 0] [--config FILE]``.

A run is killed again and again, begun anew each time, until it ends; then the next one begins in an empty folder. What is
killed is everything at once, the command alone, or one of its workers and fork servers. After each kill nothing of it is
alive and no file is half-written under its final name; whatever was finished stays untouched; at the end all bytes and
findings are those of an undisturbed run. The exit code is 1 when any of that does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantool.runtime import toolchain

ROOT = Path(__file__).parents[1]
MARK = "QUANTOOL_TESTS_RUN"
"""Environment variable by which the processes of one run are known, whoever their parent is."""
PATIENCE = 600.0
"""Seconds that an undisturbed rest of a run may take."""
DEATH = 5.0
"""Seconds after which nothing of a killed run may be alive."""
VOLATILE = {"seconds", "check_seconds", "peak_rss"}

Victim = Literal["everything", "command", "worker"]
VICTIMS: tuple[Victim, ...] = ("everything", "command", "worker")

SETTINGS: dict[str, Any] = {
    "model_id": "tests/models/tiny-chat",
    "quantizations": [
        {
            "method": "gguf",
            "quant_level": ["Q8_0", "Q4_K_M"],
            "quantization_config": {"pre_tokenizer": "qwen2", "imatrix": True},
        },
        {"method": "fp8", "quant_level": "FP8_DYNAMIC"},
        {"method": "awq", "quant_level": "W4A16", "quantization_config": {"n_grid": 4}},
    ],
    "dataset_path": "tests/models/text/calibration.jsonl",
    "sample_size": 4,
    "calibration_config": {"max_tokens": 2048, "max_seq_length": 128},
    "validation": {
        "max_tokens": 512,
        "context": 128,
        "checks": ["perplexity", "integrity", "overlap", "tokenizer", "chat_template", "behaviour"],
        "behaviour": {"max_new_tokens": 8},
        "corpora": [{"name": "docs", "path": "tests/models/text/heldout.en.txt"}],
        "gates": {"*": {"max_ln_ppl_ratio": 1, "max_mean_kld": 1, "min_same_top_p": 0.3}},
    },
}
MADE = re.compile(
    r".*\.(gguf|safetensors|npy|npz|jinja|png|yaml)|.*/(README\.md|(config|generation_config|tokenizer\w*)\.json)"
)
"""Files that are the same in every run, to the byte, wherever it works."""
PARTS = ".parts/"
"""Of a file that is not whole yet, kept for the next run; none is left at the end."""
OF_ALL = re.compile(r"plots-.*|base-scores-.*|findings-.*-integrity-.*")
"""Stages that depend on which of the others are finished: they may be done again."""


@dataclass
class Tally:
    """What happened, and what should not have."""

    kills: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    code: int
    err: str

    @property
    def stage(self) -> str:
        """What was being done last."""
        steps = re.findall(r"^\[\d+/\d+\] (.*?) \(", self.err, re.MULTILINE)
        return steps[-1] if steps else "before the first step"


def processes(mark: str) -> list[int]:
    """The living processes of a run."""
    wanted = f"{MARK}={mark}".encode()
    alive = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in alive if wanted in _environment(pid)]


def _environment(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):  # ended meanwhile; one that is dead but not reaped has none
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


@contextlib.contextmanager
def started(words: Sequence[str], mark: str, cache: Path, err: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command line at the root of the checkout, offline; whatever it leaves alive ends with the block."""
    with err.open("wb") as sink:
        child = subprocess.Popen(
            [sys.executable, "-m", "quantool", *words],
            cwd=ROOT,
            env=os.environ
            | {MARK: mark, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    try:
        yield child
    finally:
        for pid in processes(mark):
            _kill(pid)
        child.wait()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def run(words: Sequence[str], cache: Path, err: Path) -> tuple[Ended, float]:
    """A run that nobody disturbs, and its seconds."""
    begun = time.monotonic()
    with started(words, uuid.uuid4().hex, cache, err) as child:
        code = child.wait(PATIENCE)
    return Ended(code, err.read_text(errors="replace")), time.monotonic() - begun


def killed(
    words: Sequence[str], cache: Path, err: Path, victim: Victim, after: float, dice: random.Random
) -> tuple[Ended, list[int] | None]:
    """A run with ``victim`` killed ``after`` so many seconds, and the processes that outlived it too long.

    None for them: it ended before, and nothing was killed.
    """
    mark = uuid.uuid4().hex
    with started(words, mark, cache, err) as child:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return Ended(child.wait(after), err.read_text(errors="replace")), None
        alive = processes(mark)
        others = [pid for pid in alive if pid != child.pid]
        if victim == "worker" and others:
            _kill(dice.choice(others))
            code = child.wait(PATIENCE)
        elif victim == "everything":
            for pid in alive:
                _kill(pid)
            code = child.wait()
        else:
            child.kill()
            code = child.wait()
        until = time.monotonic() + DEATH
        while (orphans := processes(mark)) and time.monotonic() < until:
            time.sleep(0.01)
    return Ended(code, err.read_text(errors="replace")), orphans


def contents(output: Path) -> dict[str, bytes]:
    """The files that have to be the same in every run, by their path in the output folder."""
    files = (path for path in output.rglob("*") if path.is_file())
    return {
        name: path.read_bytes()
        for path in files
        if MADE.fullmatch(name := str(path.relative_to(output)))
        and not any(part.startswith(".") and part.endswith(".part") for part in Path(name).parts)
    }


def findings(output: Path) -> Any:
    """What the report says, without times and places."""
    return _lasting(json.loads((output / "report.json").read_text()))


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lasting(item) for key, item in value.items() if key not in VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def finished(output: Path) -> dict[str, tuple[int, bytes]]:
    """The stages' records and the files that they name: when each was written, and the record's bytes."""
    kept: dict[str, tuple[int, bytes]] = {}
    for record in (output / ".quantool/stages").glob("[!.]*.json"):
        if OF_ALL.fullmatch(record.name):
            continue
        kept[str(record)] = (record.stat().st_mtime_ns, record.read_bytes())
        for name in json.loads(record.read_bytes())["files"]:
            with contextlib.suppress(FileNotFoundError):
                kept[str(output / name)] = ((output / name).stat().st_mtime_ns, b"")
    return kept


def half_named(output: Path, expected: Mapping[str, bytes]) -> list[str]:
    """Files under their final names that are not what an undisturbed run makes, and JSON that is none."""
    made = ((name, content) for name, content in contents(output).items() if PARTS not in name)
    wrong = [name for name, content in made if expected.get(name) != content]
    for path in output.rglob("[!.]*.json"):
        if not any(part.endswith(".part") for part in path.parts):
            try:
                json.loads(path.read_bytes())
            except ValueError:
                wrong.append(str(path.relative_to(output)))
    return wrong


def parts(output: Path) -> list[str]:
    """What was being written."""
    return [str(path.relative_to(output)) for path in output.rglob("*.part")]


def chain(
    file: Path,
    undisturbed: Path,
    output: Path,
    cache: Path,
    tally: Tally,
    dice: random.Random,
    *,
    kills: int,
    span: float,
) -> int:
    """Kill one run, at most ``kills`` times, until it is done; returns how often it was.

    Each attempt is given a random part of ``span`` seconds. ``undisturbed`` is the output folder of a run with the same
    configuration.
    """
    expected = contents(undisturbed)
    words = ("run", str(file), "--set", f"output_path={output}")
    err = output.with_suffix(".err")
    done: dict[str, tuple[int, bytes]] = {}
    count = 0
    ended = Ended(-1, "")

    def fault(what: str) -> None:
        tally.faults.append(f"{output.name}, kill {count} ({ended.stage}): {what}")

    while count < kills and ended.code != 0:
        victim = dice.choice(VICTIMS)
        ended, orphans = killed(words, cache, err, victim, dice.uniform(0.2, span), dice)
        if orphans is None:
            if ended.code != 0:
                fault(f"ended with {ended.code}, and nothing was killed: {ended.err}")
            break
        tally.ends[f"{victim}: {ended.code}"] += 1
        count += 1
        tally.kills[victim] += 1
        tally.stages[ended.stage] += 1
        if orphans:
            fault(f"{len(orphans)} processes outlived it")
        if "Traceback" in ended.err:
            fault(f"traceback in {ended.err}")
        if ended.code >= 0 and (left := parts(output)):
            fault(f"left behind by a run that ended by itself: {left}")
        if wrong := half_named(output, expected):
            fault(f"not what it should be: {wrong}")
        now = finished(output)
        if redone := [name for name, known in done.items() if now.get(name) != known]:
            fault(f"done again: {redone}")
        done = now
    if ended.code != 0:
        ended, _ = run(words, cache, err)
    if ended.code != 0:
        fault(f"the last run ended with {ended.code}: {ended.err}")
        return count
    now = finished(output)
    if redone := [name for name, known in done.items() if now.get(name) != known]:
        fault(f"done again: {redone}")
    if left := parts(output):
        fault(f"left behind: {left}")
    actual = contents(output)
    if actual != expected:
        differing = {*actual, *expected} - {name for name in actual if expected.get(name) == actual[name]}
        fault(f"other bytes: {sorted(differing)}")
    if findings(output) != findings(undisturbed):
        fault("other findings")
    tally.runs += 1
    return count


def cold_cache(folder: Path) -> Path:
    """A user cache in which nothing was rehearsed yet, with llama.cpp's converter and tools."""
    own = folder / "quantool"
    own.mkdir(parents=True)
    for name in ("toolchain", "tools"):
        if (toolchain.cache_folder() / name).exists():
            (own / name).symlink_to(toolchain.cache_folder() / name)
    return folder


def main() -> int:
    """Kill, count and tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="another run than GGUF, FP8 and AWQ of the tiny model")
    parser.add_argument("--folder", type=Path, help="work here and keep it; default: a temporary folder")
    options = parser.parse_args()
    dice, tally = random.Random(options.seed), Tally()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="quantool-kills-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        file = options.config or folder / "run.yaml"
        if options.config is None:
            file.write_text(json.dumps(SETTINGS))  # JSON is YAML
        undisturbed = folder / "undisturbed"
        words = ("run", str(file), "--set", f"output_path={undisturbed}")
        ended, seconds = run(words, cold_cache(folder / "undisturbed.cache"), folder / "undisturbed.err")
        if ended.code != 0:
            sys.exit(f"the undisturbed run ended with {ended.code}:\n{ended.err}")
        print(f"undisturbed: {seconds:.0f} s")
        left, number = options.kills, 0
        while left > 0:
            number += 1
            known, cache = len(tally.faults), cold_cache(folder / f"run-{number}.cache")
            count = chain(
                file, undisturbed, folder / f"run-{number}", cache, tally, dice, kills=left, span=seconds / 3
            )
            left -= count
            if unfinished := parts(cache):
                tally.faults.append(f"run-{number}: left in the user cache: {unfinished}")
            print(f"run {number}: {count} kills", *tally.faults[known:], sep="\n  ", flush=True)
    for title, counts in (("killed", tally.kills), ("in", tally.stages), ("victim: exit code", tally.ends)):
        print(f"{title}:", ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    print(
        f"{sum(tally.kills.values())} kills, {tally.runs} runs ended as undisturbed, {len(tally.faults)} faults"
    )
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
