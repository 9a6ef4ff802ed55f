"""What torch and llama.cpp were built for here, told from their files: where each computes, and builds that crash."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path

from quantool.runtime.gpus import capabilities, devices

CXX = "libstdc++.so.6"
SYSTEM_LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
PT_LOAD, PT_DYNAMIC = 1, 2  # elf.h
DT_NEEDED, DT_STRTAB = 1, 5


def places(device: str | None) -> dict[str, str]:
    """Where each engine computes with the ``device`` of a configuration, and what keeps it from the GPUs that are there.

    DependencyError for a GPU that is not there.
    """
    wanted, count = devices(device), len(capabilities())
    used = len(wanted.numbers) or count
    cards = f"{used} GPUs" if used > 1 else "the GPU"
    wanted.variables()
    if wanted.kind == "cpu" or not count:
        idle = ", as device: cpu says" if count else ""
        return dict.fromkeys(("torch", "llama.cpp"), f"on the CPU{idle}")
    return {
        "torch": f"on {cards}"
        if torch_has_cuda()
        else "on the CPU: a build without CUDA, so the GPU idles; install torch's CUDA build",
        "llama.cpp": "on the CPU: built without CUDA, so the GPU idles; make setup CUDA=1"
        if not llama_cpp_has_cuda()
        else f"on {cards}"
        if wanted.kind == "cuda"
        else "on the CPU, as device: auto says, so the GPU idles; set device: cuda",
    }


def torch_has_cuda() -> bool:
    """Whether torch can use NVIDIA's GPUs."""
    return _library("torch", "libtorch_cuda.so") is not None


def llama_cpp_has_cuda() -> bool:
    """Whether llama.cpp can."""
    return _library("llama_cpp", "libggml-cuda.so") is not None


def crash_of_own_cxx() -> str | None:
    """Why llama.cpp may die beside torch or NumPy, and what mends it; None where it was built soundly.

    Linked with a C++ library of its own (some CUDA hosts' compilers do that) its objects are freed by the system's one.
    """
    library = _library("llama_cpp", "libllama.so")
    if library is None or CXX in needed(library):
        return None
    system = next((path for folder in SYSTEM_LIBRARIES if (path := Path(folder) / CXX).is_file()), Path(CXX))
    return (
        f"{library.name} holds a C++ library of its own (it does not need {CXX}), which makes llama.cpp crash beside torch: "
        f"set LD_PRELOAD={system}, or build it with another compiler"
    )


def needed(path: Path) -> list[str]:
    """The libraries that a 64-bit ELF file names as DT_NEEDED; empty for any other file (System V ABI, ELF-64)."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return []
    offset, size, count = struct.unpack_from("<Q14xHH", data, 0x20)
    segments = [struct.unpack_from("<II4Q", data, offset + number * size) for number in range(count)]
    dynamic = next(
        ((start, length) for kind, _, start, _, _, length in segments if kind == PT_DYNAMIC), (0, 0)
    )
    entries = [struct.unpack_from("<QQ", data, place) for place in range(dynamic[0], sum(dynamic), 16)]
    table = next((value for tag, value in entries if tag == DT_STRTAB), 0)
    for kind, _, start, address, _, length in segments:
        if kind == PT_LOAD and address <= table < address + length:
            table += start - address
            break
    names = [table + value for tag, value in entries if tag == DT_NEEDED]
    return [data[name : data.index(b"\0", name)].decode() for name in names]


def _library(package: str, name: str) -> Path | None:
    """A library below the ``lib`` folder of an installed package, which is not imported."""
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return next((path for folder in folders if (path := Path(folder) / "lib" / name).is_file()), None)
