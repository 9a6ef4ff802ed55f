"""The chat templates of a checkpoint: which one counts, whether they compile, and what ends an answer in the default one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.json_file import read_bounded
from quantool.runtime.process import environment

FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
MAX_BYTES = 1 << 20
SECONDS, MEMORY = 5, 1 << 30
"""Processor time that all templates of a checkpoint may take, and bytes of address space."""
PATIENCE = 60
"""Seconds of wall time for the child, whose processor time is limited: on a machine that is busy it waits."""

QUESTION, ANSWER = "a question", "an answer that no template contains"


@dataclass(frozen=True)
class ChatTemplates:
    """What a checkpoint's tokenizer has; ``places`` says where each template stands, the default one under ``""``."""

    default: str | None
    named: dict[str, str]
    places: dict[str, str]
    notes: tuple[str, ...] = ()


def read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplates:
    """The template that transformers applies by default, and those with a name of their own (``tool_use``, ``rag``).

    As in transformers' ``PreTrainedTokenizerBase`` (5.17): ``chat_template.jinja`` and ``additional_chat_templates/`` replace
    what tokenizer_config.json holds, which is a text or a list of named ones with a ``default``. Raises SourceError for
    files that cannot be read and values of another kind; whether they compile is ``end_of_turn``'s to find.
    """
    config = folder / "tokenizer_config.json"
    listed = _listed(tokenizer_config.get("chat_template"), config)
    inline = listed.pop("default", None)
    file, files = folder / FILE, sorted((folder / FOLDER).glob("*.jinja"))
    default, place, notes = inline, config, []
    if file.is_file():
        default, place = _text_of(file), file
        if inline not in (None, default):
            what = f"{FILE} and tokenizer_config.json hold different chat templates"
            notes.append(f"{what}; {FILE} is used, as transformers does")
    elif inline is not None and (folder / FOLDER).is_dir():
        what = "transformers then ignores the template in tokenizer_config.json"
        default, notes = None, [f"{FOLDER}/ without {FILE}: {what}"]
    places = {"": str(place), **dict.fromkeys(listed, str(config))}
    if files or file.is_file():
        listed = {path.stem: _text_of(path) for path in files}
        places |= {path.stem: str(path) for path in files}
    return ChatTemplates(default, listed, places, tuple(notes))


def _text_of(file: Path) -> str:
    try:
        return read_bounded(file, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error


def _listed(value: Any, place: Path) -> dict[str, str]:
    """Name to template; ``default`` for one without a name."""
    match value:
        case None:
            return {}
        case str():
            return {"default": value}
        case [*entries] if all(
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
            for entry in entries
        ):
            return {entry["name"]: entry["template"] for entry in entries}
        case _:
            raise SourceError(f"{place}: chat_template is neither a text nor a list of named templates")


def end_of_turn(templates: ChatTemplates, special: Iterable[str], tokens: Mapping[str, Any]) -> str | None:
    """The first ``special`` token that the default template writes after an assistant's answer; None when it writes none.

    ``tokens`` are the named ones the template may use (``bos_token`` …). None also for a template that refuses the
    plain question and answer it is tried on. Raises SourceError, naming file and line, when a template, named ones
    included, does not compile, or the default one does not end within ``SECONDS`` and ``MEMORY``.
    """
    texts = {**({} if templates.default is None else {"": templates.default}), **templates.named}
    if not texts:
        return None
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    request = {
        "seconds": SECONDS,
        "memory": MEMORY,
        "templates": texts,
        "render": "" if "" in texts else None,
        "variables": {**tokens, "messages": messages, "add_generation_prompt": False},
    }
    answer = _in_child(json.dumps(request))
    if "problem" in answer:
        line = f":{answer['line']}" if "line" in answer else ""
        raise SourceError(
            f"{templates.places[answer['at']]}{line}: the chat template {answer['problem']}",
            hint="llama.cpp would replace it by another one without a word; mend it first",
        )
    _, found, rest = str(answer.get("text", "")).rpartition(ANSWER)
    ends = {token: rest.find(token) for token in special if token}
    after = [token for token, position in ends.items() if position >= 0]
    return min(after, key=lambda token: (ends[token], -len(token)), default=None) if found else None


@lru_cache(maxsize=8)
def _in_child(request: str) -> dict[str, Any]:
    """The last words of the child on ``request``, with the place they are about: ``text``, ``refused`` or ``problem``."""
    command = [sys.executable, "-m", "quantool.source.template_child"]
    try:
        done = subprocess.run(
            command,
            input=request.encode(),
            capture_output=True,
            timeout=PATIENCE,
            env=environment(),
            check=False,
        )
        output, code, errors = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as error:
        output, code, errors = error.stdout or b"", -signal.SIGXCPU, b""
    answer: dict[str, Any] = {}
    for line in output.splitlines():
        answer |= json.loads(line)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        answer["problem"] = f"does not end within {SECONDS} s of processor time"
    elif (
        code and "at" in answer
    ):  # a stack that overflowed, memory that was refused where Python cannot say so
        answer["problem"] = (
            f"makes Jinja fail: {' '.join(errors.decode(errors='replace').split())[-200:] or f'signal {-code}'}"
        )
    elif code:
        raise RuntimeError(errors.decode(errors="replace"))
    return answer
