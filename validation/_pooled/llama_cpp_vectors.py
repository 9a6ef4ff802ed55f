"""Vectors of GGUF files by llama.cpp, pooled as each file itself says; texts go in as llama-server puts them.

llama.cpp 0c1e570: ``tools/server/server-common.cpp`` (``format_prompt_rerank``: BOS, query, EOS, SEP, document, EOS, as the
vocabulary adds them), ``src/llama-graph.cpp`` (``build_pooling``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.runtime.llama_cpp import LlamaLog, LoadError, fill, load_gguf
from quantool.runtime.worker import Report
from quantool.runtime.workspace import written
from quantool.tasks import TaskKind
from quantool.validation._engines.llama_cpp import cores
from quantool.validation._pooled.probe import Probe, load_probes, save_probes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NONE, RANK = 0, 4  # llama.h, enum llama_pooling_type
POOLINGS = {NONE: "none", 1: "mean", 2: "cls", 3: "lasttoken", RANK: "rank"}


def artifact(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: run a GGUF on the texts of ``probes``.

    Request: ``model``, ``kind`` (of the task), ``gpu``, ``probes``, ``ids`` and ``outputs`` (paths, one a corpus). Result:
    ``pooling`` (its name), ``labels`` (of a classifier), ``failure`` (why there are no vectors, or None).
    """
    listed = [load_probes(Path(path)) for path in request["probes"]]
    with ExitStack() as stack:
        log = stack.enter_context(LlamaLog())
        try:
            model = stack.enter_context(load_gguf(Path(request["model"]), log, gpu=request["gpu"]))
        except LoadError as error:
            return {"pooling": "", "failure": f"llama.cpp cannot load it: {error.message}"}
        own = [[_tokenized(model, probe) for probe in probes] for probes in listed]
        for probes, path in zip(own, request["ids"], strict=True):
            save_probes(Path(path), probes)
        longest = max(len(probe.ids) for probes in own for probe in probes)
        return _save_vectors(model, own, longest, request, report, stack)


def _save_vectors(
    model: Any,
    listed: Sequence[Sequence[Probe]],
    longest: int,
    request: dict[str, Any],
    report: Report,
    stack: ExitStack,
) -> dict[str, Any]:
    import llama_cpp as api
    import numpy as np

    context = _context(model, longest)
    if not context:
        return {"pooling": "", "failure": "llama.cpp cannot run it"}
    stack.callback(api.llama_free, context)
    pooling = api.llama_pooling_type(context)
    if pooling == NONE or (pooling == RANK) != (request["kind"] != TaskKind.EMBEDDING):
        return {"pooling": POOLINGS[pooling], "failure": None}  # vectors of another kind
    width = api.llama_model_n_cls_out(model) if pooling == RANK else api.llama_model_n_embd(model)
    batch = api.llama_batch_init(longest, 0, 1)
    stack.callback(api.llama_batch_free, batch)
    total, done = sum(len(probe.ids) for probes in listed for probe in probes), 0
    for probes, output in zip(listed, request["outputs"], strict=True):
        rows = []
        for probe in probes:
            row = _vector(context, batch, probe.ids, width)
            if row is None:
                return {
                    "pooling": POOLINGS[pooling],
                    "failure": f"llama.cpp cannot run it on {len(probe.ids)} tokens",
                }
            rows.append(row)
            done += len(probe.ids)
            report(done, total)
        with written(Path(output)) as part, part.open("wb") as file:
            np.save(file, np.stack(rows))
    labels = [api.llama_model_cls_label(model, number) for number in range(width)] if pooling == RANK else []
    named = [(label or b"").decode("utf-8", "replace") for label in labels]
    return {"pooling": POOLINGS[pooling], "labels": named, "failure": None}


def _context(model: Any, longest: int) -> Any:
    import llama_cpp as api

    parameters = api.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = (
        longest  # an encoder needs a text in one piece
    )
    parameters.n_seq_max = 1
    parameters.embeddings = True
    parameters.pooling_type = -1  # LLAMA_POOLING_TYPE_UNSPECIFIED: the file's own
    parameters.n_threads = parameters.n_threads_batch = cores()
    return api.llama_init_from_model(model, parameters)


def _vector(context: Any, batch: Any, ids: Sequence[int], width: int) -> NDArray[np.float32] | None:
    """The pooled vector [width] of one text; None where llama.cpp fails on it."""
    import llama_cpp as api
    import numpy as np

    if memory := api.llama_get_memory(context):
        api.llama_memory_clear(memory, True)
    tokens = np.array(ids, np.int32)
    every = np.ones(len(ids), np.bool_)
    fill(batch, tokens, np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32), every)
    if api.llama_decode(context, batch):
        return None
    found = api.llama_get_embeddings_seq(context, 0)
    return np.ctypeslib.as_array(found, shape=(width,)).copy() if found else None


def _tokenized(model: Any, probe: Probe) -> Probe:
    """The probe with the ids that llama-server gives the model."""
    import llama_cpp as api

    vocabulary = api.llama_model_get_vocab(model)
    if probe.document is None:
        return Probe(probe.text, None, tuple(_ids(vocabulary, probe.text, add_special=True)))
    eos = api.llama_vocab_eos(vocabulary)
    end = eos if eos != -1 else api.llama_vocab_sep(vocabulary)  # LLAMA_TOKEN_NULL
    ends = [end] if api.llama_vocab_get_add_eos(vocabulary) else []
    ids = [api.llama_vocab_bos(vocabulary)] if api.llama_vocab_get_add_bos(vocabulary) else []
    ids += [*_ids(vocabulary, probe.text), *ends]
    ids += [api.llama_vocab_sep(vocabulary)] if api.llama_vocab_get_add_sep(vocabulary) else []
    ids += [*_ids(vocabulary, probe.document), *ends]
    return Probe(probe.text, probe.document, tuple(ids))


def _ids(vocabulary: Any, text: str, *, add_special: bool = False) -> list[int]:
    import ctypes

    import llama_cpp as api

    content = text.encode()
    room = len(content) + 16
    tokens = (ctypes.c_int32 * room)()
    count = api.llama_tokenize(vocabulary, content, len(content), tokens, room, add_special, True)
    return list(tokens[: max(count, 0)])
