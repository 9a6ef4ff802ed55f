"""A method, a check and workers that need no model, installed as a third party would: by entry points.

``conftest.plugin`` copies this file to a folder of its own as ``quantool_fake``, with the metadata of a distribution.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from quantool.errors import PublicationError, QuantizationError, QuantoolError
from quantool.plugins.contract import Case, Job, Options, Outline, Request, check, method
from quantool.plugins.keys import Depends
from quantool.records import (
    Artifact,
    FileRecord,
    Finding,
    OutputPlan,
    PlannedFile,
    Verdict,
    fingerprint,
    sha256_of,
)
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Report
from quantool.runtime.workspace import written
from quantool.texts import inputs


class FakeOptions(Options):
    """What the fake method can be made to do."""

    divergence: float = Field(default=0.0001, description="What the check will measure.")
    only: str | None = Field(default=None, description="The level that the divergence holds for.")
    stem: str = Field(default="model", description="Start of the file names.")
    bytes: int = Field(default=64, description="Size that the plan states.")
    file: str | None = Field(default=None, description="The whole file name, for every level.")
    ending: str = Field(default="", description="Worker function to run; none: all is done in this process.")


def levels() -> dict[str, str]:
    """Two levels that have default gates."""
    return {"Q8_0": "eight bits", "Q4_K_M": "four bits"}


def outline(request: Request, options: FakeOptions) -> Outline:
    """One file a level."""
    return Outline(
        tuple(
            OutputPlan(
                id=f"fake/{level}",
                method="fake",
                level=level,
                options=options.model_dump(mode="json"),
                engine="llama.cpp",
                repo=request.repo_id.rpartition("/")[2] if request.repo_id else f"{request.source.name}-FAKE",
                repo_id=request.repo_id,
                files=(
                    PlannedFile(name=options.file or f"{options.stem}-{level}.gguf", bytes=options.bytes),
                ),
                bits_per_weight=8.0,
                peak_ram=1 << 20,
                gates=request.gates(level),
                done=request.workspace.recall(f"fake/{level}", _key(level, options)) is not None,
            )
            for level in request.levels
        ),
        warnings=("this is a fake",),
    )


def _text(level: str, options: FakeOptions) -> str:
    return f"{options.divergence if options.only in (None, level) else 0.0001}\n"


def _key(level: str, options: FakeOptions) -> str:
    return fingerprint(level, _text(level, options), options.file, options.stem)


@method("fake", options=FakeOptions, levels=levels, outline=outline)
def quantize(job: Job, options: FakeOptions, progress: Progress) -> Artifact:
    """Write the divergence into the level's file."""
    key = _key(job.output.level, options)
    if (kept := job.workspace.recall(job.output.id, key)) is not None:
        return Artifact.model_validate(kept)
    _note(job.workspace.root, f"made {job.output.level}")
    name = job.output.files[0].name
    with progress.bar(f"quantize {job.output.level}") as bar, written(job.folder / name) as part:
        text = _text(job.output.level, options)
        if options.ending:
            request, log = {"path": str(part), "text": text}, job.workspace.logs / "fake.log"
            process.call(globals()[options.ending], request, log=log, bar=bar)
        else:
            part.write_text(text, encoding="utf-8")
    path = job.folder / name
    artifact = Artifact(
        output=job.output.id,
        method="fake",
        level=job.output.level,
        folder=job.folder,
        files=(FileRecord(name=name, bytes=path.stat().st_size, sha256=sha256_of(path)),),
        bits_per_weight=8.0,
        seconds=0.0,
    )
    job.workspace.keep(job.output.id, key, [path], artifact.model_dump(mode="json"))
    return artifact


