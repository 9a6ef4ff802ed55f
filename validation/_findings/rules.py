"""Rules that were read from another project's source: with a newer version of it they are no proof that something is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from quantool.records import Finding, Verdict


@dataclass(frozen=True)
class Rules:
    """Rules of ``project`` as its ``version`` has them."""

    project: str
    version: str
    """The newest that they were read from; later patches of it have the same."""
    distribution: str
    """The Python package whose installed version counts."""

    def newer(self, stated: object = None) -> str:
        """The version installed here, or ``stated`` by an artifact, that is newer than these rules; empty when none is."""
        try:
            installed = version(self.distribution)
        except PackageNotFoundError:
            installed = ""
        known = _numbers(self.version)
        found = [text for text in (installed, stated) if isinstance(text, str)]
        return max((text for text in found if _numbers(text)[: len(known)] > known), key=_numbers, default="")

    def judged(self, finding: Finding, stated: object = None) -> Finding:
        """The finding; SKIPPED, with the reason, where it fails by rules that a newer version may have changed."""
        if not finding.verdict.fails or not (newer := self.newer(stated)):
            return finding
        reason = f"judged by the rules of {self.project} {self.version}, and {newer} may have others"
        return finding.model_copy(
            update={"verdict": Verdict.SKIPPED, "detail": f"{reason}; by these: {finding.detail}"}
        )


LLAMA_CPP = Rules("llama-cpp-python's llama.cpp", "0.3.36", "llama-cpp-python")
COMPRESSED_TENSORS = Rules("compressed-tensors", "0.19", "compressed-tensors")
VLLM = Rules("vLLM", "0.24", "vllm")


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version: ``0.24.1rc1+cpu`` is 0, 24, 1."""
    matched = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, matched[0].split("."))) if matched else ()
