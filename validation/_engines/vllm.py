"""vLLM, the engine that serves AWQ and FP8 artifacts: prompt log-probabilities and greedy answers.

It runs where vLLM is installed and a GPU is there (``quantool validate --engine vllm``). The model stays in the worker's
own process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``, vllm/envs.py), so that nothing outlives it. vLLM gives the
log-probabilities of the tokens that are most likely, not of all; see ``divergence``.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import DependencyError
from quantool.runtime.worker import preloaded
from quantool.validation._engines.head import (
    Head,
    HeadPlan,
    Unsound,
    common_vocabulary,
    entries_of,
    following,
    joined,
)
from quantool.validation._engines.hidden_states import as_tensor, read_hidden
from quantool.validation._engines.interface import Answer, Engine, Scored, require_room
from quantool.validation._engines.windows import scored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

LIKELIEST = 64
"""Tokens of each position whose log-probability is asked for."""
BATCH = 16
"""Windows handed over at a time."""
KERNEL = re.compile(r"^(?:Selected|Using) (\w+Kernel for \w+)")
"""How vLLM's log names a matrix kernel (vllm/model_executor/kernels/linear/__init__.py; compressed_tensors_wNa16.py and
auto_awq.py of its quantization layers)."""


class Kernels(logging.Handler):
    """Collects the names of the matrix kernels that vLLM chooses, as its log says them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message that names a kernel, once."""
        named = KERNEL.match(record.getMessage())
        if named and named[1] not in self.names:
            self.names.append(named[1])


def require() -> None:
    """Raise DependencyError when vLLM or a GPU is missing here."""
    if importlib.util.find_spec("vllm") is None:
        raise DependencyError(
            "--engine vllm needs vLLM, which is not installed",
            hint="install vllm on a machine with a GPU, or leave --engine out: transformers judges the same files",
        )
    import torch

    if not torch.cuda.is_available():
        raise DependencyError(
            "--engine vllm needs a GPU, and torch finds none",
            hint="leave --engine out: transformers runs on CPUs",
        )


def load_vllm(
    artifact: Path, context: int, trust_remote_code: bool, cache: str | None = None
) -> tuple[Any, Kernels]:
    """A ``vllm.LLM`` of the folder ``artifact`` and the kernels that it chose; Unsound when vLLM refuses it.

    ``cache`` fp8 is a cache in FP8, with the scales that the folder has (1 without); all else is vLLM's own choice.
    """
    require()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    kernels = Kernels()
    logging.getLogger("vllm").addHandler(kernels)
    try:
        model = vllm.LLM(
            model=str(artifact),
            max_model_len=context,
            max_logprobs=LIKELIEST,
            enforce_eager=True,
            trust_remote_code=trust_remote_code,
            kv_cache_dtype="fp8" if cache == "fp8" else "auto",
        )
    except (ValueError, KeyError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise Unsound(f"vLLM cannot load it: {type(error).__name__}: {error}") from error
    return model, kernels


@preloaded("nothing")
def score(request: dict[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker: score the one folder in ``models``; request and result as in ``score_llama_cpp.score``, and ``kernels``.

    ``kernels`` are vLLM's own words, such as ``CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8``.
    """
    import numpy as np

    (folder,), (outputs,) = request["models"], request["outputs"]
    texts = [np.load(path) for path in request["windows"]]
    total, done = sum(ids.size for ids in texts), 0
    source, plan = Path(request["source"]), HeadPlan.of(request["head"])
    try:
        # One token more: vLLM wants room for the token that it generates.
        model, kernels = load_vllm(
            Path(folder), request["context"] + 1, request["trust_remote_code"], request.get("cache")
        )
        entries = int(model.llm_engine.model_config.get_vocab_size())
        head = Head(source, plan, common_vocabulary(entries_of(source, plan), entries, request["tokens"]))
        for ids, hidden, output in zip(texts, request["hidden"], outputs, strict=True):
            states = read_hidden(Path(hidden))
            parts: list[Tensor] = []
            for start in range(0, len(ids), BATCH):
                batch = ids[start : start + BATCH]
                parts += _score_batch(model, head, batch, states[start : start + BATCH])
                done += batch.size
                report(done, total)
            joined(parts).save(Path(output))
    except Unsound as reason:
        return {"failures": [str(reason)], "kernels": []}
    return {"failures": [None], "kernels": kernels.names}


