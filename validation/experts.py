"""How much calibration text each expert of a mixture saw: an expert that no token reached was quantized blindly.

Of a GGUF the importance matrix beside it says so; of a folder what its method counted. Experts below ``MIN_EXPERT_TOKENS``
are named; ``min_expert_tokens`` of the gates makes that a regression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from quantool.errors import SourceError
from quantool.formats.gguf_header import read_header
from quantool.formats.safetensors import some
from quantool.gates import MIN_EXPERT_TOKENS
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Verdict
from quantool.runtime.progress import Progress
from quantool.validation._findings.builder import SHOWN, FindingBuilder

NAME = "experts"
METRIC = "expert_tokens"
BUILD = FindingBuilder(NAME)
MATRIX_FILE = "quantize.imatrix.file"
COUNTS, EXPERTS = ".counts", "_exps."


@check(NAME, depends=Depends(gates=True, folder=True))
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Calibration tokens that reached each expert of a mixture of experts; nothing to say of other models."""
    del progress  # headers only
    try:
        tokens = _of_matrix(case) if case.engine == "llama.cpp" else _of_method(case)
    except SourceError as error:
        return [BUILD.fail(METRIC, error.message)]
    if not tokens:
        return []
    if case.details.get("all_experts"):
        total = max(sum(counts) for counts in tokens.values())
        note = "every expert saw the whole calibration text, wherever the router sent it"
        least = min(min(counts) for counts in tokens.values())
        return [
            BUILD.fact(
                METRIC,
                float(least),
                note=f"{note}; {total} choices were counted, {least} of the rarest expert",
            )
        ]
    return [compare(tokens, case.gates.min_expert_tokens)]


def compare(tokens: Mapping[str, Sequence[int]], limit: int | None) -> Finding:
    """The finding on tokens by layer and expert; ``limit`` is the gate."""
    bar = MIN_EXPERT_TOKENS if limit is None else limit
    few = sorted(
        (count, f"{layer} expert {number} ({count})")
        for layer, counts in tokens.items()
        for number, count in enumerate(counts)
        if count < bar
    )
    every = [count for counts in tokens.values() for count in counts]
    detail = f"{len(every)} experts in {len(tokens)} layers saw {min(every)} to {max(every)} tokens of calibration text"
    if few:
        named = some([name for _, name in few], SHOWN)
        detail += f"; fewer than {bar}: {len(few)} experts, {named}; give more text, or other text"
    lost = bool(few) and limit is not None
    return Finding(
        check=NAME,
        metric=METRIC,
        verdict=Verdict.REGRESSION if lost else Verdict.PASS,
        measured=float(min(every)),
        threshold=None if limit is None else float(limit),
        detail=detail,
    )


def _of_matrix(case: Case) -> dict[str, list[int]]:
    """Tokens by layer and expert from the importance matrix that a GGUF names and that lies beside it."""
    name = read_header(case.artifact).value(MATRIX_FILE)
    path = case.artifact.parent / str(name)
    if not isinstance(name, str) or "/" in name or not path.is_file():
        return {}
    header = read_header(path)
    found: dict[str, list[int]] = {}
    for tensor in header.tensors:
        if EXPERTS in tensor.name and tensor.name.endswith(COUNTS) and tensor.elements > 1:
            counts = header.read_data(tensor).view(np.float32).ravel()
            found.setdefault(tensor.name.partition(".ffn_")[0], [round(float(count)) for count in counts])
    return found


def _of_method(case: Case) -> dict[str, list[int]]:
    """Tokens by module and expert as the method counted them."""
    counted = case.details.get("expert_tokens")
    if not isinstance(counted, dict):
        return {}
    return {
        name: [count for count in counts if isinstance(count, int)]
        for name, counts in counted.items()
        if isinstance(counts, list)
    }
