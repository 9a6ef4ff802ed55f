"""What a plan says about FP8 on the GPUs of this machine."""

from __future__ import annotations

FP8_CAPABILITY = (8, 9)
"""Ada and Hopper (9.0) multiply FP8 in hardware; older GPUs unpack the weights first."""


def fp8_warning(devices: list[tuple[int, int]]) -> str | None:
    """What a plan says about FP8 on ``devices``; None when they have it in hardware."""
    if devices and min(devices) >= FP8_CAPABILITY:
        return None
    here = ", ".join(f"{major}.{minor}" for major, minor in devices)
    this = f"compute capability {here} here" if here else "none here"
    return f"FP8 runs in hardware on GPUs of compute capability 8.9 and more (Ada, Hopper 9.0): {this}"
