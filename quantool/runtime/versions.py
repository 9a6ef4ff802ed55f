"""Versions of everything that takes part in a run."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from quantool import __version__
from quantool.errors import DependencyError
from quantool.runtime import toolchain

DISTRIBUTIONS = (
    "compressed-tensors", "datasets", "gguf", "huggingface-hub", "llama-cpp-python", "llmcompressor", "lm_eval",
    "numpy", "safetensors", "tokenizers", "torch", "transformers", "vllm", "xllamacpp",
)  # fmt: skip
"""Libraries whose version is recorded."""


def versions() -> dict[str, str]:
    """Versions of quantool, Python's libraries and llama.cpp's commit that take part in a run."""
    found = {name: version_of(name) for name in ("quantool", *DISTRIBUTIONS)}
    found = {name: text for name, text in found.items() if text}
    try:
        found["llama.cpp"] = toolchain.locate().commit or "unknown"
    except DependencyError:
        found["llama.cpp"] = "not installed"
    return found


@cache
def version_of(distribution: str) -> str:
    """The installed version, of quantool this one's own; empty for what is not installed."""
    try:
        return __version__ if distribution == "quantool" else version(distribution)
    except PackageNotFoundError:
        return ""
