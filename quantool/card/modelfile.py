"""The Modelfile for Ollama, and what the card says about Ollama: from what the check ``ollama`` found, nothing without it.

A Modelfile without TEMPLATE leaves the chat to the file's own template (Ollama 0.30 and newer), unless Ollama has one of
its own for a template that is nearly the same (``template/index.json``). Context and sampling have to
be in it: Ollama reads neither from a GGUF, and has values of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantool.card.holdings import adapters
from quantool.records import Finding, Report, Verdict
from quantool.report.recommend import recommend
from quantool.report.sections import folded

MODELFILE = "Modelfile"
CHECK = "ollama"
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""A name of generation_config.json to Ollama's (docs/modelfile.mdx, "PARAMETER")."""


def modelfile(reports: Sequence[Report], sampling: Mapping[str, float], context: int) -> str | None:
    """The Modelfile of the recommended file; None unless plain conversations were found equal, or it has several parts."""
    chosen = _recommended(reports)
    found = None if chosen is None else _found(chosen, "conversations")
    if chosen is None or found is None or found.verdict is not Verdict.PASS or len(chosen.artifact.files) > 1:
        return None
    lines = [f"FROM ./{chosen.artifact.files[0].name}"]
    lines += [*(f"ADAPTER ./{name}" for name in adapters([chosen])), f"PARAMETER num_ctx {context}"]
    lines += [f"PARAMETER {PARAMETERS[name]} {value:g}" for name, value in sampling.items()]
    return "".join(f"{line}\n" for line in lines)


def ollama(repo: str, reports: Sequence[Report], sampling: Mapping[str, float], context: int) -> str:
    """How to run the recommended file in Ollama, folded; a warning where it does not do it justice; empty if nobody looked."""
    chosen = _recommended(reports)
    found = None if chosen is None else _found(chosen, "conversations")
    if chosen is None or found is None:
        return ""
    if found.verdict is not Verdict.PASS:
        return f"Ollama is not recommended: of the conversations that were tried, {found.measured} came out as the model's own template has them.\n"
    text = ""
    if (own := modelfile(reports, sampling, context)) is not None:
        name = repo.lower()
        text = (
            f"With `{MODELFILE}` beside the file (Ollama 0.30 or newer, which uses the file's own template):\n\n"
            f"```sh\nollama create {name} -f {MODELFILE}\nollama run {name}\n```\n\n"
            f"```\n{own}```\n\n"
            "Where Ollama knows a template that is much like the file's own, `ollama create` takes that instead, which was not "
            "compared: a server that is started with `OLLAMA_GO_TEMPLATE=0` keeps to the file's.\n\n"
            "Without the Modelfile Ollama takes a context and a sampling of its own; `ollama run hf.co/…` also takes a chat "
            "template that the Hub derives, which was not compared either.\n"
        )
    tools = _found(chosen, "tools")
    if tools is not None and tools.verdict is not Verdict.PASS:
        text += (
            "\nFor tool calls use llama-server: Ollama hands tools on in another form than they are sent, so of "
            f"the conversations with tools {tools.measured or 'none'} came out as the model's own template has them.\n"
        )
    return folded("With Ollama", text)


def _recommended(reports: Sequence[Report]) -> Report | None:
    chosen = recommend(reports)
    return chosen.report if chosen else None


def _found(report: Report, metric: str) -> Finding | None:
    """A finding of the check; None where it had nothing to compare."""
    return next(
        (
            finding
            for finding in report.findings
            if (finding.check, finding.metric) == (CHECK, metric) and finding.measured is not None
        ),
        None,
    )
