"""The worker that lets a model draft: how often its multi-token-prediction head says what the model itself says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.runtime.worker import preloaded
from quantool.validation._engines.head import Unsound
from quantool.validation._score import drafts_llama_cpp, drafts_transformers
from quantool.validation._score.drafts_transformers import Undraftable

LLAMA_CPP = "llama.cpp"


@preloaded("transformers")
def draft(request: dict[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker for ``_cache.questions``.

    Request, beside what every question has: ``windows`` (files of token ids [windows, context]), ``most`` (windows of
    each), ``layers`` (of the model without its head), ``dtype``, ``scratch`` (a folder). Result: ``marks`` (by text, see
    ``drafts_transformers.agreements``), ``unable`` (why nothing can be drafted here, or empty), ``failure``.
    """
    import numpy as np

    texts = [np.load(path)[: request["most"]] for path in request["windows"]]
    answer: dict[str, Any] = {"marks": [], "unable": "", "failure": None}
    try:
        if request["engine"] == LLAMA_CPP:
            gpu = request["device"] == "cuda"
            answer["marks"] = drafts_llama_cpp.agreements(Path(request["model"]), texts, report, gpu=gpu)
        else:
            answer["marks"] = drafts_transformers.agreements(request, texts, report)
    except Undraftable as reason:
        answer["unable"] = str(reason)
    except Unsound as outcome:
        answer["failure"] = str(outcome)
    except SourceError as error:
        answer["failure"] = error.message
    return answer
