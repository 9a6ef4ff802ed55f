"""What ``vllm serve`` has to be told about a model: who reads its tool calls and its reasoning, and over how many GPUs.

vLLM takes neither parser from the model. The rules go by what the chat template writes, because that is what the model was
trained to write; a format that is not known for sure gets no argument. Names are those of vLLM 0.24 (``vllm/tool_parsers``,
``vllm/reasoning``) and of its pages "Tool Calling" and "Reasoning Outputs".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantool.records import ModelFacts

GPU_BYTES = 64e9
"""Memory of the GPU that the commands are written for: the smallest Hopper there is."""
SHARE = 0.9
"""Part of it that vLLM takes (``--gpu-memory-utilization``)."""
WORKING = 8e9
"""Bytes of it for activations, graphs and a short cache."""


@dataclass(frozen=True)
class ToolFormat:
    """A way to write tool calls: what its templates contain, and vLLM's parser for it."""

    parser: str
    marks: tuple[str, ...]


TOOL_FORMATS: Sequence[ToolFormat] = (
    ToolFormat("glm45", ("<tool_call>", "<arg_key>")),
    ToolFormat("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ToolFormat("hermes", ("<tool_call>", "</tool_call>")),
    ToolFormat("mistral", ("[TOOL_CALLS]",)),
    ToolFormat("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ToolFormat("deepseek_v3", ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "```json")),
    ToolFormat("deepseek_v31", ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581sep\uff5c>")),
    ToolFormat("minimax_m2", ("<minimax:tool_call>",)),
    ToolFormat("openai", ("<|channel|>", "<|call|>")),
    ToolFormat("llama3_json", ("Environment: ipython", '"parameters": ')),
)
"""The first whose marks are all in the template; the more telling ones come first."""


def serve_arguments(facts: ModelFacts, weights: int) -> list[str]:
    """Arguments of ``vllm serve``, one string for each option with its value.

    ``weights`` are the bytes that the GPUs have to hold.
    """
    gpus = tensor_parallel(facts, weights)
    arguments = [f"--tensor-parallel-size {gpus}"] if gpus > 1 else []
    if parser := tool_parser(facts):
        arguments += ["--enable-auto-tool-choice", f"--tool-call-parser {parser}"]
    if parser := reasoning_parser(facts):
        arguments.append(f"--reasoning-parser {parser}")
    return arguments


def tool_parser(facts: ModelFacts) -> str | None:
    """The parser for the calls that the template writes; None where it takes no tools or writes them in an unknown way."""
    template = facts.named_templates.get("tool_use") or facts.chat_template or ""
    if "tools" not in template:
        return None
    return next(
        (known.parser for known in TOOL_FORMATS if all(mark in template for mark in known.marks)), None
    )


def reasoning_parser(facts: ModelFacts) -> str | None:
    """The parser for a model whose answers begin with reasoning.

    That a template can write the reasoning of earlier turns does not make it one: what counts is the place where the
    answer begins, behind ``add_generation_prompt``.
    """
    template = facts.chat_template or ""
    _, asked, start = template.rpartition("add_generation_prompt")
    if not asked or "<think>" not in start:
        return None
    if facts.model_type.startswith("glm4"):
        return "glm45"
    return "qwen3" if "enable_thinking" in start else "deepseek_r1"


def tensor_parallel(facts: ModelFacts, weights: int) -> int:
    """GPUs of ``GPU_BYTES`` that hold the model together: a power of two that divides the attention heads, 8 at most."""
    count = 1
    while count < 8 and weights / count > SHARE * GPU_BYTES - WORKING and facts.heads % (2 * count) == 0:
        count *= 2
    return count
