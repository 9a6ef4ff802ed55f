"""Whether a chat comes out the same in Ollama: what it hands on to llama.cpp's server, rendered there, beside the source's.

Since 0.30 Ollama has llama.cpp's server render a GGUF through the file's own template, where the model was made from a
Modelfile without TEMPLATE. What differs then is Ollama's doing and not the file's (``_chat.ollama``), so it is never a
regression: it is said, and the card says whether Ollama is to be used. What the Hub makes of a template for
``ollama run hf.co/…`` is another matter, and not compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Verdict
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.texts import inputs
from quantool.validation._chat import llama_server
from quantool.validation._chat.agreement import judge_ids, judge_text
from quantool.validation._chat.conversations import of_case
from quantool.validation._chat.ollama import handed_on, has_tools
from quantool.validation._chat.renderings import Renderings
from quantool.validation._engines import hf_tokenizer
from quantool.validation._engines.vocabulary import TOKENIZER, UnloadableError, Vocabulary, by_source, of_gguf
from quantool.validation._findings.builder import FindingBuilder

NAME = "ollama"
BUILD = FindingBuilder(NAME)
CONVERSATIONS, TOOLS = "conversations", "tools"
OTHER = "Ollama does not hand on what it is sent (keys of tools in another order, reasoning left out); the file is sound"


@check(
    NAME,
    depends=TOKENIZER | llama_server.SERVER | Depends(inputs=(inputs.conversations,), engine=True),
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Chats as Ollama has llama.cpp's server render them, beside the source's: plain conversations, and tools."""
    del progress  # a few seconds
    if case.engine != "llama.cpp":
        return [BUILD.skip(CONVERSATIONS, "Ollama runs GGUF files")]
    if case.source.facts.chat_template is None:
        return [BUILD.skip(CONVERSATIONS, "the source has no chat template")]
    try:
        return _judge(case, of_gguf(case)[0])
    except UnloadableError as error:
        return [BUILD.skip(CONVERSATIONS, f"llama.cpp's server cannot be asked: {error}")]


def _judge(case: Case, vocabulary: Vocabulary) -> list[Finding]:
    conversations = of_case(case)
    request = {"conversations": [conversation.request() for conversation in conversations]}
    reference = by_source(case, "chats", hf_tokenizer.render, request)
    pairs = zip(conversations, reference["answers"], strict=True)
    sent = [(each, handed, answer) for each, answer in pairs if (handed := handed_on(each)) is not None]
    answered = llama_server.render(case, [handed for _, handed, _ in sent], stage="rendered-ollama")
    findings = []
    for metric, wanted in ((CONVERSATIONS, False), (TOOLS, True)):
        chosen = [
            (each, answer, found)
            for (each, _, answer), found in zip(sent, answered["answers"], strict=True)
            if has_tools(each) is wanted
        ]
        both = Renderings(
            [each for each, _, _ in chosen],
            reference | {"answers": [answer for _, answer, _ in chosen]},
            [found for _, _, found in chosen],
            f"Ollama's request to {answered['engine']}",
            native=True,
        )
        findings.append(_conclude(metric, judge_text(both, metric), judge_ids(both, vocabulary)))
    return findings


def _conclude(metric: str, text: Finding, ids: Finding) -> Finding:
    """One finding of both: PASS where text and ids are the source's, else SKIPPED with the first difference."""
    worse = text if text.verdict is not Verdict.PASS else ids
    found = worse.model_copy(update={"check": NAME, "metric": metric})
    if found.verdict is not Verdict.REGRESSION:
        return found
    return found.model_copy(update={"verdict": Verdict.SKIPPED, "detail": f"{OTHER}; {found.detail}"})
