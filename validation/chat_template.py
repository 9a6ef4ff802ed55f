"""Whether a chat comes out the same: template text, rendered text, and token ids.

The reference is the source's tokenizer through ``apply_chat_template``; the other side is what users run: llama.cpp's own
Jinja engine for a GGUF (``_server``) and llama-cpp-python (``_formatter``), the saved tokenizer for an artifact that
transformers loads. The text of every template is compared byte for byte beside it, so an engine that fell back on another
template is found by content.

A difference that comes from llama.cpp and not from the file is a REGRESSION all the same, because it reaches who uses the
file; the detail then names the place in llama.cpp (``_causes``). Only what the server does with an answer to continue,
and the formats that llama-cpp-python prefers to a template, are SKIPPED where the file holds the source's template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.texts import inputs
from quantool.validation._chat import llama_cpp_python, llama_server
from quantool.validation._chat.agreement import (
    judge_bos,
    judge_caps,
    judge_continued,
    judge_ids,
    judge_python,
    judge_text,
)
from quantool.validation._chat.conversations import Conversation, of_case
from quantool.validation._chat.renderings import BUILD, NAME, Renderings, explain_text, first
from quantool.validation._engines import hf_tokenizer
from quantool.validation._engines.vocabulary import (
    TOKENIZER,
    UnloadableError,
    Vocabulary,
    by_artifact,
    by_source,
    of_gguf,
)

RENDERERS = llama_server.SERVER | llama_cpp_python.PYTHON
"""What users of a GGUF render with."""
MALFORMED = "TemplateSyntaxError: "
WITH_TOOLS = (
    "tool_use"  # the named template that transformers and llama.cpp's server take when tools are offered
)


@check(
    NAME,
    depends=TOKENIZER | RENDERERS | Depends(inputs=(inputs.conversations,), engine=True),
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Chats rendered by the artifact's engines and by the source's tokenizer: template, text and token ids."""
    del progress  # a few seconds
    try:
        vocabulary = of_gguf(case)[0] if case.engine == "llama.cpp" else None
        return _judge(case, vocabulary)
    except UnloadableError as error:
        return [BUILD.fail("loads", str(error))]


def _judge(case: Case, vocabulary: Vocabulary | None) -> list[Finding]:
    """Everything about a case whose vocabulary loads."""
    if case.source.facts.chat_template is None and not case.source.facts.named_templates:
        return [_judge_absence(case, vocabulary)]
    conversations = of_case(case)
    request = {"conversations": [conversation.request() for conversation in conversations]}
    reference = by_source(case, "chats", hf_tokenizer.render, request)
    templates = reference["facts"]["templates"]
    if vocabulary is None:
        answered = by_artifact(case, hf_tokenizer.render, request)
        texts = _judge_templates(templates, answered["facts"]["templates"])
        if (malformed := _malformed(reference)) is not None:
            return [*texts, malformed]
        both = Renderings(conversations, reference, [first(answer) for answer in answered["answers"]])
        bos = reference["facts"]["bos"]
        return [*texts, *_judge_renderings(both, None, bos, templates, answered["facts"]["templates"])]
    plain = {
        re.sub("[^A-Za-z0-9]", "_", name): text for name, text in templates.items()
    }  # as GGUF keys are written
    texts = [*_judge_templates(plain, vocabulary.templates), *_judge_names(plain, vocabulary)]
    if (malformed := _malformed(reference)) is not None:
        return [*texts, malformed]
    by_server = _by_server(case, conversations, reference, vocabulary)
    return [*texts, *by_server, *_by_python(case, conversations, reference, vocabulary)]


def _by_server(
    case: Case, conversations: Sequence[Conversation], reference: dict[str, Any], vocabulary: Vocabulary
) -> list[Finding]:
    """llama.cpp's server against the reference."""
    try:
        answered = llama_server.render(case, conversations)
    except UnloadableError as error:
        return [
            BUILD.fail("rendered_text", f"llama.cpp's engine cannot use the artifact's template: {error}")
        ]
    caps = answered["caps"]
    both = Renderings(
        conversations,
        reference,
        answered["answers"],
        answered["engine"],
        native=True,
        typed_content=caps.get("supports_typed_content", True),
    )
    templates = reference["facts"]["templates"]
    stored = vocabulary.templates
    return [
        *_judge_renderings(both, vocabulary, vocabulary.bos, templates, stored),
        judge_caps(both, answered, tools=WITH_TOOLS not in templates, stored=stored.get("default")),
    ]


