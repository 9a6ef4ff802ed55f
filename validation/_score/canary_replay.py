"""The canary's workers: an artifact's own log-probabilities on a few hundred tokens, and how far another run is from them.

Of each position the ``TOP`` most likely tokens are kept. The divergence of a replay from them is that of the two
distributions with all other tokens taken together, which is never more than that of the whole distributions (the data
processing inequality).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.runtime.llama_cpp import LlamaLog
from quantool.runtime.worker import Report, preloaded
from quantool.validation._engines.head import Head, Unsound, find_head
from quantool.validation._engines.llama_cpp import Layout, cores, load_weights, make_context
from quantool.validation._engines.reference import open_model, tapped, torch_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TOP = 20
"""Most likely tokens of each position that are kept."""
DIGITS = 4
"""Decimals of a log-probability: rounding moves the mean divergence by less than 1e-8."""
LEAST = 1e-6
"""Probability that is the least counted for all other tokens together: below it both sides are roundings."""
PIECE = 24
"""Tokens of a batch in the second run at a release, whose distance from the first is the noise."""
ANSWER = "top"

Run = Callable[["NDArray[np.int32]", bool], "Tensor"]
"""Log-probabilities [tokens, vocabulary] of a window; the flag asks for other batches and fewer threads."""


@preloaded("transformers")
def measure(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: keep what an artifact computes, or compare with what was kept.

    Request: ``model`` (a GGUF's first shard, or a folder), ``engine``, ``ids`` (the window), ``device``,
    ``trust_remote_code``, ``scratch`` (a folder for hidden states) and ``top``: null, or what an earlier run kept.
    Result: ``failure``, null or why the artifact cannot be run; ``top``, for each position [[id, log-probability], …], most
    likely first; ``divergences``, for each position that of a run from ``top`` in nats: without ``top`` in the
    request of a second run with other batches, which is the noise of this machine.
    """
    import numpy as np

    window = np.asarray(request["ids"], np.int32)
    opened = _gguf if request["engine"] == "llama.cpp" else _folder
    try:
        with opened(request) as run:
            known = request["top"]
            log_probs = run(window, False)
            if not bool(log_probs.isfinite().all()):
                return {"failure": "its logits are not finite", "top": [], "divergences": []}
            report(1, 2 if known is None else 1)
            top = kept(log_probs) if known is None else known
            second = run(window, True) if known is None else log_probs
            report(2, 2)
            return {"failure": None, "top": top, "divergences": divergences(top, second)}
    except (Unsound, SourceError) as error:
        return {"failure": str(error), "top": [], "divergences": []}


def kept(log_probs: Tensor) -> list[list[list[float]]]:
    """The ``TOP`` most likely tokens of each position with their log-probabilities, [positions, TOP, 2]."""
    values, ids = log_probs.topk(min(TOP, log_probs.shape[1]), dim=-1)
    return [
        [[token, round(value, DIGITS)] for token, value in zip(tokens, row, strict=True)]
        for tokens, row in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def divergences(top: list[list[list[float]]], log_probs: Tensor) -> list[float]:
    """KL divergence of each position's log-probabilities [positions, vocabulary] from what was kept, in nats.

    Raises Unsound for another number of positions or a token that the vocabulary does not have.
    """
    import torch

    pairs = torch.tensor(top, dtype=torch.float64)
    ids, before = pairs[..., 0].long(), pairs[..., 1]
    if len(ids) != len(log_probs) or int(ids.max()) >= log_probs.shape[1]:
        raise Unsound(f"it has {log_probs.shape[1]} entries, the canary those of another vocabulary")
    after = log_probs.to("cpu", torch.float64).gather(1, ids)
    rests = [(1 - part.exp().sum(-1)).clamp_min(LEAST) for part in (before, after)]
    found = (before.exp() * (before - after)).sum(-1) + rests[0] * (rests[0].log() - rests[1].log())
    return [round(value, 9) for value in found.tolist()]


@contextmanager
def _gguf(request: dict[str, Any]) -> Iterator[Run]:
    import llama_cpp
    import numpy as np
    import torch

    count = len(request["ids"])
    layout = Layout(1, count)
    with (
        LlamaLog() as log,
        load_weights(Path(request["model"]), gpu=request["device"] == "cuda", log=log) as weights,
        make_context(weights, layout, count, log) as model,
    ):

        def run(window: NDArray[np.int32], otherwise: bool) -> Tensor:
            step, threads = (PIECE, max(1, cores() // 2)) if otherwise else (count, cores())
            llama_cpp.llama_set_n_threads(model.context, threads, threads)
            pieces = [range(start, min(start + step, count)) for start in range(0, count, step)]
            parts = [model.decode(window[np.newaxis], piece, piece).log_softmax(-1) for piece in pieces]
            return torch.cat(parts)

        yield run


@contextmanager
def _folder(request: dict[str, Any]) -> Iterator[Run]:
    """As for its scores, an output head that is not quantized is computed in float32."""
    import numpy as np
    import torch

    folder = Path(request["model"])
    with open_model(folder, "auto", request, Path(request["scratch"])) as loaded:
        model = loaded.model
        plan = find_head(model, folder)
        head = None if plan is None else Head(folder, plan, device=model.device)

        def run(window: NDArray[np.int32], otherwise: bool) -> Tensor:
            windows = np.stack([window, window[::-1]]) if otherwise else window[np.newaxis]
            positions = range(len(window))
            with torch.no_grad(), tapped(model, positions, keep_logits=head is None) as seen:
                logits = model(input_ids=torch_ids(windows).to(model.device), use_cache=False).logits
            own = logits[0].float() if head is None else head.logits(seen[-1][0])
            return own.log_softmax(-1).cpu()

        yield run
