"""Imported: AWQ and GPTQ are calibrated in bfloat16 whatever the processor, to compare their time with float32's."""

from __future__ import annotations

from typing import Any

from quantool.methods._compressed import calibrate
from quantool.runtime.worker import Report, preloaded

_quantize = calibrate.quantize


@preloaded("llmcompressor")
def quantize_in_bfloat16(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: calibrate without widening."""
    calibrate.widen = lambda _model: None
    return _quantize(request, report)


calibrate.quantize = quantize_in_bfloat16
