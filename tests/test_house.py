"""The rules of the house, read from the code; and the wheel, built and looked into."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantool

ROOT = Path(__file__).parent.parent
FOLDERS = ("quantool", "methods", "validation")
HEAVY = {
    "torch",
    "transformers",
    "llama_cpp",
    "llmcompressor",
    "lm_eval",
    "datasets",
    "gguf",
    "matplotlib",
    "xllamacpp",
    "compressed_tensors",
}
PRINTING = {"progress.py", "cli.py"}
GROUND = (
    "quantool", "quantool.errors", "quantool.record", "quantool.origins", "quantool.ledger", "quantool.tasks",
    "quantool.records", "quantool.gates", "quantool.footprint",
)  # fmt: skip
ROOMS = (
    "ground", "runtime", "formats", "hub", "config", "texts", "source", "plugins", "plan", "report", "card",
    "attest", "publish", "cluster", "run", "app",
)  # fmt: skip
"""In the order of the house: a room imports from those before it, and from itself."""
PLUGINS_IMPORT = {"ground", "runtime", "config", "plugins"}
FEATURES_IMPORT = set(ROOMS[: ROOMS.index("plugins") + 1])
"""What methods and checks may use of the core."""
JUDGING = ("_findings", "_engines", "_cache", ("_score", "_chat", "_files", "_tasks", "_pooled"), "checks")
"""Inside validation, in order; those of one step do not know each other."""
MOST_FILES = 20
VAGUE = {"utils", "util", "helpers", "helper", "base", "manager", "common", "misc"}
LONGEST = 400

CORE = sorted((ROOT / "quantool").rglob("*.py"))
PLUGGED = sorted(path for folder in FOLDERS[1:] for path in (ROOT / folder).rglob("*.py"))
ALL = CORE + PLUGGED


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), label(path))


def nodes_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, those for type checkers left out."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from nodes_at_import(node.orelse)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef, ast.For, ast.While)):
            for name in ("body", "orelse", "finalbody"):
                yield from nodes_at_import(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from nodes_at_import(handler.body)


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement, or a call of import_module with a literal, brings."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [
            arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ]
    return []


def of_folder(name: str, folder: str) -> bool:
    return (
        name == folder
        or name.startswith((f"{folder}.", f"quantool.{folder}."))
        or name == f"quantool.{folder}"
    )


def module(path: Path) -> str:
    """The dotted name that a file is imported by."""
    parts = [part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__"]
    return ".".join(parts if parts[0] == "quantool" else ["quantool", *parts])


MODULES = {module(path): path for path in ALL}


def room(name: str) -> str:
    """``runtime``; ``validation._engines`` for shared code of a feature folder, ``methods`` for its public files."""
    if name in GROUND:
        return "ground"
    first, *deeper = name.split(".")[1:]
    if first in ("methods", "validation"):
        return f"{first}.{deeper[0]}" if deeper and deeper[0].startswith("_") else first
    return first if first in ROOMS else "app"


def needed(path: Path) -> set[str]:
    """Modules of the house that a file imports anywhere: at the top, inside functions, for type checkers only."""
    found = set()
    for node in ast.walk(tree(path)):
        for name in imported(node):
            inside = name if name in MODULES else name.rpartition(".")[0]
            if inside in MODULES:
                found.add(inside)
    return found - {module(path)}


def step(place: str) -> int:
    """Where a room of validation stands in ``JUDGING``."""
    last = place.partition(".")[2] or "checks"
    return next(number for number, names in enumerate(JUDGING) if last == names or last in names)


def may_import(here: str, there: str) -> bool:
    """Whether the room ``here`` may import from the room ``there``."""
    if here == there:
        return True
    mine, theirs = here.partition(".")[0], there.partition(".")[0]
    if mine in FOLDERS:
        if theirs in ROOMS:
            return theirs in FEATURES_IMPORT
        if mine != theirs:
            return False
        if mine == "methods":
            return there != "methods"
        return step(there) < step(here)
    if here == "plugins":
        return there in PLUGINS_IMPORT
    return there in ROOMS and ROOMS.index(there) < ROOMS.index(here)


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_from_the_rooms_before_it(name: str) -> None:
    here = room(name)
    assert [there for there in sorted(needed(MODULES[name])) if not may_import(here, room(there))] == []


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("config", "plugins"), ("plugins", "source"), ("runtime", "hub"), ("report", "card"), ("methods", "plan"),
        ("validation", "methods"), ("methods", "validation"), ("validation._cache", "validation._score"),
        ("validation._chat", "validation._files"), ("validation._engines", "validation"), ("methods._llama_cpp", "methods"),
        ("validation", "publish"), ("ground", "runtime"), ("plan", "app"), ("hub", "methods"),
    ],
)  # fmt: skip
def test_the_order_of_the_rooms_has_teeth(here: str, there: str) -> None:
    assert not may_import(here, there)


def test_no_module_needs_itself() -> None:
    """No circle of imports, those inside functions counted."""
    graph = {name: needed(path) for name, path in MODULES.items()}
    while free := {name for name, names in graph.items() if not names & graph.keys()}:
        graph = {name: names for name, names in graph.items() if name not in free}
    assert graph == {}, "these need each other, or one of those that do"


@pytest.mark.parametrize("folder", sorted({path.parent for path in ALL}), ids=label)
def test_no_room_is_crowded(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_FILES


def test_classes_have_names_of_their_own() -> None:
    """One name, one meaning, in the whole house. ``Options`` is what every method calls the type of its options."""
    places: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and node.name != "Options":
                places.setdefault(node.name, []).append(name)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_there_is_something_to_look_at() -> None:
    assert len(CORE) > 20
    assert len(PLUGGED) > 10


@pytest.mark.parametrize("path", CORE, ids=label)
def test_core_names_no_method_and_no_check(path: Path) -> None:
    names = [name for node in ast.walk(tree(path)) for name in imported(node)]
    assert [name for name in names if of_folder(name, "methods") or of_folder(name, "validation")] == []
    features = {file.stem for file in PLUGGED if file.name != "__init__.py"}
    literals = {
        node.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(("quantool.methods", "quantool.validation"))
    }
    assert [text for text in literals if text.partition(":")[0].rpartition(".")[2] in features] == []


@pytest.mark.parametrize("path", PLUGGED, ids=label)
def test_methods_and_checks_do_not_know_each_other(path: Path) -> None:
    other = "validation" if path.is_relative_to(ROOT / "methods") else "methods"
    names = [name for node in ast.walk(tree(path)) for name in imported(node)]
    assert [name for name in names if of_folder(name, other)] == []
    assert f"quantool.{other}." not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ALL, ids=label)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    names = [name for node in nodes_at_import(tree(path).body) for name in imported(node)]
    assert [name for name in names if name.partition(".")[0] in HEAVY] == []


@pytest.mark.parametrize("path", ALL, ids=label)
def test_imports_are_absolute_and_do_not_use_the_bare_folders(path: Path) -> None:
    relative = [
        node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []
    names = [name for node in ast.walk(tree(path)) for name in imported(node)]
    assert [name for name in names if name.partition(".")[0] in ("methods", "validation", "configs")] == []


def without_reason(path: Path, lines: list[int], rule: str) -> list[int]:
    """Those of ``lines`` that do not say why they break the rule."""
    text = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if f"# noqa: {rule} - " not in text[line - 1]]


@pytest.mark.parametrize("path", ALL, ids=label)
def test_no_bug_is_caught(path: Path) -> None:
    """``except Exception`` and a bare ``except`` hide what should show its traceback."""
    broad = {"Exception", "BaseException"}
    found = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or broad & {ast.unparse(part) for part in ast.walk(node.type) if isinstance(part, ast.Name)})
    ]  # fmt: skip
    assert without_reason(path, found, "BLE001") == []


@pytest.mark.parametrize("path", [path for path in ALL if path.name not in PRINTING], ids=label)
def test_nobody_prints_past_the_progress(path: Path) -> None:
    """A worker's output goes to its log; a run's result is printed by the command line."""
    found = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert without_reason(path, found, "T201") == []


@pytest.mark.parametrize("path", ALL, ids=label)
def test_modules_have_a_size_to_be_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST
    assert path.stem.lstrip("_") not in VAGUE
    assert path.name == "__init__.py" or ast.get_docstring(tree(path))


def test_every_part_is_listed_for_the_wheel() -> None:
    """A subfolder that ``packages`` does not list is missing from the wheel without a word."""
    folders = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    dotted = {".".join(folder.parts) for folder in folders}
    assert {name if name.startswith("quantool") else f"quantool.{name}" for name in dotted} == set(listed) - {
        "quantool.configs"
    }


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what setuptools needs, and of some things that it must leave out."""
    copy, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in (*FOLDERS, "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "tests").mkdir()
    (copy / "tests" / "test_x.py").touch()
    (copy / "quantool" / "left.over").touch()
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, *command, "--wheel-dir", str(target), str(copy)], check=True, capture_output=True
    )
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as package:
        package.extractall(folder)
    return folder