def _score_batch(model: Any, head: Head, ids: NDArray[np.int32], hidden: Any) -> Iterator[Tensor]:
    """Score windows [windows, context] beside the reference's hidden states [windows, scored, width]."""
    import vllm

    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=LIKELIEST, detokenize=False)
    prompts = [{"prompt_token_ids": window} for window in ids.tolist()]
    positions = scored(ids.shape[1])
    for number, answer in enumerate(model.generate(prompts, sampling, use_tqdm=False)):
        log_p = head.log_probs(as_tensor(hidden[number]))
        targets = following(ids[number : number + 1], positions)
        listed = [
            {token: entry.logprob for token, entry in answer.prompt_logprobs[position + 1].items()}
            for position in positions
        ]
        yield divergence(log_p, listed, targets)


def divergence(log_p: Tensor, listed: Sequence[dict[int, float]], targets: Tensor) -> Tensor:
    """Score what an engine tells of some tokens beside the reference's log-probabilities [n, vocabulary].

    ``listed`` has for each position the log-probabilities of the most likely tokens and of the one that came (``targets``
    [n]). All other tokens count as one: by the log-sum inequality (Cover and Thomas, Elements of Information Theory,
    2.7.1) the KL divergence of what is left is at most that of the whole, so it is a lower bound, exact when the engine
    tells of every token. Returns [4, n] as ``head.compare``. Raises Unsound when a log-probability is not finite.
    """
    import torch

    rows = []
    for reference, entries, target in zip(log_p, listed, targets.tolist(), strict=True):
        known = [token for token in entries if token < len(reference)]  # beyond: padding of the vocabulary
        log_q = torch.tensor([entries[token] for token in known], dtype=torch.float64)
        if not torch.isfinite(log_q).all():
            raise Unsound("its log-probabilities are not finite")
        ours = reference[known].double()
        kld = float((ours.exp() * (ours - log_q)).sum())
        rest_p, rest_q = (max(1 - float(part.exp().sum()), 0.0) for part in (ours, log_q))
        if rest_p > 0 and rest_q > 0:
            kld += rest_p * math.log(rest_p / rest_q)
        favourite = max(known, key=entries.__getitem__)
        same = float(favourite == int(reference.argmax()))
        rows.append((-float(reference[target]), -entries[target], kld, same))
    return torch.tensor(rows, dtype=torch.float32).T


@contextmanager
def load_engine(
    artifact: Path, context: int, trust_remote_code: bool, cache: str | None = None
) -> Iterator[Engine]:
    """The folder ``artifact`` as an ``Engine``."""
    model, _ = load_vllm(artifact, context, trust_remote_code, cache)
    yield VllmEngine(model, context)


class VllmEngine:
    """An ``Engine`` over ``vllm.LLM``."""

    def __init__(self, model: Any, context: int) -> None:
        self._model = model
        self.vocabulary = int(model.llm_engine.model_config.get_vocab_size())
        self.context = context

    def generate(self, prompts: Sequence[Sequence[int]], budget: int) -> list[Answer]:
        """See ``Engine.generate``: ended by what vLLM takes from generation_config.json and the tokenizer."""
        import vllm

        require_room(prompts, [budget] * len(prompts), self)
        sampling = vllm.SamplingParams(temperature=0, max_tokens=budget, detokenize=False)
        answers = []
        for answer in self._model.generate(_prompts(prompts), sampling, use_tqdm=False):
            (output,) = answer.outputs
            ids = tuple(output.token_ids)
            if output.finish_reason == "stop":
                answers.append(Answer(ids[:-1], ids[-1]))
            else:
                answers.append(Answer(ids, None))
        return answers

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """See ``Engine.score``."""
        import vllm

        require_room(prompts, [len(one) + 1 for one in continuations], self)
        sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        whole = [[*prompt, *more] for prompt, more in zip(prompts, continuations, strict=True)]
        found = []
        for answer, prompt, ids in zip(
            self._model.generate(_prompts(whole), sampling, use_tqdm=False), prompts, whole, strict=True
        ):
            entries = [answer.prompt_logprobs[place][ids[place]] for place in range(len(prompt), len(ids))]
            greedy = all(entry.rank == 1 for entry in entries)
            found.append(Scored(tuple(float(entry.logprob) for entry in entries), greedy))
        return found


def _prompts(prompts: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]
