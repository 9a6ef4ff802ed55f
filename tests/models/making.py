"""GGUF files that several tests share: made once a session by quantool's own methods and by llama.cpp's tools."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import pickle
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest
import structures

from quantool import pipeline
from quantool.config.schema import Config
from quantool.plan.make import make_plan
from quantool.records import Artifact, FileRecord, Plan
from quantool.run.making import make_one
from quantool.runtime import process, toolchain
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Report
from quantool.runtime.workspace import Workspace
from quantool.source.prepare import prepare
from quantool.source.resolve import overlay, resolve
from quantool.source.scan import scan_source

MODELS = Path(__file__).resolve().parent
TINY = MODELS / "tiny-chat"
TEXT = MODELS / "text"
CALIBRATION = TEXT / "calibration.txt"
QWEN2 = {"pre_tokenizer": "qwen2"}
QUIET = Progress(quiet=True)
ROOM = "QUANTOOL_TESTS_ROOM"
P = ParamSpec("P")
T = TypeVar("T")
SMALL = "one-layer"
"""The SentencePiece Llama without its second layer: quantizing to one bit takes seconds a layer."""


@cache
def room() -> Path:
    """A folder for the session, which pytest-xdist's processes share: whoever starts them has called this before."""
    if ROOM not in os.environ:
        made = tempfile.TemporaryDirectory(prefix="quantool-making-")
        atexit.register(made.cleanup)
        os.environ[ROOM] = made.name
    return Path(os.environ[ROOM])


def shared(make: Callable[P, T]) -> Callable[P, T]:
    """Make something once a session for each list of arguments, in whichever process needs it first.

    The others wait for it. Arguments need a ``repr`` that tells them apart, the result is pickled. What fails is tried
    again by the next.
    """
    kept: dict[str, T] = {}

    @wraps(make)
    def get(*arguments: P.args, **named: P.kwargs) -> T:
        digest = hashlib.sha256(repr((arguments, named)).encode()).hexdigest()[:16]
        if digest not in kept:
            file = room() / f"{make.__module__}.{make.__qualname__}-{digest}.pickle"
            with file.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not file.exists():
                    file.write_bytes(pickle.dumps(make(*arguments, **named)))
                kept[digest] = pickle.loads(file.read_bytes())  # noqa: S301 - our own
        return kept[digest]

    return get


@shared
def model(name: str) -> Path:
    """``tiny-chat``, ``SMALL``, or a structure of ``structures.py``, written once."""
    if name == "tiny-chat":
        return TINY
    if name == SMALL:
        return _one_layer(room() / name)
    written: Path = getattr(structures, f"write_{name}")(room() / name)
    return written


def _one_layer(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    structures.write_spm_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if ".layers.1." not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    settings = read_json(folder / "config.json") | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@contextmanager
def own_cache() -> Iterator[None]:
    """A user cache without rehearsals of earlier sessions, so that what is tested runs."""
    folder = room() / "cache" / "quantool"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("toolchain", "tools"):
        if (toolchain.cache_folder() / name).exists():
            with suppress(FileExistsError):  # another of pytest-xdist's processes was first
                (folder / name).symlink_to(toolchain.cache_folder() / name)
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder.parent)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def config(model: Path, output: Path, levels: str | Sequence[str], **keys: Any) -> Config:
    """A configuration of the method gguf, unless ``keys`` names another."""
    options = QWEN2 | keys.pop("quantization_config", {})
    named = {"method": "gguf", "quant_level": levels if isinstance(levels, str) else list(levels)}
    return Config.model_validate(
        {"model_id": str(model), "output_path": output, "quantization_config": options} | named | keys
    )


def make(wanted: Config) -> tuple[Plan, list[Artifact]]:
    """What ``pipeline.run`` does, without judging and packaging."""
    workspace = Workspace(wanted.output_path)
    with workspace.lock():
        source = resolve(wanted, weights=True, progress=QUIET)
        source = prepare(overlay(source, workspace.work / "source"), workspace, QUIET)
        source = scan_source(source, workspace, QUIET)
        plan = make_plan(wanted, source, workspace)
        return plan, [make_one(wanted, plan, one, workspace, QUIET) for one in plan.outputs]


