"""Vectors by transformers: of the source (the reference), or of an artifact that transformers loads.

Pooled as sentence-transformers does by the folder's own ``modules.json``; a folder without one is pooled by the mean of all
tokens there (``SentenceTransformer._load_auto_model``), and so it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.config.schema import Corpus
from quantool.errors import ConfigError, SourceError
from quantool.runtime import arithmetic
from quantool.runtime.worker import Report, preloaded
from quantool.runtime.workspace import written
from quantool.source.task import MODULES, sentence_task
from quantool.tasks import Task, TaskKind
from quantool.texts import corpus as texts
from quantool.validation._engines import unpacked
from quantool.validation._engines.hf_tokenizer import load_tokenizer
from quantool.validation._engines.reference import uses_gpu
from quantool.validation._pooled.probe import (
    FEWEST,
    Probe,
    fitting,
    load_probes,
    pairs,
    passages,
    save_probes,
)

if TYPE_CHECKING:
    from torch import Tensor

BATCH_TOKENS = 2048
CHARACTERS_PER_TOKEN = 4  # of a budget in tokens
UNUSED = "pooler."
"""A head of BERT's that pooling by sentence-transformers does not read, and whose weights it does not save."""
POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda states: states[:, 0],
    "lasttoken": lambda states: states[:, -1],
    "mean": lambda states: states.mean(1),
    "max": lambda states: states.max(1).values,
    "mean_sqrt_len_tokens": lambda states: states.sum(1) / states.shape[1] ** 0.5,
}
"""From states [texts, tokens, width] to vectors [texts, width]; no text has padding."""
UNSTATED = "mean"
"""What sentence-transformers does without ``modules.json``."""


