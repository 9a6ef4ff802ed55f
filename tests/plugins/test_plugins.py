import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantool.errors import ConfigError, DependencyError
from quantool.plugins import find
from quantool.plugins.contract import Check, Method, Options, check, method

ROOT = Path(__file__).parents[2]


def files(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / folder).glob("*.py") if not path.name.startswith("_"))


def never(*_: Any) -> Any:
    raise AssertionError


def marked(name: str, **more: Any) -> Method:
    return method(name, options=Options, levels=lambda: {"A": ""}, outline=never, **more)(never)


@pytest.mark.parametrize(("kind", "folder"), [("methods", "methods"), ("checks", "validation")])
def test_a_file_is_a_feature(kind: str, folder: str) -> None:
    assert find.names(kind) == files(folder)
    assert find.names(kind)


def test_listing_imports_nothing() -> None:
    code = (
        "import json, sys; from quantool.plugins import find as r;"
        "found = [r.names('methods'), r.names('checks')];"
        "print(json.dumps([found, [m for m in sys.modules if m.startswith(('quantool.methods.', 'quantool.val'))]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, loaded = json.loads(done.stdout)
    assert found == [files("methods"), files("validation")]
    assert loaded == ["quantool.validation"]


@pytest.mark.parametrize("name", files("methods"))
def test_every_method_is_registered_under_the_name_of_its_file(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda _name: object()
    )  # optional libraries may be missing
    found = find.find_method(name)
    assert found.name == name
    undescribed = [key for key, field in found.options.model_fields.items() if not field.description]
    assert undescribed == []
    assert found.options.model_config["extra"] == "forbid"
    assert found.options.model_config["frozen"] is True


@pytest.mark.parametrize("name", files("validation"))
def test_every_check_is_registered_under_the_name_of_its_file(name: str) -> None:
    found = find.find_check(name)
    assert found.name == name
    assert found.summary.endswith(".") or found.summary


def test_the_summary_of_a_check_is_its_first_line(plugin: Path) -> None:
    assert find.find_check("fakecheck").summary == "Compare the number in the file with the level's limit."


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'gguff'; known: .*gguf") as caught:
        find.find_method("gguff")
    assert caught.value.hint == "did you mean gguf?"
    with pytest.raises(ConfigError, match="unknown check 'perplexty'") as caught:
        find.find_check("perplexty")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean perplexity")


@pytest.mark.parametrize("name", ["_gguf", "__init__", "", "../quantool", "os"])
def test_what_is_no_method_cannot_be_imported_as_one(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        find.find_method(name)


def test_others_plug_in_by_entry_points(plugin: Path) -> None:
    assert {"fake", "wrong"} < set(find.names("methods"))
    assert {"fakecheck", "wrong"} < set(find.names("checks"))
    found = find.find_method("fake")
    assert isinstance(found, Method)
    assert list(found.levels()) == ["Q8_0", "Q4_K_M"]
    assert isinstance(find.find_check("fakecheck"), Check)


def test_an_entry_point_to_something_else_is_refused(plugin: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"<function levels .* is registered as method 'wrong' but is not one"
    ):
        find.find_method("wrong")
    with pytest.raises(ConfigError, match="is registered as check 'wrong' but is not one"):
        find.find_check("wrong")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("quantool_fake:nothing", "nothing"),
        ("quantool_missing:x", "No module named 'quantool_missing'"),
        ("needy:x", "No module named 'no_such_library'"),
    ],
)
def test_a_plug_in_that_cannot_be_imported(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           target: str, said: str) -> None:  # fmt: skip
    (tmp_path / "other-1.dist-info").mkdir()
    (tmp_path / "other-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other\nVersion: 1\n"
    )
    (tmp_path / "other-1.dist-info" / "entry_points.txt").write_text(
        f"[quantool.methods]\nbroken = {target}\n"
    )
    (tmp_path / "needy.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DependencyError, match="method 'broken' of other cannot be loaded") as caught:
        find.find_method("broken")
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        ("compressed", "pip install 'quantool[compressed]'"),
        ("", "pip install no_such_library no_such_either"),
    ],
)
def test_a_method_whose_library_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, extra: str, hint: str
) -> None:
    poor = marked("poor", needs=("json", "no_such_library", "no_such_either"), extra=extra)
    monkeypatch.setattr(find, "_find", lambda *_: poor)
    with pytest.raises(
        DependencyError, match=r"^method 'poor' needs no_such_library, no_such_either$"
    ) as caught:
        find.find_method("poor")
    assert caught.value.hint == hint


def test_a_method_with_all_it_needs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    able = marked("able", needs=("json",))
    monkeypatch.setattr(find, "_find", lambda *_: able)
    assert find.find_method("able") is able


def test_a_module_that_registers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the folder must hold the method it is named after."""
    import quantool.validation as folder

    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    (tmp_path / "idle.py").write_text(
        "from quantool.plugins.contract import check\n@check('other')\ndef f(case, progress): ...\n"
    )
    assert "idle" in find.names("checks")
    with pytest.raises(ConfigError, match=r"quantool\.validation\.idle registers no check named 'idle'"):
        find.find_check("idle")


def test_a_check_without_a_docstring_has_no_summary() -> None:
    assert check("mute")(lambda _case, _progress: []).summary == ""
