"""Publications to a Hub that fails in every way we know: what fails, how, when, and what is published.

``python -m tests.publish.campaign [COUNT [SKIP]]`` runs COUNT (300) of all cases, spread evenly, leaving the first SKIP
out, and prints the counts. Each is tried a second time without the fault, which has to complete it.
"""

from __future__ import annotations

import io
import itertools
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quantool.cli import main as command_line
from tests.loopback import ALWAYS, GGUFS, OTHERS, REPO, content, edit, hub_on_loopback, pack_fake
from tests.loopback_hub import Fault, Repository, sha256
from tests.pushing import SIGNATURE, WritableHub

SLUG = "org/mine-64f9a55bb3115b4f513ec026"
PARENT = "1" * 40
READ_TIMEOUT = 2.0  # s of silence; the default is 60
LIMIT = 180.0  # s that a publication may take with the default
EARLIER = {**OTHERS, GGUFS[0]: b"GGUF of the release before", "README.md": b"---\nlicense: mit\n---\n"}

SCENARIOS = {
    "new": ((), False),
    "update": ((), True),
    "tagged": (("--tag", "v1", "--collection", SLUG), True),
    "branch": (("--revision", "next"), True),
    "request": (("--mode", "pull_request"), True),
}
"""Words of the command, and whether the repository is there, with a release before."""

ENDPOINTS = {
    "GET /api/whoami-v2": tuple(SCENARIOS),
    "GET .*/revision/": tuple(SCENARIOS),
    "GET .*/refs$": ("tagged", "branch"),
    "GET /api/collections/": ("tagged",),
    "POST /api/repos/create": ("new",),
    f"GET .*/tree/{PARENT}": ("update", "tagged", "request"),
    f"GET .*/tree/(?!{PARENT})": tuple(SCENARIOS),
    "POST /api/validate-yaml": ("new", "update"),
    "POST .*/preupload/": ("new", "update", "request"),
    "POST .*/objects/batch": ("new", "update", "branch"),
    r"PUT /objects/": ("new", "update", "request"),
    "POST /verify": ("new", "update"),
    "POST .*/commit/": tuple(SCENARIOS),
    "POST .*/branch/": ("branch",),
    "POST .*/tag/": ("tagged",),
    "POST /api/collections/.*/items": ("tagged",),
    "GET .*/discussions": ("request",),
}
"""What can fail, and the scenarios in which it is asked."""
ONCE = "whoami|refs|collections|create|PARENT|validate|commit|branch|tag|discussions".replace(
    "PARENT", PARENT + "$"
)
"""Of these, what is asked once only."""

ODD = {
    "object": "{}", "list": "[]", "null": "null", "text": '"ok"', "number": "3", "objects": "[{}]", "lists": "[[]]",
    "html": "<html>proxy login</html>", "nothing": "", "deep": "[" * 100_000, "digits": "1" * 5000,
    "error": '{"error": "no"}', "keys": '{"files": [{}], "objects": [{}], "name": [], "sha": 3, "commitOid": "?"}',
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    **{f"status {status}": {"kind": "refuse", "status": status} for status in (400, 401, 403, 404, 409, 429, 500, 503)},
    "long wait": {"kind": "refuse", "status": 429, "headers": {"Retry-After": "3600"}},
    "long window": {"kind": "refuse", "status": 429, "headers": {"RateLimit": '"api";r=0;t=300'}},
    **{f"odd {name}": {"kind": "odd", "text": text} for name, text in ODD.items()},
    **{f"carried, odd {name}": {"kind": "odd", "text": ODD[name], "carried": True} for name in ("object", "html", "list")},
    **{
        ("carried, " if carried else "") + kind: {"kind": kind, "carried": carried}
        for kind in ("silence", "cut", "drip")
        for carried in (False, True)
    },
    "drop": {"kind": "drop"},
    "lose": {"kind": "lose"},
    "flip": {"kind": "flip"},
    "garble": {"kind": "garble"},
}  # fmt: skip
MOMENTS: dict[str, dict[str, Any]] = {"first": {}, "second": {"skip": 1}, "always": {"times": ALWAYS}}


@dataclass(frozen=True)
class Trial:
    """One publication, and what goes wrong with it."""

    scenario: str
    on: str
    mode: str
    moment: str

    def __str__(self) -> str:
        """For the name of a test."""
        return f"{self.scenario}: {self.on} {self.mode} {self.moment}"


def trials() -> list[Trial]:
    """All of them. Uploaded bytes alone can be flipped without a trace; listings and answers are JSON."""
    return [
        Trial(scenario, on, mode, moment)
        for on, scenarios in ENDPOINTS.items()
        for scenario, mode, moment in itertools.product(scenarios, MODES, MOMENTS)
        if (mode != "flip" or on.startswith("PUT")) and not (moment == "second" and re.search(ONCE, on))
    ]


def spread(count: int) -> list[Trial]:
    """``count`` trials that take every endpoint and mode into account: every n-th of all in a fixed shuffle."""
    every = sorted(trials(), key=lambda trial: sha256(str(trial).encode()))
    return every[:count]


@dataclass
class Outcome:
    """What became of a trial; ``faults`` are those of quantool."""

    code: int
    seconds: float
    fired: int
    faults: list[str] = field(default_factory=list)


