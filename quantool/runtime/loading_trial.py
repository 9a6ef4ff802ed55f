"""Whether llama.cpp loads a model in one process with torch: tried on one of 6,000 parameters, in a child that may die."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from quantool.errors import DependencyError
from quantool.runtime import builds, process
from quantool.runtime.gpus import NO_GPU
from quantool.runtime.llama_cpp import LlamaLog, load_gguf
from quantool.runtime.worker import Report, preloaded

WIDTH, WORDS = 32, 32


def loads_beside_torch() -> str:
    """``yes``, or why not and what to do."""
    with tempfile.TemporaryDirectory(prefix="quantool-") as folder:
        request = {"path": str(Path(folder) / "trial.gguf"), "gpu": builds.llama_cpp_has_cuda()}
        variables = {} if request["gpu"] else NO_GPU
        try:
            process.call(
                load, request, log=Path(folder) / "log", failure=DependencyError, variables=variables
            )
        except DependencyError as error:
            return f"no: {builds.crash_of_own_cxx() or error.message}"
    return "yes"


@preloaded("torch")
def load(request: dict[str, Any], report: Report) -> dict[str, Any]:  # noqa: ARG001 - a worker's signature
    """Worker: write a model to ``path`` and load it, to the GPU with ``gpu``."""
    import torch  # noqa: F401 - what the trial is about

    path = Path(request["path"])
    write_model(path)
    with LlamaLog() as log, load_gguf(path, log, gpu=request["gpu"]):
        return {}


def write_model(path: Path) -> None:
    """A Llama of one layer without a vocabulary, in GGUF; its weights are zeros."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(WIDTH)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("no_vocab")
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}": (WIDTH, WIDTH) for name in matrices}
    shapes |= dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (WIDTH,))
    shapes |= dict.fromkeys(("token_embd", "output"), (WORDS, WIDTH))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
