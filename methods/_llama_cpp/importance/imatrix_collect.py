"""The child that computes an importance matrix: mean squared activations of every weight's input columns.

As tools/imatrix/imatrix.cpp of llama.cpp: the same entries and counts; the sums differ by the order of addition (8e-5
relative measured). Conversations keep their special tokens, because the ids
come from the source's own tokenizer.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantool.errors import ConfigError, QuantizationError
from quantool.methods._llama_cpp.importance.activations import Collector
from quantool.runtime.llama_cpp import LlamaLog, LoadError, fill, load_gguf
from quantool.runtime.worker import Report, preloaded

WINDOWS_PER_DECODE = 4
LOGIT_BYTES = 512 << 20
"""Float32 logits that a GPU computes at once."""


@preloaded("transformers")
def tokenize(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Render and tokenize the calibration documents with the source's tokenizer.

    Request: ``config`` (the configuration), ``model`` (folder), ``output`` (.npy), ``context``, ``max_tokens``.
    Writes int32 [windows, context]; the first token of each window is BOS where the tokenizer adds one.
    Result: ``windows``, ``documents``, ``sha256`` of the ids.
    """
    from transformers import AutoTokenizer

    from quantool.config.schema import Config
    from quantool.texts import corpus

    config = Config.model_validate(request["config"])
    tokenizer = AutoTokenizer.from_pretrained(request["model"], trust_remote_code=config.trust_remote_code)
    documents = corpus.calibration(config)
    context, limit = request["context"], request["max_tokens"]
    ids: list[int] = []
    used = 0
    for document in documents:
        text = corpus.render(document, tokenizer)
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        used += 1
        report(min(len(ids), limit), limit)
        if len(ids) >= limit:
            break
    windows = min(len(ids), limit) // context
    if not windows:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens, fewer than one window of {context}",
            hint="give more text (dataset_path or dataset_id, sample_size)",
        )
    table = np.asarray(ids[: windows * context], np.int32).reshape(windows, context)
    probe = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is not None and probe and probe[0] == tokenizer.bos_token_id:
        table[:, 0] = tokenizer.bos_token_id
    with Path(request["output"]).open("wb") as file:
        np.save(file, table)
    return {"windows": windows, "documents": used, "sha256": hashlib.sha256(table.tobytes()).hexdigest()}


@preloaded("torch")
def collect(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run the base model over the windows and write the matrix in GGUF format.

    Request: ``base`` (GGUF), ``ids`` (.npy of ``tokenize``), ``output``, ``label`` (name of the text), ``gpu`` (bool).
    Result: ``entries``, ``chunks``, ``incomplete`` (expert tensors with experts that saw no token).
    """
    ids = np.load(request["ids"])
    collector = Collector()
    _decode(request["base"], ids, collector, report, gpu=request["gpu"])
    _write(Path(request["output"]), collector, request["label"], ids)
    incomplete = [name for name, counts in collector.counts.items() if not bool(counts.all())]
    return {"entries": len(collector.sums), "chunks": len(ids), "incomplete": incomplete}


def _decode(base: str, ids: NDArray[np.int32], collector: Collector, report: Report, *, gpu: bool) -> None:
    """Feed all windows through the model, several sequences a batch, all outputs asked for."""
    import os

    import llama_cpp

    windows, context = ids.shape
    together = min(WINDOWS_PER_DECODE, windows)
    with ExitStack() as stack:
        log = stack.enter_context(LlamaLog())
        try:
            model = stack.enter_context(load_gguf(Path(base), log, gpu=gpu))
        except LoadError as error:
            raise QuantizationError(f"llama.cpp cannot load {Path(base).name}: {error.message}") from error
        callback = llama_cpp.ggml_backend_sched_eval_callback(collector.callback)
        shape = llama_cpp.llama_context_default_params()
        shape.n_ctx = shape.n_batch = context * together
        entries = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        at_once = LOGIT_BYTES // (4 * entries * context) if gpu else 1
        shape.n_ubatch = context * max(1, min(together, at_once))
        shape.n_seq_max = together
        shape.n_threads = shape.n_threads_batch = os.cpu_count() or 1
        shape.cb_eval = callback
        state = llama_cpp.llama_init_from_model(model, shape)
        if not state:
            log.require_room()
            raise QuantizationError(
                f"llama.cpp cannot make a context of {context * together} tokens for {base}"
            )
        stack.callback(llama_cpp.llama_free, state)
        batch = llama_cpp.llama_batch_init(context * together, 0, 1)
        stack.callback(llama_cpp.llama_batch_free, batch)
        for start in range(0, windows, together):
            part = ids[start : start + together]
            fill(
                batch,
                part.ravel(),
                np.tile(np.arange(context, dtype=np.int32), len(part)),
                np.repeat(np.arange(len(part), dtype=np.int32), context),
                np.ones(part.size, bool),
            )
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)
            code = llama_cpp.llama_decode(state, batch)
            collector.forget()
            if collector.failure is not None:
                raise collector.failure
            if code != 0:
                raise QuantizationError(f"llama_decode failed with code {code} on {base}")
            report(min(start + together, windows) * context, windows * context)


def _write(path: Path, collector: Collector, label: str, ids: NDArray[np.int32]) -> None:
    """The GGUF layout of tools/imatrix: ``<weight>.in_sum2`` and ``<weight>.counts``, no architecture."""
    import gguf

    if not collector.sums:
        raise QuantizationError("no activations were collected")
    sums = {name: values.cpu().numpy() for name, values in collector.sums.items()}
    broken = [name for name, values in sums.items() if not np.isfinite(values).all()]
    if broken:
        raise QuantizationError(f"the activations of {', '.join(broken[:3])} are not finite")
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [label])
    writer.add_uint32("imatrix.chunk_count", len(ids))
    writer.add_uint32("imatrix.chunk_size", ids.shape[1])
    for name in sorted(sums):
        counts = collector.counts[name].cpu().numpy().astype(np.float32).reshape(-1, 1)
        writer.add_tensor(f"{name}.in_sum2", sums[name].reshape(len(counts), -1))
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
