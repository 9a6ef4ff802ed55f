"""In which floating type torch computes on this machine's processor.

Where a CPU has no instructions for products of bfloat16 or float16, torch makes them one by one: 2.7 GFLOPS where float32
has 80 (2048 x 512 x 1408, per CPU second, torch 2.13; AVX2, and float16 on AVX-512 alike). There all is computed in float32 from the
same weights, which is the more exact, and the same to 1e-5 on every processor.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""By dtype, the names in /proc/cpuinfo of instructions that multiply it (x86, then Arm)."""
LIMITS = {
    "bfloat16": ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "DEFAULT", "ALL"),
    "float16": ("AVX512_CORE_FP16", "AVX512_CORE_AMX_FP16", "AVX10", "DEFAULT", "ALL"),
}
"""What ONEDNN_MAX_CPU_ISA, which limits torch's library for such products, allows them with (oneDNN 3.12)."""


def native() -> tuple[str, ...]:
    """The short floating types that this processor multiplies by instructions of its own."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return tuple(name for name, flags in FLAGS.items() if flags & _flags() and limit.startswith(LIMITS[name]))


@cache
def _flags() -> frozenset[str]:
    """The processor's features; none where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").split())


def widen(model: Any) -> None:
    """Let a torch model on the CPU compute in float32 where its own type is not native; 8-bit weights stay.

    The values of its weights stay what they are. A model elsewhere than on the CPU is left alone.
    """
    import torch

    short = {getattr(torch, name) for name in FLAGS.keys() - set(native())}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):  # noqa: SLF001 - of torch.nn.Module; each may be None
            for tensor in tensors.values():
                if tensor is not None and tensor.device.type == "cpu" and tensor.dtype in short:
                    tensor.data = tensor.data.float()
