"""What llama.cpp decides for each level, by dry runs, and what quantizing costs in memory and time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quantool.methods._llama_cpp import dry_run
from quantool.methods._llama_cpp.quantize import rehearse
from quantool.records import fingerprint
from quantool.runtime import process, toolchain
from quantool.runtime.workspace import write_text

MAX_BUFFER = 8 << 30  # llama.cpp 0c1e570, src/llama-quant.cpp: LLAMA_QUANT_MAX_BUF_SIZE
WORK = {
    "IQ4": 5e3, "IQ": 1e5, "TQ": 1e3, **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K"), 2.5e3), "Q6_K": 2e3, "": 200.0,
}  # fmt: skip
"""By the start of a level: operations for each weight, as the seconds of llama.cpp 0c1e570 compare with products."""


def dry_runs(
    rehearsal: dry_run.Rehearsal, levelled: Mapping[str, dict[str, Any]], *, imatrix: bool
) -> list[dict[str, Any]]:
    """llama.cpp's decision for each level with its settings (``quantize``); kept beside the rehearsal."""
    known = toolchain.levels()
    runs = [
        {
            "ftype": known[name].ftype,
            "copy": name == "COPY",
            "settings": settings | {"keep_split": False},
            "imatrix": {"path": None, "label": ""} if imatrix else None,
        }
        for name, settings in levelled.items()
    ]
    kept = rehearsal.folder / f"runs-{fingerprint(runs, toolchain.installed_version())[:16]}.json"
    with dry_run.locked(rehearsal.folder):
        if not kept.is_file():
            result = process.call(
                rehearse,
                {"base": str(rehearsal.header), "runs": runs},
                log=rehearsal.folder / "quantizer.log",
            )
            write_text(kept, json.dumps(result["runs"]))
    found: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def quantize_ram(rehearsal: dry_run.Rehearsal, types: Mapping[str, str]) -> int:
    """One slab of the largest tensor as stored, as float32 and as quantized, and the library."""
    largest = max(
        2 * t.bytes + t.bytes + dry_run.tensor_bytes(t, types[name]) for name, t in rehearsal.tensors.items()
    )
    return min(largest, MAX_BUFFER) + (200 << 20)


def operations(level: str) -> float:
    """What quantizing a weight costs, in multiplications and additions of a matrix product (they are far quicker)."""
    return next((cost for start, cost in WORK.items() if level.startswith(start)), WORK[""])