def isolated(unpacked: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with the unpacked wheel and the dependencies, but without the checkout: no .pth file is read."""
    dependencies = Path(pytest.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (unpacked, dependencies)))}
    command = [sys.executable, "-S", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=cwd or unpacked
    )


@pytest.mark.e2e
def test_the_wheel_holds_the_package_and_nothing_else(unpacked: Path) -> None:
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    wanted = {"quantool/py.typed", "quantool/configs/__init__.py"}
    wanted |= {str(path.relative_to(ROOT)) for path in CORE}
    wanted |= {f"quantool/{path.relative_to(ROOT)}" for path in PLUGGED}
    wanted |= {f"quantool/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert {name for name in files if ".dist-info/" not in name} == wanted
    (metadata,) = {name.partition("/")[0] for name in files if ".dist-info/" in name}
    assert metadata == f"quantool-{quantool.__version__}.dist-info"
    assert f"{metadata}/licenses/LICENSE" in files


@pytest.mark.e2e
def test_the_unpacked_wheel_is_quantool(unpacked: Path, tmp_path: Path) -> None:
    done = isolated(unpacked, "-m", "quantool", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{quantool.__version__}\n"), done.stderr
    code = (
        "from quantool.plugins import find\n"
        "import quantool.methods.gguf as m, quantool\n"
        "assert quantool.__file__.startswith(sys.argv[1]) and m.__file__.startswith(sys.argv[1])\n"
        "print(find.names('methods'), find.names('checks'))"
    )
    done = isolated(unpacked, "-c", f"import sys\n{code}", str(unpacked), cwd=tmp_path)
    features = [sorted(p.stem for p in (ROOT / f).glob("*.py") if p.name[0] != "_") for f in FOLDERS[1:]]
    assert done.stdout == f"{features[0]} {features[1]}\n", done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["methods", "validation", "configs"])
def test_common_names_are_not_taken_from_other_packages(unpacked: Path, tmp_path: Path, name: str) -> None:
    done = isolated(unpacked, "-c", f"import {name}", cwd=tmp_path)
    assert f"No module named '{name}'" in done.stderr


def test_the_checkout_runs_without_being_installed(tmp_path: Path) -> None:
    done = isolated(ROOT, "-m", "quantool", "--version")
    assert done.returncode == 0, done.stderr
    code = "import quantool.methods.gguf as m, quantool.validation.perplexity; print(m.__file__)"
    done = isolated(ROOT, "-c", code, cwd=tmp_path)
    assert done.stdout == f"{ROOT / 'methods' / 'gguf.py'}\n", done.stderr
