"""A model card template of the user's own, in Jinja's sandbox.

The template is given ``VARIABLES`` and nothing else: plain JSON values, no objects with methods, no files, no includes. A
name that does not exist is an error, not an empty string.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quantool.config.yaml_file import parse
from quantool.errors import ConfigError, nearest

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

VARIABLES = {
    "front_matter": "the metadata for the Hub, between lines of ---; a card begins with it",
    "sections": "the parts of the built-in card by name (see SECTIONS), each Markdown",
    "card": "the whole built-in card",
    "repo": "name of the repository",
    "repo_id": "namespace and name, none when the configuration names no repository",
    "plan": "the plan as in quantool.json: source, config, versions, seed, …",
    "outputs": "the outputs of this folder as in quantool.json",
    "reports": "the reports as in quantool.json: artifact, findings, verdict, …",
    "plots": "names of the pictures",
    "sampling": "recommended sampling, value by name",
}
"""What a template can use, and what it holds."""

KEY = "card.template"
MISUSE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What an expression of a template raises beside Jinja's own errors."""


def read_card_template(path: Path) -> str:
    """The template's text.

    Raises ConfigError, with file and line, for a file that cannot be read, wrong syntax, and a variable that there
    is not.
    """
    import jinja2
    from jinja2 import meta

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{KEY}: {path}: {error.strerror}", hint="name a Jinja template") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{KEY}: {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    environment = _environment()
    try:
        tree = environment.parse(text, filename=str(path))
        environment.compile(text, filename=str(path))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{KEY}: {path}:{error.lineno}: {error.message}") from error
    for name in sorted(meta.find_undeclared_variables(tree) - set(environment.globals)):
        if name not in VARIABLES:
            hint = nearest(name, list(VARIABLES)) or f"there are: {', '.join(VARIABLES)}"
            raise ConfigError(
                f"{KEY}: {path}:{_line_of(text, name)}: there is no variable {name!r}", hint=hint
            )
    return text


def render_card(path: Path, variables: Mapping[str, Any]) -> str:
    """The card that the template at ``path`` makes of ``variables``, which are plain JSON values.

    Raises ConfigError, with file and line, for all that goes wrong in it, and for a card without the front matter
    that the Hub reads.
    """
    import jinja2

    text = read_card_template(path)
    environment = _environment()
    code = environment.compile(text, filename=str(path))
    template = environment.template_class.from_code(environment, code, environment.make_globals(None))
    try:
        card = template.render(variables)
    except (jinja2.TemplateError, *MISUSE) as error:
        line = _failed_line(error.__traceback__, path)
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"{KEY}: {path}:{line}: {reason}",
            hint="the artifacts and reports are kept: mend the template and run again",
        ) from error
    _require_front_matter(path, card)
    return card


def _environment() -> ImmutableSandboxedEnvironment:
    """A sandbox without loader: nothing can be included or imported, no value changed, no private attribute read."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def _line_of(text: str, name: str) -> int:
    """The first line that mentions ``name``."""
    return next((number for number, line in enumerate(text.splitlines(), 1) if name in line), 1)


def _failed_line(trace: TracebackType | None, path: Path) -> int:
    """The template's line in a traceback, which Jinja rewrites to name it."""
    lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == str(path)]
    return next((line for line in reversed(lines) if line is not None), 1)


def _require_front_matter(path: Path, card: str) -> None:
    front, end, _ = card[4:].partition("\n---\n")
    try:
        found = parse(front, "").data if end and card.startswith("---\n") else None
    except ConfigError as error:
        line, _, problem = error.message.removeprefix(":").partition(": not YAML: ")
        place = f"line {int(line.partition(':')[0]) + 1} of the card"
        raise ConfigError(f"{KEY}: {path}: the front matter is not YAML, {place}: {problem}") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{KEY}: {path}: the card does not begin with the metadata that the Hub reads",
            hint="begin it with {{ front_matter }}",
        )