@check(
    "fakecheck",
    depends=Depends(fields=("validation.max_tokens",), inputs=(inputs.held_out,), gates=True),
)
def judge(case: Case, progress: Progress) -> list[Finding]:
    """Compare the number in the file with the level's limit.

    More text that is no summary.
    """
    _note(case.workspace.root, f"judged {case.name}")
    content, limit = case.artifact.read_bytes(), case.gates.max_mean_kld
    measured = 9.0 if content.startswith(b"GGUF") else float(content)
    verdict = Verdict.REGRESSION if limit is not None and measured > limit else Verdict.PASS
    return [
        Finding(
            check="fakecheck", metric="mean_kld", verdict=verdict, corpus="text", measured=measured,
            threshold=limit, detail="a fake",
        )
    ]  # fmt: skip


def _note(root: Path, line: str) -> None:
    with (root / "done.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def result(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Write the text, when there is one, and answer with the request."""
    report(1, 4)
    report(4, 4)
    if "path" in request:
        Path(request["path"]).write_text(request["text"], encoding="utf-8")
    return {"request": request, "process": os.getpid()}


def stderr(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Write to both streams and to the descriptors below them, and return the environment."""
    print("printed", flush=True)
    print("complained", file=sys.stderr, flush=True)
    os.write(1, b"below python\n")
    return dict(os.environ)


def registered(request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """A worker that has something done at its end, and prints half a line last."""
    atexit.register(Path(request["path"]).write_text, "done")
    atexit.register(sys.stdout.write, "last words")
    return {}


def loaded(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Tell what was imported before this worker began."""
    return {
        "modules": [name for name in ("torch", "transformers", "sklearn") if name in sys.modules],
        "forked": "fork_server" in sys.argv[0],
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "directory": str(Path.cwd()),
    }


def refuse(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Raise an error of quantool's."""
    raise PublicationError("the Hub is closed", hint="come back tomorrow")


class OwnError(QuantizationError):
    """A kind that the parent does not know."""


def refuse_in_own_words(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Raise an error of a kind derived from one of quantool's."""
    raise OwnError("level too low", hint="take a higher one")


def refuse_generally(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Raise an error of no kind at all."""
    raise QuantoolError("something is wrong")


def bug(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Raise what is a bug."""
    raise ValueError("seven is not eight")


def no_json(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Return what has no JSON form."""
    return {"path": Path("x")}


def full_disk(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Write to the device that is always full."""
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")
    return {}


def missing_library(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Import what is not there."""
    import no_such_library  # type: ignore[import-not-found]

    return dict(no_such_library.__dict__)


def gpu_fault(request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Raise what torch raises when a GPU is full or gone."""
    import torch

    if request["kind"] == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nSee documentation")
    raise RuntimeError(
        "CUDA error: unspecified launch failure\nmore" if request["kind"] == "gone" else "seven is not eight"
    )


def llama_crash(_request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Die as llama.cpp does."""
    print("llama_model_loader: loaded", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def steps(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Report two steps, and leave a file behind a wait."""
    report(1, 2)
    time.sleep(request.get("wait", 0))
    report(2, 2)
    if "touch" in request:
        Path(request["touch"]).touch()
    return {"number": request["number"]}


def end(request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Print many lines, then exit with a code or die by a signal, maybe in the middle of the answer."""
    for number in range(40):
        print(f"line {number}")
    sys.stdout.flush()
    if "answer" in request:
        os.write(int(sys.argv[2]), request["answer"].encode())
    if "code" in request:
        os._exit(request["code"])
    if request["signal"] == "ABRT":
        os.abort()
    os.kill(os.getpid(), request["signal"])
    return {}


def child(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Start a process of its own, note both process ids, report; then wait, or die when asked to."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pids = Path(request["pids"])
    pids.with_suffix(".part").write_text(f"{os.getpid()} {other.pid}", encoding="utf-8")
    pids.with_suffix(".part").replace(pids)
    report(1, 2)
    if request.get("die"):
        os.abort()
    time.sleep(600)
    return {}


def wait(request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """As a long quantization: begin the file, note the process id beside the output, sleep."""
    part = Path(request["path"])
    part.write_text("half", encoding="utf-8")
    note = part.parent.parent / "pid.tmp"
    note.write_text(str(os.getpid()), encoding="utf-8")
    note.replace(note.with_suffix(".txt"))
    time.sleep(600)
    return {}
