"""The definition file of the container: no Apptainer is asked, what it names must be there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import quantool

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "configs" / "quantool.def").read_text(encoding="utf-8").splitlines()
KNOWN = {"arguments", "files", "post", "environment", "test", "runscript"}


def sections() -> dict[str, list[str]]:
    """The lines of each section, by its name; those before the first one under an empty name."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in LINES:
        if line.startswith("%"):
            name = line[1:]
            assert name not in found, f"section {name} stands twice"
            found[name] = []
        elif line.strip() and not line.lstrip().startswith("#"):
            found[name].append(line.strip())
    return found


def test_the_header_and_sections_are_those_that_apptainer_knows() -> None:
    found = sections()
    header = dict(line.split(": ", 1) for line in found.pop(""))
    assert {*header} == {"Bootstrap", "From"}
    assert header["Bootstrap"] == "docker"
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", header["From"]), (
        "an image without a version is another one next week"
    )
    assert {*found} == KNOWN
    assert all(found.values())


def test_every_argument_is_declared_and_used() -> None:
    declared = {line.partition("=")[0] for line in sections()["arguments"]}
    used = set(re.findall(r"\{\{ (\w+) \}\}", "\n".join(LINES)))
    assert declared == used


def test_what_it_installs_is_there() -> None:
    found = sections()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wheel = f"dist/quantool-{quantool.__version__}-py3-none-any.whl"
    assert f"wheel={wheel}" in found["arguments"]
    assert wheel in LINES[0]
    (extras,) = re.findall(r"\[([\w,-]+)\]", "\n".join(found["post"]))
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    copied = [line.split()[0] for line in found["files"] if "{{" not in line]
    assert copied
    assert all((ROOT / name).is_file() for name in copied)
    assert project["requires-python"] == ">=3.11"  # Ubuntu 24.04 has 3.12


def test_its_shell_is_a_shell() -> None:
    for name in ("post", "environment", "test", "runscript"):
        text = "\n".join(sections()[name])
        assert text.count('"') % 2 == 0, name
        assert "curl" not in text, "what is fetched by hand has no version"