def run(trial: Trial, packed: Path, root: Path) -> Outcome:
    """Publish with the fault, then without; ``packed`` is an output folder, copied below ``root``."""
    slept: list[float] = []
    with pytest.MonkeyPatch.context() as patch, hub_on_loopback(patch, slept.append) as hub:
        shutil.copytree(packed, root / "out")
        folder = root / "out" / "model-FAKE"
        edit(folder, lambda record: record["plan"]["config"].update(publish={"read_timeout": READ_TIMEOUT}))
        words, is_there = SCENARIOS[trial.scenario]
        old = dict(EARLIER) if is_there else {}
        hub.collections[SLUG] = []
        if is_there:
            hub.repositories[REPO] = Repository(old)
            hub.objects |= {sha256(text): text for name, text in EARLIER.items() if name.endswith(".gguf")}
        fault = Fault(trial.on, **MODES[trial.mode], **MOMENTS[trial.moment])
        hub.faults = [fault]
        started = time.monotonic()
        code, text = _publish(patch, folder, words)
        wall = time.monotonic() - started
        outcome = Outcome(code, wall + sum(slept), fault.fired)
        silences = fault.fired if MODES[trial.mode]["kind"] == "silence" else hub.given_up
        outcome.seconds += silences * (60 - READ_TIMEOUT)
        hub.faults = []
        complete = old | content(folder)
        outcome.faults += _wrong(hub, old, complete, trial, code)
        if outcome.seconds > LIMIT:
            outcome.faults.append(f"{outcome.seconds:.0f} s")
        for secret in (hub.token, SIGNATURE):
            if secret in text:
                outcome.faults.append("a secret in the output")
        if "Traceback" in text:
            outcome.faults.append("a traceback: " + text.strip().splitlines()[-1])
        elif code and "error: " not in text:
            outcome.faults.append("no error told")
        if code:
            again, text = _publish(patch, folder, words)
            if again or _shown(hub, trial).items() < content(folder).items():
                outcome.faults.append(f"the next try ends with {again}: {text.strip()[-300:]}")
    return outcome


def _publish(patch: pytest.MonkeyPatch, folder: Path, words: tuple[str, ...]) -> tuple[int, str]:
    patch.setattr(sys, "argv", ["quantool", "publish", str(folder), *words])
    text = io.StringIO()
    code: Any = 0
    with redirect_stdout(text), redirect_stderr(text):
        try:
            command_line()
        except SystemExit as ended:
            code = ended.code or 0
        except Exception as error:  # noqa: BLE001 - what the user would see as a traceback
            return 1, text.getvalue() + f"Traceback\n{type(error).__name__}: {error}"
    return code, text.getvalue()


def _shown(hub: WritableHub, trial: Trial) -> dict[str, bytes]:
    """The files of the branch or pull request that is published to."""
    repository = hub.repositories[REPO]
    if trial.scenario == "request":
        newest = max(name for name in repository.heads if name.startswith("refs/pr/"))
        return repository.at(newest)
    return repository.at("next" if trial.scenario == "branch" else "main")


def _wrong(
    hub: WritableHub, old: dict[str, bytes], complete: dict[str, bytes], trial: Trial, code: int
) -> Iterator[str]:
    repository = hub.repositories.get(REPO)
    if code not in (0, 6):
        yield f"exit code {code}"
    if repository is None:
        if code == 0:
            yield "nothing was published"
        return
    files = {name: text for name, text in repository.files.items() if old or name != ".gitattributes"}
    if files not in (old, complete):
        yield "main is neither old nor complete"
    made = [asked for asked in hub.sent("POST", "/commit/") if b"Take back" not in asked.body]
    heads = {repository.commit, *repository.heads.values(), *repository.history} - {PARENT}
    if len(heads) > 1 + (trial.mode == "flip"):
        yield f"{len(heads)} commits of {len(made)} tried"
    if code == 0 and not _shown(hub, trial).items() >= complete.items():
        yield "it says that it is published"
    if repository.tags and repository.at("v1") != complete:
        yield "the tag is on something else"


def main(count: int, skip: int = 0) -> int:
    """Run ``count`` trials after the first ``skip`` and print the counts; 1 when quantool had a fault."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # as pytest has it
    from tests.conftest import write_plugin

    codes: Counter[str] = Counter()
    wrong = 0
    longest = (0.0, "")
    chosen = spread(skip + count)[skip:]
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for name in ("packed", "plugin"):
            (home / name).mkdir()
        packed = pack_fake(home / "packed", write_plugin(home / "plugin"))
        for number, trial in enumerate(chosen):
            root = home / str(number)
            root.mkdir()
            outcome = run(trial, packed, root)
            shutil.rmtree(root)
            codes["not reached" if not outcome.fired else f"exit code {outcome.code}"] += 1
            longest = max(longest, (outcome.seconds, str(trial)))
            wrong += bool(outcome.faults)
            if outcome.faults:
                print(f"{trial}: {'; '.join(outcome.faults)}", flush=True)
    print(f"{len(chosen)} publications: {dict(codes)}, {wrong} with a fault of quantool")
    print(f"longest: {longest[0]:.0f} s ({longest[1]})")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:] or ["300"])))
