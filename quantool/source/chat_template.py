"""The chat template of a checkpoint: which one counts, whether it parses, and what ends an answer in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quantool.errors import SourceError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"

QUESTION, ANSWER = "a question", "an answer that no template contains"


def read_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The template that transformers applies by default, and notes.

    As in transformers' ``PreTrainedTokenizerBase``: ``chat_template.jinja`` (and ``additional_chat_templates/``)
    replace what tokenizer_config.json holds, which is a text or a list of named ones with a ``default``. Raises
    SourceError naming file and line when the template does not parse.
    """
    inline = _inline(tokenizer_config.get("chat_template"), folder / "tokenizer_config.json")
    file = folder / FILE
    if not file.is_file():
        if inline is not None and (folder / FOLDER).is_dir():
            return None, [
                f"{FOLDER}/ without {FILE}: transformers then ignores the template in tokenizer_config.json"
            ]
        if inline is not None:
            _check(inline, str(folder / "tokenizer_config.json"))
        return inline, []
    text = _text_of(file)
    _check(text, str(file))
    if inline is None or inline == text:
        return text, []
    return text, [
        f"{FILE} and tokenizer_config.json hold different chat templates; {FILE} is used, as transformers does"
    ]


def read_named(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The templates that have a name of their own (``tool_use``, ``rag``) by that name, as transformers has them.

    The files of ``additional_chat_templates/``; without them and without ``chat_template.jinja`` the entries of the list in
    tokenizer_config.json. Raises SourceError like ``read_template``.
    """
    files = sorted((folder / FOLDER).glob("*.jinja"))
    if files or (folder / FILE).is_file():
        places = {file.stem: str(file) for file in files}
        found = {file.stem: _text_of(file) for file in files}
    else:
        place, value = str(folder / "tokenizer_config.json"), tokenizer_config.get("chat_template")
        listed = value if isinstance(value, list) else []
        found = {entry["name"]: str(entry["template"]) for entry in listed if entry["name"] != "default"}
        places = dict.fromkeys(found, place)
    for name, text in found.items():
        _check(text, places[name])
    return found


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error


def _inline(value: Any, place: Path) -> str | None:
    match value:
        case None | str():
            return value
        case [*entries] if all(isinstance(e, dict) and {"name", "template"} <= e.keys() for e in entries):
            return next((str(entry["template"]) for entry in entries if entry["name"] == "default"), None)
        case _:
            raise SourceError(f"{place}: chat_template is neither a text nor a list of named templates")


def environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with the settings, filters and functions that transformers gives a chat template."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the model's own words for training; here it renders its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, *, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return made


def _check(text: str, place: str) -> None:
    import jinja2

    try:
        environment().parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise SourceError(
            f"{place}:{error.lineno}: the chat template does not parse: {error.message}",
            hint="llama.cpp would replace it by another one without a word; mend it first",
        ) from error


def end_of_turn(template: str, special: Iterable[str], tokens: Mapping[str, str]) -> str | None:
    """The first ``special`` token that the template writes after an assistant's answer; None when it writes none.

    ``tokens`` are the named ones the template may use (``bos_token`` …). None also for a template that refuses the
    plain question and answer it is tried on.
    """
    import jinja2

    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        text = (
            environment()
            .from_string(template)
            .render(messages=messages, add_generation_prompt=False, **tokens)
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None
    _, found, rest = text.rpartition(ANSWER)
    places = {token: rest.find(token) for token in special if token}
    after = [token for token, place in places.items() if place >= 0]
    return min(after, key=lambda token: (places[token], -len(token)), default=None) if found else None
