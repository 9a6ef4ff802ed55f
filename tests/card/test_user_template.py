"""A card template of the user's own: what it is given, what it may not do, and where a mistake is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from quantool import pipeline
from quantool.card.card import SECTIONS
from quantool.card.user_template import VARIABLES, read_card_template, render_card
from quantool.config.load import load
from quantool.config.schema import Config
from quantool.errors import ConfigError
from quantool.plugins import find
from quantool.runtime.progress import Progress

QUIET = Progress(quiet=True)
FRONT = "---\nlicense: mit\n---\n"


@pytest.fixture
def template(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "card.jinja"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_card_is_what_the_template_makes_of_the_records(
    config_file: Callable[..., Path], template: Callable[[str], Path], tmp_path: Path
) -> None:
    path = template(
        "{{ front_matter }}\n# {{ repo }} of {{ plan.source.name }}\n"
        "{% for report in reports %}- {{ report.artifact.level }}: {{ report.verdict }}\n{% endfor %}"
        "{{ sections.files }}{% for name in plots %}![]({{ name }}){% endfor %}\nOurs, not {{ card | length }}.\n"
    )
    pipeline.run(load(config_file(), [f"card.template={path}"], find).config, QUIET)
    folder = tmp_path / "out" / "model-FAKE"
    text = (folder / "README.md").read_text()
    front, _, body = text[4:].partition("---\n")
    assert yaml.safe_load(front)["quantized_by"] == "quantool"
    assert body.startswith("\n# model-FAKE of model\n- Q8_0: PASS\n- Q4_K_M: PASS\n## Verdicts\n")
    assert "![](plots/size-kld.png)" in body
    assert "How it was made" not in body
    assert str(tmp_path) not in text + (folder / "quantool.json").read_text()
    assert json.loads((folder / "quantool.json").read_text())["plan"]["config"]["card"] == {
        "template": "card.jinja"
    }


def test_every_section_and_variable_is_there(
    config_file: Callable[..., Path], template: Callable[[str], Path], tmp_path: Path
) -> None:
    shown = "".join(f"<{name}={{{{ sections.{name} | length }}}}>" for name in SECTIONS)
    shown += "".join(f"<{name}={{{{ {name} is defined }}}}>" for name in VARIABLES)
    path = template("{{ front_matter }}" + shown)
    pipeline.run(load(config_file(), [f"card.template={path}"], find).config, QUIET)
    text = (tmp_path / "out" / "model-FAKE" / "README.md").read_text()
    assert [name for name in SECTIONS if f"<{name}=" not in text] == []
    assert [name for name in VARIABLES if f"<{name}=True>" not in text] == []


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("{{ front_matter }}\n{% for x in %}", r"card\.jinja:2: Expected an expression", ""),
        ("a\n\n{{ reprots }}", r"card\.jinja:3: there is no variable 'reprots'", "reports"),
        ("{% include 'other' %}{{ nothing_alike }}", "there is no variable 'nothing_alike'", "front_matter, sections"),
    ],
)  # fmt: skip
def test_mistakes_are_found_by_the_plan(
    config_file: Callable[..., Path], template: Callable[[str], Path], text: str, message: str, hint: str
) -> None:
    config = load(config_file(), [f"card.template={template(text)}"], find).config
    with pytest.raises(ConfigError, match=message) as caught:
        pipeline.plan(config, QUIET)
    assert hint in caught.value.hint


def test_a_template_that_is_not_there(config_file: Callable[..., Path], tmp_path: Path) -> None:
    config = load(config_file(), [f"card.template={tmp_path / 'none.jinja'}"], find).config
    with pytest.raises(ConfigError, match=r"card\.template: .*none\.jinja: No such file"):
        pipeline.plan(config, QUIET)
    (tmp_path / "latin.jinja").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ConfigError, match=r"latin\.jinja is not UTF-8: .* at byte 0"):
        read_card_template(tmp_path / "latin.jinja")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ plan.sourec }}", "has no attribute 'sourec'"),
        ("{{ reports[3].verdict }}", "has no element 3"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ repo + 1 }}", "concatenate"),
        ("{% include 'secrets' %}", "no loader"),
        ("{% import '/etc/passwd' as x %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ ('{0.__class__}').format(repo) }}", "unsafe"),
        ("{{ repo.format.__globals__ }}", "unsafe"),
        ("{{ (lipsum | attr('__globals__')).os }}", "unsafe"),
        ("{% for x in range(999999999) %}{% endfor %}", "Range too big"),
        ("{{ reports.append(1) }}", "unsafe"),
        ("{{ plan.update(x=1) }}", "unsafe"),
    ],
)
def test_what_a_template_may_not_do(template: Callable[[str], Path], text: str, message: str) -> None:
    path = template("{{ front_matter }}\nfine\n" + text)
    values = dict.fromkeys(VARIABLES, "") | {
        "front_matter": FRONT, "repo": "tiny", "reports": [{"verdict": "PASS"}], "plan": {"source": {}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=rf"card\.jinja:3: .*{message}") as caught:
        render_card(path, values)
    assert "mend the template and run again" in caught.value.hint


def test_a_value_is_given_not_the_object(
    template: Callable[[str], Path], plugin: Path, tmp_path: Path
) -> None:
    """Records hold paths, whose methods could delete files: a template gets their text."""
    victim = tmp_path / "victim"
    victim.touch()
    path = template("{{ front_matter }}{{ plan.source.folder.unlink() }}")
    with pytest.raises(ConfigError, match="has no attribute"):
        render_card(path, {"front_matter": FRONT, "plan": {"source": {"folder": str(victim)}}})
    assert victim.exists()


@pytest.mark.parametrize("text", ["# no front matter", "", "---\n- a list\n---\n", "---\na: b\n"])
def test_a_card_without_metadata_is_refused(template: Callable[[str], Path], text: str) -> None:
    path = template(text)
    with pytest.raises(ConfigError, match="does not begin with the metadata") as caught:
        render_card(path, {})
    assert "{{ front_matter }}" in caught.value.hint


def test_metadata_that_is_not_yaml(template: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="the front matter is not YAML, line 3 of the card"):
        render_card(template("---\na: b\nc: [\n---\n"), {})


def test_the_configuration_knows_the_key() -> None:
    assert Config.model_validate({"model_id": "m", "method": "gguf"}).card.template is None
