import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from quantool.errors import DependencyError
from quantool.runtime import toolchain
from quantool.runtime.toolchain import Level

QUANTIZE = """
struct quant_option { std::string name; llama_ftype ftype; std::string desc; };
static const std::vector<quant_option> QUANT_OPTIONS = {
    { "Q4_0",     LLAMA_FTYPE_MOSTLY_Q4_0,     " 4.34G, +0.4685 ppl @ Llama-3-8B",  },
    { "MXFP4_MOE",LLAMA_FTYPE_MOSTLY_MXFP4_MOE," MXFP4 MoE",  },
    { "Q4_K",     LLAMA_FTYPE_MOSTLY_Q4_K_M,   "alias for Q4_K_M", },
    { "Q4_K_M",   LLAMA_FTYPE_MOSTLY_Q4_K_M,   " 4.58G, +0.1754 ppl @ Llama-3-8B",  },
    { "F32",      LLAMA_FTYPE_ALL_F32,         "26.00G              @ 7B", },
    // Note: Ensure COPY comes after F32 to avoid ftype 0 from matching.
    { "COPY",     LLAMA_FTYPE_ALL_F32,         "only copy tensors, no quantizing",  },
};
    { "--not", 1, "an option" },
"""
VERSION = "0.9.1"
ROOT = f"llama_cpp_python-{VERSION}"
TREE = "vendor/llama.cpp/"
MEMBERS = {
    TREE + "convert_hf_to_gguf.py": "import conversion\n",
    TREE + "convert_lora_to_gguf.py": "import conversion\n",
    TREE + "LICENSE": "MIT\n",
    TREE + "tools/quantize/quantize.cpp": QUANTIZE,
    TREE + "conversion/__init__.py": "",
    TREE + "conversion/deep/llama.py": "x = 1\n",
    TREE + "gguf-py/gguf/constants.py": "y = 2\n",
    ".git/modules/vendor/llama.cpp/HEAD": "0c1e57098bba43ac29e6e3b677cdceebdd22334f\n",
}
OTHERS = {
    ".git/HEAD": "ref: refs/heads/main\n",
    "convert_hf_to_gguf.py": "not this one\n",
    "llama_cpp/llama.py": "",
    TREE + "src/llama.cpp": "int main;",
    TREE + "conversion/notes.md": "",
    TREE + "gguf-py/tests/test.py": "",
    TREE + "conversion/../../../../../escaped.py": "gotcha",
}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is installed, nothing is named, and version 0.9.1 of the library is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_PATH", raising=False)
    monkeypatch.setattr(toolchain, "version", lambda _name: VERSION)
    toolchain.levels.cache_clear()
    yield
    toolchain.levels.cache_clear()


