"""Chats as llama-cpp-python renders them: what ``Llama.create_chat_completion`` makes of a GGUF.

It is Jinja2 with other variables than transformers', and it does not always use the file's template: one that is, to the
byte, a template it knows is replaced by its own format of that name (``guess_chat_format_from_gguf_metadata``), and a
file without a template is taken for Llama 2. So the question is put to a real ``Llama`` (vocabulary only), and what it
hands to its tokenizer is compared. Named templates are never used for tools; a generation prompt is always asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends
from quantool.runtime.limits import EndlessError, each_limited
from quantool.runtime.process import call
from quantool.runtime.worker import Report
from quantool.runtime.workspace import Stage
from quantool.validation._chat.conversations import Conversation
from quantool.validation._engines.crash import WorkerError, crash
from quantool.validation._engines.hf_tokenizer import template_errors
from quantool.validation._engines.vocabulary import UnloadableError, gguf_key

OWN = "chat_template."  # formats of this name come from the file
PYTHON = Depends(libraries=("llama-cpp-python", "jinja2"))
"""What a rendered chat depends on beside the file."""


def render(case: Case, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """What llama-cpp-python makes of ``conversations`` with the case's GGUF or one of the same keys.

    Raises UnloadableError.
    Returns ``engine`` (name and version), ``format`` (of its own, or an empty string where the file's template is used)
    and ``answers``: for each conversation ``text`` and ``ids``, or ``error``.
    """
    log = case.workspace.logs / f"formatter-{case.name.replace('/', '-')}.log"
    request = {
        "model": str(case.artifact.resolve()),
        "conversations": [conversation.request() for conversation in conversations],
    }

    def produce(_: object) -> list[dict[str, Any]]:
        answered = call(answer, request, log=log, failure=WorkerError)
        if answered["failure"]:
            raise UnloadableError(answered["failure"], case)
        return [answered]

    stage = Stage("rendered-python", gguf_key(case, PYTHON, request["conversations"]))
    try:
        return case.workspace.together([stage], produce)[0]
    except WorkerError as error:
        raise UnloadableError(crash(error, "llama-cpp-python"), case) from error


def answer(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: load the vocabulary of ``model`` as users do and render every one of ``conversations``."""
    import llama_cpp
    from llama_cpp.llama_chat_format import get_chat_completion_handler

    class RenderedError(Exception):
        """Carries a rendered chat out of llama-cpp-python, before it is evaluated."""

    class Reader(llama_cpp.Llama):
        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
            raise RenderedError(text.decode("utf-8", "replace"), super().tokenize(text, add_bos, special))

    engine = f"llama-cpp-python {llama_cpp.__version__}"
    try:
        reader = Reader(request["model"], vocab_only=True, n_gpu_layers=0, verbose=False)
    except template_errors() as error:
        failure = f"{engine} cannot load the file: {type(error).__name__}: {error}"
        return {"failure": failure, "engine": engine, "format": "", "answers": []}
    chat_format = str(reader.chat_format)  # never None: without any other it is llama-2
    handler = reader._chat_handlers.get(chat_format) or get_chat_completion_handler(chat_format)  # noqa: SLF001 - as Llama itself does

    def rendered(conversation: dict[str, Any]) -> dict[str, Any]:
        try:
            handler(
                llama=reader,
                messages=conversation["messages"],
                tools=conversation["tools"] or None,
                **conversation["settings"],
            )
        except RenderedError as found:
            text, ids = found.args
            return {"text": text, "ids": ids}
        except template_errors() as error:
            return {"error": f"{type(error).__name__}: {error}"}
        raise AssertionError  # it always tokenizes what it has rendered

    answers: list[dict[str, Any]] = []
    failure = ""
    try:
        for found in each_limited(request["conversations"], rendered):
            answers.append(found)
            report(len(answers), len(request["conversations"]))
    except EndlessError as error:
        name = request["conversations"][len(answers)]["name"]
        failure = f"{engine} cannot use the template: on the conversation {name!r} {error}"
    return {
        "failure": failure,
        "engine": engine,
        "format": "" if chat_format.startswith(OWN) else chat_format,
        "answers": answers,
    }
