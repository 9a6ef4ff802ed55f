"""Score an artifact folder that transformers loads (safetensors, compressed-tensors), in the dtype it is saved in.

As for the reference, the output head is computed in float32: a head in bfloat16 rounds the logits so much that two runs
of one model prefer other tokens at 1 % of the positions. Only a head that is itself quantized speaks for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.runtime.worker import preloaded
from quantool.validation._engines.head import (
    LOGIT_BYTES,
    Head,
    HeadPlan,
    Unsound,
    common_vocabulary,
    compare,
    entries_of,
    find_head,
    following,
    joined,
)
from quantool.validation._engines.hidden_states import as_tensor, hidden_of
from quantool.validation._engines.reference import RunningModel, adding, open_model, run, texts_of, verify
from quantool.validation._engines.windows import scored
from quantool.validation._findings.statistics import Tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@preloaded("transformers")
def score(request: dict[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker: score the folders ``models`` one after the other; request and ``failures`` as in ``score_llama_cpp.score``.

    Outputs that are null are not wanted. ``executions`` says of each whether it ran whole, see ``reference.RunningModel``.
    """
    texts = texts_of(request)
    advance = adding(report, sum(ids.size for ids in texts) * len(request["models"]))
    failures: list[str | None] = []
    executions: list[str | None] = []
    for folder, outputs in zip(request["models"], request["outputs"], strict=True):
        failure = execution = None
        try:
            if any(outputs):  # of this share of the windows another process may have done all
                execution = _score_folder(Path(folder), request, texts, outputs, advance)
        except SourceError as error:
            failure = error.message
        except Unsound as outcome:
            failure = str(outcome)
        failures.append(failure)
        executions.append(execution)
    return {"failures": failures, "executions": executions}


def _score_folder(
    folder: Path,
    request: dict[str, Any],
    texts: Sequence[NDArray[np.int32]],
    outputs: Sequence[str | None],
    advance: Callable[[float], None],
) -> str:
    """Score one folder on all texts; its memory is given back before the next one is loaded. Returns how it was run."""
    scratch = next(Path(output).parent for output in outputs if output)
    with open_model(folder, "auto", request, scratch) as loaded:
        head, own = _heads(loaded.model, folder, request)
        parts = zip(texts, hidden_of(request), outputs, strict=True)
        waiting = [(ids, hidden, Path(output)) for ids, hidden, output in parts if output]

        def score_all() -> None:
            loaded.prepare([ids for ids, _, _ in waiting], advance, keep_logits=own is None)
            if own is not None:
                verify(loaded.model, Head(folder, own.plan), waiting[0][0][:1])
            while waiting:
                ids, hidden, output = waiting[0]
                scores = _score_text(loaded, head, own, ids, hidden, advance)
                scores.save(output)
                del waiting[0]

        loaded.size.with_room(texts[0].shape[1], score_all)
        return loaded.execution


def _heads(model: Any, folder: Path, request: dict[str, Any]) -> tuple[Head, Head | None]:
    """The reference's head cut to the common vocabulary, and the artifact's own if it is not quantized."""
    source, plan = Path(request["source"]), HeadPlan.of(request["head"])
    entries = model.get_output_embeddings().out_features
    rows = common_vocabulary(entries_of(source, plan), entries, request["tokens"])
    found = find_head(model, folder)
    head = Head(source, plan, rows, model.device)
    return head, None if found is None else Head(folder, found, rows, model.device)


def _score_text(
    loaded: RunningModel,
    head: Head,
    own: Head | None,
    ids: NDArray[np.int32],
    hidden: Any,
    advance: Callable[[float], None],
) -> Tokens:
    parts = []
    step = max(1, LOGIT_BYTES // (4 * head.rows))
    done = 0
    for count, batch in run(loaded.model, ids, loaded.size, keep_logits=own is None):
        states = as_tensor(hidden[done:count]).flatten(0, 1)
        targets = following(ids[done:count], scored(ids.shape[1]))
        for rows, logits in _logits(own, batch.flatten(0, 1), step):
            part = compare(head.log_probs(states[rows]), logits[:, : head.rows], targets[rows])
            if part is None:
                raise Unsound(f"its logits are not finite (window {done + 1})")
            parts.append(part)
        advance((count - done) * ids.shape[1] * loaded.share)
        done = count
    return joined(parts)


def _logits(own: Head | None, batch: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Float32 logits of ``batch`` (what ``run`` gives, positions in one row), ``step`` positions at a time."""
    for start in range(0, len(batch), step):
        rows = slice(start, start + step)
        yield rows, batch[rows].float() if own is None else own.logits(batch[rows])
