"""What calibration costs: memory and arithmetic, from which the plan tells what fits and how long it takes."""

from __future__ import annotations

from quantool.config.schema import Config
from quantool.methods._compressed.sizes import max_seq_length
from quantool.records import Source
from quantool.runtime.arithmetic import native
from quantool.runtime.gpus import capabilities

GIB = 1 << 30
PASSES = {"awq": 20, "gptq": 4, "rtn": 2}
"""Forward passes of the calibration text that an algorithm costs, its search or factorizations among them."""
ACTIVATIONS = {"awq": 4, "gptq": 2, "rtn": 2}
"""Activations of all samples that are kept at once: those between layers, of AWQ also inside a layer."""


def ram(algorithm: str, config: Config, source: Source, stored: int) -> int:
    """Peak memory, from above: libraries, the model (``stored`` bytes in files), a layer in float32, activations."""
    facts = source.facts
    model = max(stored, 4 * facts.parameters) if _widened(config, source) else stored
    layer = 4 * facts.parameters // facts.layers
    kept = ACTIVATIONS[algorithm] * _tokens(config) * facts.hidden * 2
    return 2 * GIB + model * 5 // 4 + 2 * layer + kept


def operations(algorithm: str, config: Config, source: Source) -> float:
    """Multiplications and additions."""
    return 2.0 * source.facts.parameters * _tokens(config) * PASSES[algorithm]


def _tokens(config: Config) -> int:
    """Tokens of calibration text at most; of a text file usually one for four characters."""
    path, tokens = config.dataset_path, config.sample_size * max_seq_length(config)
    if path is None or not path.is_file() or path.suffix == ".parquet":
        return tokens
    return min(tokens, path.stat().st_size // 4)


def _widened(config: Config, source: Source) -> bool:
    """Whether calibration computes in another type than the checkpoint's (``arithmetic.widen``)."""
    own = {"BF16": "bfloat16", "F16": "float16"}.get(source.facts.dtype)
    on_cpu = config.device == "cpu" or not capabilities()
    return on_cpu and own is not None and own not in native()
