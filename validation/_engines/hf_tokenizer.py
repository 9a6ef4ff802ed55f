"""A tokenizer through transformers: that of the source (the reference), or that of an artifact that transformers loads.

The functions here are workers (``quantool.runtime.process``); their ids are lists of int, a failed rendering is its reason.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from quantool.errors import SourceError
from quantool.runtime.limits import EndlessError, each_limited
from quantool.runtime.worker import Report, preloaded

RAISED = "TemplateError: "  # what raise_exception of a template becomes: a rejection that the template's author wrote
SPECIALS = 64  # special tokens that text is put around; some tokenizers have thousands of reserved ones


def load_tokenizer(folder: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder; SourceError when transformers cannot load it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise SourceError(f"transformers cannot load the tokenizer of {folder}: {error}") from error


def beginning(tokenizer: Any) -> list[int]:
    """BOS where the tokenizer puts it before a text."""
    plain, marked = (
        tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (False, True)
    )
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and marked[:1] == [bos] != plain[:1] else []


@preloaded("transformers")
def render(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Render conversations.

    Request: ``folder``, ``trust_remote_code``, ``conversations`` (``Conversation.request``). Result: ``facts``
    (``describe``) and per conversation ``answers``: ``accepted``, a list of acceptable renderings (``text``, ``ids``), or
    ``error``; ``given`` is why the messages as they are could not be rendered, or empty.
    A conversation that engines hand to a template in several ways has several (``_readings``). Raises SourceError when
    the template does not end (``runtime.limits``).
    """
    tokenizer = load_tokenizer(request["folder"], trust_remote_code=request["trust_remote_code"])
    conversations = request["conversations"]
    rendered = each_limited(conversations, partial(_render_readings, tokenizer))
    answers: list[dict[str, Any]] = []
    try:
        for readings in rendered:
            answers.append(_answer(tokenizer, readings))
            report(len(answers), len(conversations))
    except EndlessError as error:
        name = conversations[len(answers)]["name"]
        raise SourceError(
            f"the chat template cannot be used: on the conversation {name!r} {error}"
        ) from error
    return {"facts": describe(tokenizer), "answers": answers}


def _answer(tokenizer: Any, readings: list[dict[str, str]]) -> dict[str, Any]:
    """What is acceptable among the renderings of one conversation, or why there is none."""
    accepted = [
        {"text": one["text"], "ids": tokenizer(one["text"], add_special_tokens=False)["input_ids"]}
        for one in readings
        if "text" in one
    ]
    errors = [one.get("error", "") for one in readings]
    refused = next((error for error in errors if error.startswith(RAISED)), errors[0])
    return {"accepted": accepted, "error": "" if accepted else refused, "given": errors[0]}


def _render_readings(tokenizer: Any, conversation: dict[str, Any]) -> list[dict[str, str]]:
    return [_render(tokenizer, conversation, messages) for messages in _readings(conversation["messages"])]


def template_errors() -> tuple[type[Exception], ...]:
    """What rendering a template may raise, whose author can write anything."""
    from jinja2 import TemplateError

    kinds = TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError
    return (TemplateError, *kinds)


def _render(tokenizer: Any, conversation: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, str]:
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=conversation["tools"] or None,
            add_generation_prompt=conversation["generation_prompt"],
            continue_final_message=conversation["continued"],
            tokenize=False,
            **conversation["settings"],
        )
    except template_errors() as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text}