def write_sdist(path: Path, members: Mapping[str, str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as package:
        for name, text in members.items():
            member = tarfile.TarInfo(f"{ROOT}/{name}")
            member.size = len(text.encode())
            package.addfile(member, io.BytesIO(text.encode()))
        folder = tarfile.TarInfo(f"{ROOT}/{TREE}conversion/folder.py")
        folder.type = tarfile.DIRTYPE
        package.addfile(folder)
    return path


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    return write_sdist(tmp_path / f"{ROOT}.tar.gz", {**OTHERS, **MEMBERS})


def write_checkout(folder: Path) -> Path:
    for name, text in MEMBERS.items():
        if name.startswith(TREE):
            path = folder / name.removeprefix(TREE)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


def test_only_the_wanted_files_are_installed(tmp_path: Path, sdist: Path) -> None:
    made = toolchain.install(sdist)
    assert made.folder == tmp_path / "cache" / "quantool" / "toolchain" / f"llama-cpp-python-{VERSION}"
    found = {
        str(path.relative_to(made.folder)): path.read_text()
        for path in made.folder.rglob("*")
        if path.is_file() and path.name != "toolchain.json"
    }
    assert found == {name.removeprefix(TREE): text for name, text in MEMBERS.items() if name.startswith(TREE)}
    assert list(tmp_path.rglob("escaped.py")) == []
    assert made.commit == "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
    assert toolchain.locate() == made
    assert made.converter.read_text() == "import conversion\n"


def test_what_was_installed_is_written_down(sdist: Path) -> None:
    made = toolchain.install(sdist)
    manifest = json.loads((made.folder / "toolchain.json").read_text())
    digest = subprocess.run(
        ["sha256sum", str(sdist)], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    assert manifest == {
        "distribution": f"llama-cpp-python-{VERSION}",
        "commit": made.commit,
        "sdist_sha256": digest,
    }


def test_installing_again_replaces_all(sdist: Path) -> None:
    made = toolchain.install(sdist)
    before = toolchain.fingerprint_of(made)
    write_sdist(sdist, {**MEMBERS, TREE + "conversion/__init__.py": "new = 1\n"})
    again = toolchain.install(sdist)
    assert not (again.folder / "conversion" / "old.py").exists()
    assert (again.folder / "conversion" / "__init__.py").read_text() == "new = 1\n"
    assert toolchain.fingerprint_of(again) != before


def test_two_at_once_leave_a_whole_toolchain(sdist: Path) -> None:
    """One of them may not sweep away what the other is writing."""
    with ThreadPoolExecutor(8) as lanes:
        made = list(lanes.map(lambda _: toolchain.install(sdist), range(24)))
    alone = toolchain.fingerprint_of(toolchain.install(sdist))
    assert {toolchain.fingerprint_of(each) for each in made} == {alone}
    assert [path.name for path in made[0].folder.parent.iterdir() if path.name.endswith(".part")] == []


def test_a_package_that_does_not_tell_its_commit(sdist: Path) -> None:
    write_sdist(sdist, {name: text for name, text in MEMBERS.items() if name.startswith(TREE)})
    assert toolchain.install(sdist).commit is None
    assert toolchain.locate().commit is None


@pytest.mark.parametrize(
    "name", ["llama_cpp_python-0.9.0.tar.gz", "llama_cpp_python-0.9.1.zip", "xllamacpp-0.9.1.tar.gz"]
)
def test_the_package_of_something_else(sdist: Path, name: str) -> None:
    other = sdist.rename(sdist.with_name(name))
    with pytest.raises(
        DependencyError, match=f"{name} is not the source package of the installed llama-cpp-python-0.9.1"
    ):
        toolchain.install(other)


def test_a_package_with_the_other_spelling_of_its_name(sdist: Path) -> None:
    toolchain.install(sdist.rename(sdist.with_name(f"llama-cpp-python-{VERSION}.tar.gz")))


def test_a_package_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="does not exist"):
        toolchain.install(tmp_path / f"{ROOT}.tar.gz")


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def garbled(content: bytes) -> bytes:
    return content[:40] + bytes(40) + content[80:]


def no_archive(_content: bytes) -> bytes:
    return b"<html>404</html>"


def no_tar(_content: bytes) -> bytes:
    return gzip.compress(b"just text, but compressed" * 100)


@pytest.mark.parametrize("damage", [truncated, garbled, no_archive, no_tar, lambda _content: b""])
def test_a_damaged_package_changes_nothing(tmp_path: Path, sdist: Path, damage: type) -> None:
    toolchain.install(sdist)
    sdist.write_bytes(damage(sdist.read_bytes()))
    with pytest.raises(DependencyError, match=f"{sdist} is damaged"):
        toolchain.install(sdist)
    assert toolchain.locate().converter.is_file()
    assert [path.name for path in (tmp_path / "cache" / "quantool" / "toolchain").iterdir()] == [
        f"llama-cpp-python-{VERSION}"
    ]


@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        (TREE + "convert_hf_to_gguf.py", "convert_hf_to_gguf.py"),
        (TREE + "convert_lora_to_gguf.py", "convert_lora_to_gguf.py"),
        (TREE + "tools/quantize/quantize.cpp", "tools/quantize/quantize.cpp"),
        (TREE + "conversion/", "conversion"),
        (
            TREE,
            "convert_hf_to_gguf.py, convert_lora_to_gguf.py, LICENSE, tools/quantize/quantize.cpp, conversion, gguf-py/gguf",
        ),
    ],
)
def test_a_package_without_its_parts(sdist: Path, lacking: str, named: str) -> None:
    write_sdist(sdist, {name: text for name, text in MEMBERS.items() if not name.startswith(lacking)})
    with pytest.raises(DependencyError, match=f"holds no {named}$"):
        toolchain.install(sdist)
    with pytest.raises(DependencyError, match="is not installed"):
        toolchain.locate()


