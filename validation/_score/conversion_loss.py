"""What an artifact lost, by where it was lost: in the conversion to GGUF, or in the quantization of the converted file.

The base, the unquantized GGUF that a level is made from, is scored on the first windows of each corpus: beside the
reference (the conversion's damage, which must keep the gates of an unquantized file), and the level beside it (the
quantization's damage, for the record). Damage to the tokenizer is not among these: all are scored on the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantool import gates
from quantool.gates import ALL_LEVELS
from quantool.records import Finding, Gates
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._findings.limits import Gate, gated, shown
from quantool.validation._findings.statistics import Tokens, summarize

BASE_TOKENS = 2048
"""Tokens of each corpus that the base is scored on (one window at least)."""
UNQUANTIZED = {0: "F32", 1: "F16", 32: "BF16"}
"""``general.file_type`` of files that are not quantized (llama.h, enum llama_ftype)."""
CONVERSION, QUANTIZATION = "conversion_kld", "quantization_kld"


@dataclass(frozen=True)
class BaseScores:
    """The scores of a base on one corpus, and of a level beside it."""

    name: str
    file_type: int
    scores: Tokens | None
    """Beside the reference; None when the base cannot be scored (``failure``)."""
    divided: Tokens | None
    """The level beside the base; None when they were not compared."""
    failure: str = ""


def windows_of(context: int) -> int:
    """Windows of each corpus that the base is scored on."""
    return max(1, BASE_TOKENS // context)


def conversion_limit(file_type: int, configured: Mapping[str, Gates]) -> float | None:
    """The limit of the mean KLD for an unquantized file: its own gates, whatever is set for all levels together."""
    named = {level: own for level, own in configured.items() if level != ALL_LEVELS}
    return gates.resolve(UNQUANTIZED[file_type], named).max_mean_kld


def findings_of(base: BaseScores, corpus: str, configured: Mapping[str, Gates], check: str) -> list[Finding]:
    """The findings of one corpus: ``conversion_kld``, gated, and ``quantization_kld``."""
    if base.scores is None:
        reason = f"the base {base.name} cannot be scored: {base.failure}"
        return [FindingBuilder(check).fail(CONVERSION, reason, corpus=corpus)]
    text = f"mean KL divergence of the base {base.name} from the reference, {len(base.scores.kld)} tokens"
    estimate = summarize(base.scores).mean_kld
    limit = conversion_limit(base.file_type, configured)
    found = [gated(Gate(CONVERSION, estimate, limit, 1, text), corpus, check)]
    if base.divided is not None:
        text = f"mean KL divergence from the base {base.name}, {len(base.divided.kld)} tokens"
        found.append(
            gated(Gate(QUANTIZATION, summarize(base.divided).mean_kld, None, 1, text), corpus, check)
        )
    return found


def without_base(check: str) -> Finding:
    """The finding of a GGUF whose base is not there."""
    reason = "conversion and quantization are not told apart: that needs the unquantized GGUF that this one was made from"
    return FindingBuilder(check).skip(CONVERSION, f"{reason} (--base FILE)")


def unquantized(file_type: int, check: str) -> Finding:
    """The finding of a GGUF that is not quantized itself."""
    reason = f"it is {UNQUANTIZED[file_type]}, not quantized: whatever it loses, the conversion lost"
    return FindingBuilder(check).skip(QUANTIZATION, reason)


def blame(base: BaseScores, conversion: Finding) -> str:
    """Which one broke, said of a level that lost too much; ``conversion`` is the first of ``findings_of``."""
    if base.scores is None:
        return f"the base {base.name} cannot be scored either: the conversion broke"
    lost = shown(summarize(base.scores).mean_kld)
    if conversion.verdict.fails:
        return f"the base {base.name} itself is off (KLD {lost}): the conversion broke"
    own = (
        f" (KLD {shown(summarize(base.divided).mean_kld)} from the base)" if base.divided is not None else ""
    )
    return f"the conversion is sound (KLD {lost}), so the quantization of this level broke{own}"