@preloaded("transformers")
def reference(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: cut the ``corpora`` of the request into probes, run the checkpoint on them, save both.

    Request: ``folder``, ``dtype``, ``device``, ``trust_remote_code``, ``kind`` (of the task), ``corpora``, ``max_tokens``,
    ``limit`` (tokens of a text), ``cache_dir``, ``probes`` and ``outputs`` (paths, one a corpus). Result: ``arithmetic``.
    """
    tokenizer = load_tokenizer(request["folder"], trust_remote_code=request["trust_remote_code"])
    ranked = request["kind"] == TaskKind.RERANKING
    for fields, path in zip(request["corpora"], request["probes"], strict=True):
        corpus = Corpus.model_validate(fields)
        characters = request["max_tokens"] * CHARACTERS_PER_TOKEN
        documents = texts.read(
            corpus, characters=4 * characters, cache_dir=request["cache_dir"] and Path(request["cache_dir"])
        )
        found = passages(documents, characters)
        if len(found) < FEWEST:
            raise ConfigError(
                f"corpus {corpus.name!r} gives {len(found)} passages, and {FEWEST} are needed",
                hint="give more text, or a larger validation.max_tokens",
            )
        wanted: Sequence[tuple[str, str | None]] = (
            pairs(found) if ranked else [(text, None) for text in found]
        )
        save_probes(Path(path), [fitting(*part, tokenizer, request["limit"]) for part in wanted])
    return _save_vectors(request, tokenizer, report)


@preloaded("transformers")
def artifact(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: run a folder on the texts of ``probes``, tokenized by its own tokenizer.

    Request as ``reference`` without what cuts texts, and ``ids`` (paths to save the token ids to). Result:
    ``arithmetic``, ``failure`` (why it cannot be loaded, or None).
    """
    tokenizer = load_tokenizer(request["folder"], trust_remote_code=request["trust_remote_code"])
    for path, target in zip(request["probes"], request["ids"], strict=True):
        own = [
            Probe(probe.text, probe.document, tuple(_ids(tokenizer, probe)))
            for probe in load_probes(Path(path))
        ]
        save_probes(Path(target), own)
    return _save_vectors(request, tokenizer, report)


def _ids(tokenizer: Any, probe: Probe) -> list[int]:
    ids: list[int] = tokenizer(probe.text, probe.document, verbose=False)["input_ids"]
    return ids


def _save_vectors(request: dict[str, Any], tokenizer: Any, report: Report) -> dict[str, Any]:
    import numpy as np

    folder = Path(request["folder"])
    embeds = request["kind"] == TaskKind.EMBEDDING
    task = own_task(folder) if embeds else Task()
    model = load(folder, request["dtype"], request["device"], request["trust_remote_code"], embeds=embeds)
    listed = [load_probes(Path(path)) for path in request["probes"]]
    total, done = sum(len(probe.ids) for probes in listed for probe in probes), 0
    for probes, output in zip(listed, request["outputs"], strict=True):
        rows: dict[int, Any] = {}
        for numbers, values in _computed(model, tokenizer, probes, task.pooling if embeds else None):
            rows |= dict(zip(numbers, values, strict=True))
            done += sum(len(probes[number].ids) for number in numbers)
            report(min(done, total), total)
        with written(Path(output)) as part, part.open("wb") as file:
            np.save(file, np.stack([rows[number] for number in range(len(probes))]))
    return {"arithmetic": str(model.dtype).removeprefix("torch."), "failure": None}


def own_task(folder: Path) -> Task:
    """How sentence-transformers would pool the states of a folder: by ``modules.json``, else by the mean."""
    task = sentence_task(folder) if (folder / MODULES).is_file() else Task(kind=TaskKind.EMBEDDING)
    pooling = task.pooling or UNSTATED
    if pooling not in POOLED:
        raise SourceError(f"{folder}: pooling {pooling!r} is not known; known: {', '.join(POOLED)}")
    return task.model_copy(update={"pooling": pooling})


def load(folder: Path, dtype: str, device: str, trust_remote_code: bool, *, embeds: bool) -> Any:
    """The model of ``folder`` without a head, or with its classifier; every weight from its files.

    Raises SourceError when transformers does not know it or a weight is missing, which it would fill with random numbers.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    on_gpu = uses_gpu(device)
    if unpacked.must_unpack(folder):
        raise SourceError(
            f"{folder}: transformers cannot load this layout, and only language models are unpacked"
        )
    kind: Any = AutoModel if embeds else AutoModelForSequenceClassification
    try:
        model, info = kind.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise SourceError(f"transformers cannot load {folder}: {error}") from error
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent := [name for name in absent if not (embeds and name.startswith(UNUSED))]:
        raise SourceError(f"{folder} lacks weights of {type(model).__name__}: {', '.join(absent[:5])}")
    if not on_gpu:
        arithmetic.widen(model)
    return model.eval().to("cuda" if on_gpu else "cpu")


def _computed(
    model: Any, tokenizer: Any, probes: Sequence[Probe], pooling: str | None
) -> Iterator[tuple[list[int], Any]]:
    """Numbers of probes and their vectors [texts, width]: pooled states, or without ``pooling`` the logits."""
    import torch

    whole = model.config.pad_token_id is None and pooling is None  # transformers refuses a batch then
    for numbers in _alike(probes, 1 if whole else BATCH_TOKENS):
        chosen = [probes[number] for number in numbers]
        batch = tokenizer(
            [probe.text for probe in chosen],
            [probe.document for probe in chosen] if chosen[0].document is not None else None,
            return_tensors="pt",
            verbose=False,
        ).to(model.device)
        with torch.no_grad():
            answer = model(**batch)
        values = answer.logits if pooling is None else POOLED[pooling](answer.last_hidden_state)
        yield numbers, values.float().cpu().numpy()


def _alike(probes: Sequence[Probe], tokens: int) -> Iterator[list[int]]:
    """Numbers of probes with as many tokens, at most ``tokens`` together: so none is padded."""
    by_length: dict[int, list[int]] = {}
    for number, probe in enumerate(probes):
        by_length.setdefault(len(probe.ids), []).append(number)
    for length, numbers in sorted(by_length.items()):
        step = max(1, tokens // max(1, length))
        for start in range(0, len(numbers), step):
            yield numbers[start : start + step]
