"""FP8 (E4M3) for GPUs that multiply it in hardware: Ada and Hopper."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantool.methods._compressed import outline as _compressed
from quantool.methods._compressed.cuda import fp8_warning
from quantool.methods._compressed.make import compressed_method
from quantool.methods._compressed.schemes import FP8
from quantool.plugins.contract import Outline, Request
from quantool.runtime.gpus import capabilities

RECIPE = _compressed.Recipe("fp8", "FP8", "rtn", FP8)


class Options(_compressed.CompressedOptions):
    """``quantization_config`` of the method fp8."""

    kv_cache: Literal["fp8", "fp8_head"] | None = Field(
        None,
        description="fp8: calibrated scales for the attention cache too, one a layer; fp8_head: one for each head of "
        "keys, which vLLM takes with Flash Attention. Needs calibration text.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Shards streamed side by side by the levels without calibration; default up to 4.",
    )


def outline(request: Request, options: Options) -> Outline:
    """Plan the levels; says which GPUs run them in hardware."""
    note = fp8_warning(capabilities())
    return _compressed.outline(RECIPE, request, options, warnings=(note,) if note else ())


quantize = compressed_method(RECIPE, Options, outline)
