"""A worker: the converter as upstream has it, to compare bytes and time with."""

from __future__ import annotations

import contextlib
from typing import Any

from quantool.methods._llama_cpp import convert


def convert_as_upstream(request: dict[str, Any], report: Any) -> dict[str, Any]:
    """Convert without anything ahead of the writer, rounding in NumPy."""
    vars(convert).update(
        round_with_torch=lambda _gguf: None, prepared_ahead=lambda *_: contextlib.nullcontext()
    )
    return convert.convert(request, report)