def _readings(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages as given, and in the other forms in which llama.cpp's server may hand them to a template.

    Arguments of tool calls that are text become objects (``func_args_not_string`` in common/chat.cpp), content that is
    null becomes empty (``common_chat_msg::to_json_oaicompat``), and reasoning goes where families look for it: in a
    field ``thinking`` (common/parsers/gpt-oss.cpp, lfm2.cpp) or among the content parts (ministral3.cpp).
    """
    readings = [messages]
    for change in (_parse_arguments, _fill_content, _name_thinking, _part_thinking):
        readings += [changed for one in readings if (changed := [change(message) for message in one]) != one]
    return readings


def _fill_content(message: dict[str, Any]) -> dict[str, Any]:
    """The message with empty content where it is null."""
    return message | {"content": ""} if message.get("content", "") is None else message


def _name_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning in ``thinking`` too."""
    return message | {"thinking": message["reasoning_content"]} if "reasoning_content" in message else message


def _part_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning as the first part of its content."""
    if "reasoning_content" not in message:
        return message
    parts = [
        {"type": "thinking", "thinking": message["reasoning_content"]},
        {"type": "text", "text": message["content"]},
    ]
    return {key: message[key] for key in ("role", "tool_calls") if key in message} | {"content": parts}


def _parse_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of tool calls as objects where they are JSON texts."""
    parsed: dict[str, Any] = json.loads(json.dumps(message))
    for call in parsed.get("tool_calls") or []:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(json.JSONDecodeError):  # not JSON: only the reading as given is left
                function["arguments"] = json.loads(function["arguments"])
    return parsed


@preloaded("transformers")
def encode(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Tokenize texts.

    Request: ``folder``, ``trust_remote_code``, ``texts`` (each ``name``, ``text``, ``add_special``, ``parse_special``) and
    ``around`` (the same; ``{}`` in ``text`` stands for each special token in turn, ``SPECIALS`` at most).
    Result: ``facts``, ``texts`` (all of them, written out), ``ids`` (a list for each text; null where this tokenizer
    cannot leave special tokens unparsed). For a tokenizer that puts a space before the first word only (Metaspace with
    ``prepend_scheme: first``) also what llama.cpp can do instead, else null: ``bare``, the ids with no space put
    anywhere, and ``spaced``, those with one before the text and after every special token.
    """
    tokenizer = load_tokenizer(request["folder"], trust_remote_code=request["trust_remote_code"])
    facts = describe(tokenizer)
    texts = request["texts"] + [
        text | {"name": text["name"].replace("{}", token), "text": text["text"].replace("{}", token)}
        for token in facts["special"][:SPECIALS]
        for text in request["around"]
    ]
    ids = [_encode(tokenizer, text) for text in texts]
    report(1, 2)
    bare = spaced = None
    if facts["prepend_scheme"] == "first":
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        _drop_prefix(tokenizer)
        bare = [_encode(tokenizer, text) for text in texts]
        spaced = [_encode(tokenizer, _with_spaces(text, added)) for text in texts]
    return {"facts": facts, "texts": texts, "ids": ids, "bare": bare, "spaced": spaced}


def _with_spaces(text: dict[str, Any], added: Iterable[Any]) -> dict[str, Any]:
    """The text with a space before every run between added tokens (llama-vocab.cpp, LLAMA_VOCAB_TYPE_SPM)."""
    cut = [re.escape(token.content) for token in added if text["parse_special"] or not token.special]
    runs = (
        re.split(f"({'|'.join(sorted(cut, key=len, reverse=True))})", text["text"]) if cut else [text["text"]]
    )
    spaced = [run if place % 2 or not run else " " + run for place, run in enumerate(runs)]
    return text | {"text": "".join(spaced)}


def _encode(tokenizer: Any, text: dict[str, Any]) -> list[int] | None:
    split = not text["parse_special"]
    if split and not tokenizer.is_fast:
        return None
    return list(
        tokenizer(text["text"], add_special_tokens=text["add_special"], split_special_tokens=split)[
            "input_ids"
        ]
    )


def _drop_prefix(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    scheme = json.loads(backend.to_str())["pre_tokenizer"]
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=scheme["replacement"], prepend_scheme="never", split=scheme["split"]
    )


def describe(tokenizer: Any) -> dict[str, Any]:
    """What the other side must agree with: special ids, what is added, the template, normalizer and prefix scheme."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    saved = json.loads(backend.to_str()) if backend is not None else {}
    template = tokenizer.chat_template
    plain, dressed = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    first = dressed[: len(dressed) - len(plain)] if dressed[-len(plain) :] == plain else []
    return {
        "bos": tokenizer.bos_token_id,
        "bos_text": tokenizer.bos_token,
        "eos": tokenizer.eos_token_id,
        "eos_text": tokenizer.eos_token,
        "pad": tokenizer.pad_token_id,
        "adds_bos": tokenizer.bos_token_id is not None and tokenizer.bos_token_id in first,
        "adds_eos": tokenizer.eos_token_id is not None and dressed[-1] == tokenizer.eos_token_id != plain[-1],
        "special": _ordered(tokenizer, template),
        "special_ids": _added(tokenizer),
        "templates": template if isinstance(template, dict) else {"default": template} if template else {},
        "word_pieces": saved.get("model", {}).get("type") == "WordPiece",
        "nfc": "NFC" in _kinds(saved.get("normalizer")),
        "prepend_scheme": _scheme(saved.get("pre_tokenizer")),
        "size": len(tokenizer),
    }


def _ordered(tokenizer: Any, template: Any) -> list[str]:
    """The special tokens and what looks like one: those that a template prints first, then the special ones."""
    texts = "".join(template.values()) if isinstance(template, dict) else template or ""
    special = set(tokenizer.all_special_tokens)
    found = special.union(_added(tokenizer))
    return sorted(found, key=lambda token: (token not in texts, token not in special, token))


def _added(tokenizer: Any) -> dict[str, int]:
    """Every added token that is marked as special or looks like it, with its id."""
    tokens = tokenizer.added_tokens_decoder
    return {
        token.content: number
        for number, token in tokens.items()
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    }


def _kinds(normalizer: dict[str, Any] | None) -> set[str]:
    if normalizer is None:
        return set()
    inner = [_kinds(step) for step in normalizer.get("normalizers", [])]
    return {normalizer["type"]}.union(*inner)


def _scheme(step: dict[str, Any] | None) -> str | None:
    return step.get("prepend_scheme") if step is not None and step["type"] == "Metaspace" else None
