"""What this machine has of what quantool can use."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path

from quantool.errors import DependencyError
from quantool.runtime import builds, loading_trial, toolchain
from quantool.runtime.progress import amount
from quantool.runtime.versions import versions

TOOLS = {
    "llama-server": "optional: chat templates are then rendered by xllamacpp",
    "llama-quantize": "optional: only quantool's own tests compare with it",
    "llama-perplexity": "optional: only quantool's own tests compare with it",
    "llama-imatrix": "optional: only quantool's own tests compare with it",
    "cmake": "needed to compile llama-cpp-python",
    "c++": "needed to compile llama-cpp-python",
    "git": "optional: it names the commit of llama_cpp_path",
}
"""Programs by name, and what it means when one is missing."""


def examine() -> dict[str, str]:
    """Facts by name, in the order to show them; nothing is installed or asked over the network.

    Loaded is only a tiny model, where the build of llama.cpp is of a kind that may crash.
    """
    found = {"python": platform.python_version(), **versions()}
    found["converter"] = _converter()
    for name, purpose in TOOLS.items():
        found[name] = str(toolchain.upstream_tool(name) or f"not found ({purpose})")
    found["chat template engine"] = _template_engine()
    found["accelerator"] = _accelerator()
    for engine, place in builds.places(None).items():
        found[f"{engine} computes"] = place
    if builds.llama_cpp_has_cuda() or builds.crash_of_own_cxx():
        found["llama.cpp beside torch"] = loading_trial.loads_beside_torch()
    found["cores"] = str(os.cpu_count())
    found["memory"] = amount(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "B")
    found["disk here"] = f"{amount(shutil.disk_usage(Path.cwd()).free, 'B')} free"
    found["cache"] = str(toolchain.cache_folder())
    found["hub token"] = _token()
    return found


def _converter() -> str:
    try:
        located = toolchain.locate()
    except DependencyError as error:
        return f"missing: {error.hint}"
    return f"{located.origin}, llama.cpp {located.commit or 'unknown commit'}, {located.folder}"


def _template_engine() -> str:
    if binary := toolchain.upstream_tool("llama-server"):
        return str(binary)
    return "xllamacpp" if find_spec("xllamacpp") else "missing: pip install xllamacpp"


def _accelerator() -> str:
    """Ask the driver's own files: importing torch for this takes seconds."""
    cards = Path("/proc/driver/nvidia/gpus")
    if not cards.is_dir():
        return "none"
    names = []
    for card in sorted(cards.iterdir()):
        text = (card / "information").read_text(encoding="utf-8", errors="replace")
        names += [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model")]
    return ", ".join(names) or "none"


def _token() -> str:
    """Whether there is one, and from where; never the token."""
    from huggingface_hub import get_token

    if not get_token():
        return "none (only publishing and private repositories need one: HF_TOKEN, or `hf auth login`)"
    return "present (HF_TOKEN)" if os.environ.get("HF_TOKEN") else "present (login)"
