"""An engine opened by its name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError, nearest
from quantool.validation._engines import llama_cpp_answers, transformers_answers, vllm
from quantool.validation._engines.interface import Engine

ENGINES = ("llama.cpp", "transformers", "vllm")


def start(
    engine: str,
    artifact: Path,
    *,
    context: int,
    device: str,
    trust_remote_code: bool,
    cache: str | None = None,
) -> AbstractContextManager[Engine]:
    """Load ``artifact`` (a GGUF file or a folder) into ``engine``; freed afterwards.

    ``cache`` is the type of the attention cache, where the engine has a choice (llama.cpp, vLLM). ``device`` is ``auto``, ``cpu`` or ``cuda``. Raises Unsound when the artifact does not load, DependencyError when this
    machine lacks the library or the device, ConfigError for an engine that there is not.
    """
    held: Any  # mypy knows these files by two names, so their classes are not the same to it
    if engine == "llama.cpp":
        held = llama_cpp_answers.load_engine(artifact, context, gpu=device == "cuda", cache=cache)
    elif engine == "transformers":
        held = transformers_answers.load_engine(artifact, context, device, trust_remote_code)
    elif engine == "vllm":
        held = vllm.load_engine(artifact, context, trust_remote_code, cache)
    else:
        raise ConfigError(
            f"no engine {engine!r} to answer with; known: {', '.join(ENGINES)}",
            hint=nearest(engine, list(ENGINES)),
        )
    manager: AbstractContextManager[Engine] = held
    return manager
