"""What the workers of the compressed methods share: device, seed, memory, config.json, and library work-arounds."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from pathlib import Path

from quantool.errors import DependencyError, QuantizationError

QUANTIZATION_CONFIG = "quantization_config"


def choose_device(wanted: str) -> str:
    """``"cuda"`` or ``"cpu"`` for ``auto``, ``cuda`` or ``cpu``; to be called before torch is imported."""
    if wanted == "cpu":
        # llmcompressor moves layers to any accelerator that it sees and has no switch against it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise DependencyError(
            "device: cuda is asked for, but torch sees no CUDA device",
            hint=f"torch is {torch.__version__}; install a CUDA build, or set device: cpu",
        )
    return "cuda" if found else "cpu"


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries use the global generator
    torch.manual_seed(seed)


def peak_memory() -> dict[str, int]:
    """Highest resident memory of this process and highest CUDA allocation, bytes."""
    import torch

    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "peak_cuda": cuda}


def repair_libraries() -> None:
    """Two defects of the pinned versions that stop a sound run; see each."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():
        # llmcompressor 0.14 pins calibration tensors whether or not there is an accelerator; torch refuses without.
        IntermediatesCache.pin_memory = lambda *_args, **_names: None  # type: ignore[method-assign]
    # transformers 5.17 keeps aliases of renamed image processors in sys.modules; loading a mixture of experts looks
    # into every transformers module, and looking into these imports torchvision, which a text model has no use for.
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and ".image_processing_" in name and module.__file__ is None:
            del sys.modules[name]


def write_config(source: Path, output: Path) -> None:
    """Make config.json of ``output`` the source's own, key for key, with the quantization_config that was saved."""
    path = output / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if QUANTIZATION_CONFIG not in saved:
        raise QuantizationError("llmcompressor saved a config.json without quantization_config")
    tied = "tie_word_embeddings"
    if saved.get(tied, False) != config.get(tied, False) and tied in config:
        raise QuantizationError(f"saving changed {tied} to {saved.get(tied)}")
    config[QUANTIZATION_CONFIG] = saved[QUANTIZATION_CONFIG]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