@dataclass(frozen=True)
class Made:
    """A base and the levels made from it without judging them."""

    checkpoint: Path
    root: Path
    plan: Plan
    artifacts: tuple[Artifact, ...]

    @property
    def base(self) -> Path:
        """The unquantized GGUF."""
        return next(self.root.glob(".quantool/work/base-*/base.gguf"))

    @property
    def folder(self) -> Path:
        """The folder to publish."""
        return self.artifacts[0].folder

    @property
    def matrix(self) -> Path:
        """The importance matrix."""
        return self.folder / self.artifacts[0].shared[0].name


def recorded(output: Path) -> Made:
    """``tiny-chat`` at Q4_K_M by the fake method, which must be installed: records without files."""
    wanted = config(TINY, output, "Q4_K_M", method="fake", repo_id="us/tiny-chat-GGUF")
    plan = pipeline.plan(wanted.model_copy(update={"quantization_config": {}}), QUIET)
    (one,) = plan.outputs
    files = [FileRecord(name=file.name, bytes=file.bytes, sha256="ab" * 32) for file in one.files]
    artifact = Artifact(
        output=one.id, method=one.method, level=one.level, folder=output / one.repo, files=tuple(files),
        bits_per_weight=one.bits_per_weight, seconds=1.0,
    )  # fmt: skip
    return Made(TINY, output, plan, (artifact,))


@shared
def made(name: str) -> Made:
    """Q4_K_M with a computed importance matrix of ``tiny-chat``, ``moe`` or ``SMALL``."""
    root = room() / f"made-{name}"
    wanted = config(
        model(name),
        root,
        "Q4_K_M",
        quantization_config={"imatrix": True},
        dataset_path=CALIBRATION,
        calibration_config={"max_tokens": 12 * 512},
    )
    with own_cache():
        plan, artifacts = make(wanted)
    return Made(model(name), root, plan, tuple(artifacts))


def run(
    level: str, output: Path, matrix: Path | None = None, label: str = "", **settings: Any
) -> dict[str, Any]:
    """A request for ``_quantizer.quantize`` without its base."""
    plain: dict[str, Any] = {
        "tensor_types": {}, "output_tensor_type": None, "token_embedding_type": None, "pure": False,
        "leave_output_tensor": False, "keep_split": False, "allow_requantize": False, "threads": 2,
    }  # fmt: skip
    return {
        "output": str(output),
        "ftype": toolchain.levels()[level].ftype,
        "copy": level == "COPY",
        "settings": plain | settings,
        "imatrix": {"path": str(matrix), "label": label} if matrix else None,
    }


def quantized(base: Path, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Quantize ``base`` several times in one child."""
    request = {"base": str(base), "runs": list(runs)}
    found: list[dict[str, Any]] = process.call(several, request, log=room() / "several.log")["runs"]
    return found


NEEDS_MATRIX = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M", "Q2_K_S", "IQ3_XXS", "IQ3_XS")
"""Levels that llama-quantize refuses to make of ``SMALL`` without an importance matrix."""


@shared
def every_level() -> tuple[dict[str, Path], dict[str, Path]]:
    """All levels of ``SMALL`` made without an importance matrix (but those that need one), and with it."""
    one = made(SMALL)
    folder = room() / "levels"
    folder.mkdir(exist_ok=True)
    known = list(toolchain.levels())
    plain = {level: folder / f"{level}.gguf" for level in known if level not in NEEDS_MATRIX}
    weighed = {level: folder / f"{level}-weighed.gguf" for level in known}
    label = CALIBRATION.name
    runs = [run(level, path) for level, path in plain.items()]
    runs += [run(level, path, one.matrix, label) for level, path in weighed.items()]
    quantized(one.base, runs)
    return plain, weighed


@cache
def upstream(tool: str) -> Path:
    """A tool of llama.cpp; the test is skipped where `make tools` has not built it."""
    found = toolchain.upstream_tool(tool)
    if found is None:
        pytest.skip(f"{tool} is not built (make tools)")
    return found


def upstream_quantize(base: Path, output: Path, level: str, *options: str) -> Path:
    """What llama-quantize makes; ``options`` that name files are relative to the base's folder."""
    command = [str(upstream("llama-quantize")), *options, base.name, str(output), level, "2"]
    done = subprocess.run(
        command, cwd=base.parent, capture_output=True, text=True, check=False, env=process.environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def several(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """The child of ``quantized``."""
    from quantool.methods._llama_cpp.quantize import quantize

    return {"runs": [quantize(one | {"base": request["base"]}, report) for one in request["runs"]]}


def keys(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file."""
    from gguf import GGUFReader

    return {
        name: field.contents()
        for name, field in GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
