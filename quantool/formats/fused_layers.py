"""Modules of a checkpoint that vLLM runs as one, so that they must be quantized alike or not at all.

From ``packed_modules_mapping`` of the models of vLLM 0.24 (``vllm/model_executor/models``); experts of a layer become one
module as well (``layers/fused_moe``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Fused module to the modules of the checkpoint that are joined in it, in their order."""

EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.\d+\.[^.]+$")


def fused(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Module in vLLM to the modules of the checkpoint that it is made of; one alone stands under its own name.

    A fused module is made only where all its parts are there. Names keep their order.
    """
    given = list(dict.fromkeys(names))
    known = set(given)
    found: dict[str, tuple[str, ...]] = {}
    for name in given:
        if expert := EXPERT.match(name):
            found[expert["experts"]] = (*found.get(expert["experts"], ()), name)
            continue
        place, _, last = name.rpartition(".")
        for whole, parts in FUSED.items():
            members = tuple(f"{place}.{part}" for part in parts)
            if last in parts and known.issuperset(members):
                found[f"{place}.{whole}"] = members
                break
        else:
            found[name] = (name,)
    return found