def test_a_cache_that_cannot_be_written(tmp_path: Path, sdist: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(DependencyError, match="cannot write"):
        toolchain.install(sdist)


def stand_in_for_pip(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Tests have no network."""
    (folder / "pip").mkdir()
    (folder / "pip" / "__init__.py").touch()
    (folder / "pip" / "__main__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in_for_pip(monkeypatch, tmp_path, "import sys; sys.exit('ERROR: no such version')")
    with pytest.raises(
        DependencyError, match=r"source package of llama-cpp-python==0\.9\.1.*no such version"
    ) as caught:
        toolchain.install()
    assert "quantool toolchain install --sdist FILE" in caught.value.hint


def test_a_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sdist: Path) -> None:
    stand_in_for_pip(
        monkeypatch,
        tmp_path,
        "import shutil, sys; w = sys.argv; assert w[1] == 'download' and w[-1] == 'llama-cpp-python==0.9.1';"
        f"shutil.copy({str(sdist)!r}, w[w.index('--dest') + 1])",
    )
    assert toolchain.install().converter.is_file()


def test_nothing_installed_says_what_to_do() -> None:
    for ask in (toolchain.locate, toolchain.levels):
        with pytest.raises(
            DependencyError, match=r"converter for llama-cpp-python 0\.9\.1 is not installed"
        ) as caught:
            ask()
        assert "quantool toolchain install" in caught.value.hint


def test_the_toolchain_of_another_version_is_not_used(sdist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain.install(sdist)
    monkeypatch.setattr(toolchain, "version", lambda _name: "0.9.2")
    with pytest.raises(DependencyError, match=r"0\.9\.2 is not installed"):
        toolchain.locate()


def test_no_library_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(toolchain, "version", missing)
    with pytest.raises(DependencyError, match="llama-cpp-python is not installed") as caught:
        toolchain.locate()
    assert caught.value.hint == "pip install llama-cpp-python"


def test_a_checkout_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_PATH", str(write_checkout(tmp_path / "llama.cpp")))
    located = toolchain.locate()
    assert (located.folder, located.commit, located.origin) == (
        tmp_path / "llama.cpp",
        None,
        "llama_cpp_path",
    )
    assert "Q4_K_M" in toolchain.levels()


def test_a_checkout_named_in_the_configuration_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_PATH", str(tmp_path / "nowhere"))
    assert toolchain.locate(write_checkout(tmp_path / "llama.cpp")).folder == tmp_path / "llama.cpp"


def test_a_checkout_tells_its_commit(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path / "llama.cpp")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    told = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert toolchain.locate(folder).commit == told.stdout.strip()


@pytest.mark.parametrize("lacking", ["convert_hf_to_gguf.py", "conversion", "everything"])
def test_a_folder_that_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    folder = write_checkout(tmp_path / "llama.cpp")
    (folder if lacking == "everything" else folder / lacking).rename(tmp_path / "away")
    monkeypatch.setenv("LLAMA_CPP_PATH", str(folder))
    with pytest.raises(DependencyError, match=f"{folder} holds no convert_hf_to_gguf.py") as caught:
        toolchain.locate()
    assert "LLAMA_CPP_PATH" in caught.value.hint


def test_levels_are_those_of_the_installed_library(
    tmp_path: Path, sdist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another checkout brings its converter; levels are made by the library, whatever the checkout knows."""
    toolchain.install(sdist)
    folder = write_checkout(tmp_path / "llama.cpp")
    (folder / "tools" / "quantize" / "quantize.cpp").write_text(QUANTIZE.replace("Q4_0", "Q4_9"))
    monkeypatch.setenv("LLAMA_CPP_PATH", str(folder))
    assert "Q4_9" not in toolchain.levels()


def test_levels_in_their_order(sdist: Path) -> None:
    """Parsed from text, so that a new llama.cpp brings its new levels."""
    toolchain.install(sdist)
    assert toolchain.levels() == {
        "Q4_0": Level("Q4_0", "MOSTLY_Q4_0", "4.34G, +0.4685 ppl @ Llama-3-8B"),
        "MXFP4_MOE": Level("MXFP4_MOE", "MOSTLY_MXFP4_MOE", "MXFP4 MoE"),
        "Q4_K": Level("Q4_K", "MOSTLY_Q4_K_M", "alias for Q4_K_M"),
        "Q4_K_M": Level("Q4_K_M", "MOSTLY_Q4_K_M", "4.58G, +0.1754 ppl @ Llama-3-8B"),
        "F32": Level("F32", "ALL_F32", "26.00G              @ 7B"),
        "COPY": Level("COPY", "ALL_F32", "only copy tensors, no quantizing"),
    }
    assert list(toolchain.levels()) == ["Q4_0", "MXFP4_MOE", "Q4_K", "Q4_K_M", "F32", "COPY"]


@pytest.mark.parametrize("content", ["int main() {}", None])
def test_a_checkout_whose_levels_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    folder = write_checkout(tmp_path / "llama.cpp")
    source = folder / "tools" / "quantize" / "quantize.cpp"
    source.unlink() if content is None else source.write_text(content)
    monkeypatch.setenv("LLAMA_CPP_PATH", str(folder))
    with pytest.raises(DependencyError, match=f"no list of levels .*{re.escape(str(source))}"):
        toolchain.levels()


def test_the_fingerprint_follows_the_code(tmp_path: Path) -> None:
    found = set()
    for number, change in enumerate(["LICENSE", "conversion/__init__.py", "gguf-py/gguf/constants.py", None]):
        folder = write_checkout(tmp_path / str(number))
        if change is not None:
            (folder / change).write_text("z = 3\n")
        found.add(toolchain.fingerprint_of(toolchain.locate(folder)))
    assert len(found) == 3  # the licence is no code


# --- llama.cpp's own tools


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_tools_are_looked_for_in_a_checkout_then_the_cache_then_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert toolchain.upstream_tool("llama-server") is None
    on_path = executable(tmp_path / "bin" / "llama-server")
    assert toolchain.upstream_tool("llama-server") == on_path
    cached = executable(tmp_path / "cache" / "quantool" / "tools" / VERSION / "llama-server")
    assert toolchain.upstream_tool("llama-server") == cached
    built = executable(tmp_path / "llama.cpp" / "build" / "bin" / "llama-server")
    assert toolchain.upstream_tool("llama-server", tmp_path / "llama.cpp") == built
    monkeypatch.setenv("LLAMA_CPP_PATH", str(tmp_path / "llama.cpp"))
    assert toolchain.upstream_tool("llama-server") == built


def test_a_program_that_lies_in_the_working_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    executable(tmp_path / "build" / "bin" / "llama-server")
    executable(tmp_path / "bin" / "llama-server")
    monkeypatch.chdir(tmp_path)
    assert toolchain.upstream_tool("llama-server") is None


ASK = """
import json
from quantool.runtime import toolchain
tool = toolchain.upstream_tool("llama-quantize")
print(json.dumps([str(tool or ""), [[l.name, l.description] for l in toolchain.levels().values()]]))
"""


@pytest.mark.upstream
def test_the_levels_are_those_that_llama_quantize_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real cache, in a process that has never seen another
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    tool, ours = json.loads(done.stdout)
    if not tool:
        pytest.skip("llama-quantize is not built (make tools)")
    said = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False)
    text = (said.stdout + said.stderr).partition("allowed quantization types")[2]
    listed = re.findall(r"^ *(?:\d+  or  )?(\w+) *: *(.*?) *$", text, re.MULTILINE)
    assert len(listed) > 35
    assert [tuple(level) for level in ours] == listed