def _judge_renderings(
    both: Renderings,
    vocabulary: Vocabulary | None,
    bos: int | None,
    templates: Mapping[str, str],
    stored: Mapping[str, str],
) -> list[Finding]:
    return [
        judge_text(both, "rendered_text", "\n".join(stored.values())),
        judge_ids(both, vocabulary),
        judge_bos(both, bos, "bos_count"),
        judge_continued(both, templates.get("default"), stored.get("default")),
    ]


def _by_python(
    case: Case, conversations: Sequence[Conversation], reference: dict[str, Any], vocabulary: Vocabulary
) -> list[Finding]:
    """llama-cpp-python against the reference; where that has a template for tools, without tools."""
    templates = reference["facts"]["templates"]
    known = [not (WITH_TOOLS in templates and conversation.tools) for conversation in conversations]
    chosen = [conversation for conversation, wanted in zip(conversations, known, strict=True) if wanted]
    answers = [answer for answer, wanted in zip(reference["answers"], known, strict=True) if wanted]
    try:
        answered = llama_cpp_python.render(case, chosen)
    except UnloadableError as error:
        return [BUILD.fail("rendered_text_python", str(error))]
    both = Renderings(chosen, reference | {"answers": answers}, answered["answers"], answered["engine"])
    stored = vocabulary.templates
    return [
        judge_python(both, answered, templates.get("default"), stored.get("default")),
        judge_bos(both, vocabulary.bos, "bos_count_python"),
    ]


def _malformed(reference: dict[str, Any]) -> Finding | None:
    """A finding when the source's own template does not parse."""
    if not all(answer["error"].startswith(MALFORMED) for answer in reference["answers"]):
        return None
    reason = f"the source's own template is malformed: {reference['answers'][0]['error']}"
    return BUILD.fail("rendered_text", reason)


def _judge_absence(case: Case, vocabulary: Vocabulary | None) -> Finding:
    """A model without a template is skipped, unless its artifact brings one."""
    stored = vocabulary.templates if vocabulary is not None else {}
    if not stored:
        return BUILD.skip("template_text", "the source has no chat template")
    text = next(iter(stored.values()))
    return BUILD.fail(
        "template_text",
        f"{case.name} holds a chat template that the source does not have: {text[:80]!r}",
    )


def _judge_templates(templates: Mapping[str, str], stored: Mapping[str, str]) -> list[Finding]:
    """Each stored template is the source's, byte for byte: the default one, then those with a name."""
    names = ["default", *sorted({*templates, *stored} - {"default"})]
    return [_judge_template(name, templates.get(name), stored.get(name)) for name in names]


def _judge_template(name: str, template: str | None, stored: str | None) -> Finding:
    metric = "template_text" if name == "default" else f"template_text of {name}"
    sizes = len((stored or "").encode()), len((template or "").encode())
    if template is None and stored is None:
        return BUILD.skip(metric, "the source has named templates only")
    if stored == template:
        return BUILD.fact(metric, sizes[0], "", sizes[1], note="bytes, all equal")
    if stored is None:
        problem = "the artifact has no chat template" + (f" {name}" if name != "default" else "")
    elif template is None:
        problem = f"the source has no such template: {stored[:80]!r}"
    else:
        problem = explain_text(template, stored)
    return BUILD.fact(metric, sizes[0], problem, sizes[1])


def _judge_names(templates: Mapping[str, str], vocabulary: Vocabulary) -> list[Finding]:
    """The list ``tokenizer.chat_templates`` names the file's named templates, where there are any."""
    names = sorted({*templates} - {"default"})
    if not names and not vocabulary.template_names:
        return []
    found = sorted(vocabulary.template_names)
    problem = "tokenizer.chat_templates does not list the source's named templates" if found != names else ""
    return [BUILD.fact("template_names", ", ".join(found) or "none", problem, ", ".join(names) or "none")]
