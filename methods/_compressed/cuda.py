"""The CUDA devices of this machine, asked of the driver itself: importing torch for it takes seconds."""

from __future__ import annotations

import ctypes

FP8_CAPABILITY = (8, 9)
"""Ada and Hopper (9.0) multiply FP8 in hardware; older GPUs unpack the weights first."""
MAJOR, MINOR = 75, 76  # cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def capabilities() -> list[tuple[int, int]]:
    """Compute capability of each device; empty without a driver or device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for device in range(count.value):
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
        found.append((major.value, minor.value))
    return found


def fp8_warning(devices: list[tuple[int, int]]) -> str | None:
    """What a plan says about FP8 on ``devices``; None when they have it in hardware."""
    if devices and min(devices) >= FP8_CAPABILITY:
        return None
    here = ", ".join(f"{major}.{minor}" for major, minor in devices)
    this = f"compute capability {here} here" if here else "none here"
    return f"FP8 runs in hardware on GPUs of compute capability 8.9 and more (Ada, Hopper 9.0): {this}"
