"""Libraries told by their files, and llama.cpp built with a C++ library of its own."""

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from quantool.errors import DependencyError
from quantool.runtime import builds, loading_trial, process


@pytest.fixture
def compiler() -> str:
    found = shutil.which("cc")
    if found is None:
        pytest.skip("needs a compiler")
    return found


def library(compiler: str, path: Path, *needs: str) -> Path:
    """A shared library that needs others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".c")
    source.write_text("int nothing(void) { return 0; }\n")
    command = [compiler, "-shared", "-fPIC", "-o", str(path), str(source), "-Wl,--no-as-needed", *needs]
    subprocess.run(command, check=True)
    return path


def test_what_a_library_needs(compiler: str, tmp_path: Path) -> None:
    assert "libm.so.6" in builds.needed(library(compiler, tmp_path / "a.so", "-lm"))
    assert "libm.so.6" not in builds.needed(library(compiler, tmp_path / "b.so"))
    (tmp_path / "text").write_text("no library")
    assert builds.needed(tmp_path / "text") == []


def test_a_worker_that_an_own_cxx_library_kills_names_it(
    compiler: str, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = importlib.import_module("quantool_fake").llama_crash
    with pytest.raises(Exception, match="ended by SIGSEGV without a result"):
        process.call(work, {}, log=tmp_path / "log")
    own = library(compiler, tmp_path / "lib" / "libllama.so")
    monkeypatch.setattr(builds, "_library", lambda package, name: own if package == "llama_cpp" else None)
    with pytest.raises(DependencyError, match=r"libllama.so holds a C\+\+ library of its own.*LD_PRELOAD="):
        process.call(work, {}, log=tmp_path / "log")


@pytest.mark.e2e
def test_llama_cpp_loads_beside_torch_here() -> None:
    assert loading_trial.loads_beside_torch() == "yes"


def test_a_trial_that_dies_says_why(
    plugin: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, tmp_path: Path
) -> None:
    own = library(compiler, tmp_path / "lib" / "libllama.so")
    monkeypatch.setattr(builds, "_library", lambda package, name: own if name == "libllama.so" else None)
    monkeypatch.setattr(loading_trial, "load", importlib.import_module("quantool_fake").llama_crash)
    assert loading_trial.loads_beside_torch().startswith("no: libllama.so holds a C++ library of its own")
