"""The files of a folder beside its weights, and its sizes against the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from quantool.config.sampling import GENERATION
from quantool.formats.safetensors import INDEX, TensorHeader, some
from quantool.plugins.contract import Case
from quantool.records import Finding, sha256_of
from quantool.validation._files.gguf_levels import options_of
from quantool.validation._findings.builder import FindingBuilder

OWN = ("config.json", INDEX)
TEMPLATE = "chat_template.jinja"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
BITS = 1e-3
"""Relative difference of bits a weight from the plan: calibrated levels may drop a buffer."""
HEADER = 1 << 16
"""Bytes by which a file may differ from its plan: what the saving library writes into its header."""


def judge_companions(case: Case, build: FindingBuilder) -> Finding:
    """Tokenizer, chat template and generation settings of the source are there; what this run made has their bytes."""
    rewritten = {GENERATION} if case.source.sampling else set()  # the check of its name reads that one
    names = {
        file.name: file.sha256
        for file in case.source.files
        if not file.name.endswith((".safetensors", ".md")) and file.name not in (*OWN, *rewritten)
    }
    missing = [name for name in names if not (case.artifact / name).is_file()]
    other = [
        name
        for name, digest in names.items()
        if name not in missing
        and digest is not None
        and _differs(case.artifact / name, case.source.folder / name, digest)
    ]
    lost = missing if case.output is not None else [name for name in missing if _needed(name, case.artifact)]
    problems = [f"missing: {some(lost)}"] * bool(lost)
    if case.output is not None and other:
        problems.append(f"not the source's: {some(other)}")
    changed = f", {len(other)} not the source's ({some(other)})" if other else ""
    return build.fact(
        "companions", f"{len(names) - len(missing)} of {len(names)}{changed}", "; ".join(problems)
    )


def _needed(name: str, folder: Path) -> bool:
    """Whether an artifact that others made lacks something without ``name``: tokenizers have several forms."""
    if name in VOCABULARIES:
        return not any((folder / other).is_file() for other in VOCABULARIES)
    if name == TEMPLATE:
        settings = folder / "tokenizer_config.json"
        return not settings.is_file() or b'"chat_template"' not in settings.read_bytes()
    return name in (GENERATION, "tokenizer_config.json")


def _differs(found: Path, original: Path, digest: str) -> bool:
    """Whether a file says something else than the source's; JSON may be written otherwise."""
    if sha256_of(found) == digest:
        return False
    if found.suffix == ".json" and original.is_file():
        try:
            return bool(json.loads(found.read_bytes()) != json.loads(original.read_bytes()))
        except ValueError:
            return True
    return True


def judge_plan(case: Case, stored: Mapping[str, TensorHeader], build: FindingBuilder) -> list[Finding]:
    """Weight files, their bytes and bits a weight are those that the plan announced; nothing without a plan."""
    if case.output is None:
        return []
    planned = {file.name: file.bytes for file in case.output.files if file.name.endswith(".safetensors")}
    found = {path.name: path.stat().st_size for path in case.artifact.glob("*.safetensors")}
    problems = []
    fitted = bool(options_of(case).get("fit"))  # then the plan is a budget
    excess = sum(found.values()) - sum(planned.values())
    if (excess if fitted else abs(excess)) > HEADER + BITS * sum(planned.values()):
        problems.append(f"{sum(found.values())} bytes of weights, {sum(planned.values())} were planned")
    if planned.keys() != found.keys() and len(planned) != len(found):
        problems.append(f"{len(found)} weight files, {len(planned)} were planned")
    absent = [file.name for file in case.output.files if not (case.artifact / file.name).is_file()]
    absent = [name for name in absent if name not in planned]
    if absent:
        problems.append(f"planned and not there: {some(absent)}")
    bits = 8 * sum(tensor.bytes for tensor in stored.values()) / case.source.facts.parameters
    wanted = case.output.bits_per_weight
    if wanted is not None and not math.isclose(bits, min(bits, wanted) if fitted else wanted, rel_tol=BITS):
        problems.append(f"{bits:.5g} bits a weight, {wanted:.5g} were planned")
    return [
        build.fact(
            "planned_size",
            f"{sum(found.values())} bytes, {bits:.4g} bits a weight",
            "; ".join(problems),
            float(sum(planned.values())),
        )
    ]
