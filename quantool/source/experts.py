"""How many experts a checkpoint has, and how many of them a token goes to, by config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
USED = ("num_experts_per_tok", "moe_topk", "num_experts_per_token")


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer."""

    count: int
    used: int
    """To how many of them a token goes."""

    def mean_tokens(self, tokens: int) -> float:
        """What an expert sees of ``tokens`` when all are chosen alike."""
        return tokens * self.used / self.count


def read_experts(config: Mapping[str, Any]) -> Experts | None:
    """The experts of a model by ``config`` (config.json); None for a dense one."""
    text = config.get("text_config")
    parts = (text, config) if isinstance(text, dict) else (config,)
    for part in parts:
        count = next((part[key] for key in COUNTS if type(part.get(key)) is int), 0)
        used = next((part[key] for key in USED if type(part.get(key)) is int), 0)
        if count > 1 and 0 < used <= count:
            return Experts(count, used)
    return None


def coverage_note(config: Mapping[str, Any], tokens: int, least: int) -> list[str]:
    """A warning when ``tokens`` of calibration text give an expert fewer than ``least`` even if all are chosen alike."""
    experts = read_experts(config)
    if experts is None or (mean := experts.mean_tokens(tokens)) >= least:
        return []
    text = f"{tokens:,} tokens of calibration text reach each of {experts.count} experts {mean:.0f} times on average"
    return [f"{text}, and {least} are the least: give more text (sample_size, calibration_config)"]
