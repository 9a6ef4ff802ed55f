"""Held-out text as windows of the reference's token ids, cut as llama-perplexity does.

llama.cpp, tools/perplexity/perplexity.cpp: the ids of the whole text are cut into windows of ``context`` tokens without
overlap; the first id of each window is replaced by BOS when the tokenizer adds one; positions context/2 to context-2 are
scored on the id that follows (255 of 512), so that every scored position has at least half a window before it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.config.schema import Corpus
from quantool.errors import ConfigError, SourceError
from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends, key_of
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import preloaded
from quantool.runtime.workspace import Stage, written
from quantool.texts import corpus as texts
from quantool.validation._engines.hf_tokenizer import beginning, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


WINDOWS = Depends(
    fields=("validation.context", "validation.max_tokens"), libraries=("transformers", "tokenizers")
)
"""The windows of a text."""


@dataclass(frozen=True)
class Windows:
    """The windows of one corpus: ``path`` holds int32 ids [count, context], BOS in place."""

    corpus: Corpus
    path: Path
    sha256: str
    count: int
    vocabulary: int
    """Entries of the tokenizer; the model may have more (padding)."""


def scored(context: int) -> range:
    """The positions of a window whose prediction of the next token is scored."""
    return range(context // 2, context - 1)


def windows(case: Case, corpora: Sequence[Corpus], progress: Progress) -> tuple[Windows, ...]:
    """The windows of each corpus, made once per text, tokenizer and context and kept in the workspace.

    Raises ConfigError for a text that cannot be read or is shorter than one window, or a context longer than the model's.
    """
    settings, source = case.config.validation, case.source
    if settings.context > source.facts.context:
        raise ConfigError(
            f"validation.context is {settings.context}, but {source.name} reads no more than {source.facts.context} tokens"
        )
    stages = []
    for corpus in corpora:
        text = texts.identity(corpus)
        key = text and key_of(WINDOWS, source.without_weights(), text, config=case.config)
        stages.append(Stage(f"windows/{corpus.name}", key, (_file(case, corpus),)))

    def produce(missing: list[int]) -> list[dict[str, Any]]:
        request = {
            "corpora": [corpora[number].model_dump(mode="json") for number in missing],
            "outputs": [str(_file(case, corpora[number])) for number in missing],
            "tokenizer": str(source.tokenizer or source.folder),
            "trust_remote_code": source.trust_remote_code,
            "context": settings.context,
            "max_tokens": settings.max_tokens,
            "cache_dir": case.config.dataset_cache_dir and str(case.config.dataset_cache_dir),
        }
        log = case.workspace.logs / "reference.log"
        with progress.bar("tokenize held-out text") as bar:
            answer = process.call(tokenize, request, log=log, bar=bar, failure=SourceError)
        made: list[dict[str, Any]] = answer["corpora"]
        return made

    results = case.workspace.together(stages, produce)
    return tuple(
        Windows(corpus=corpus, path=_file(case, corpus), **result)
        for corpus, result in zip(corpora, results, strict=True)
    )


def _file(case: Case, corpus: Corpus) -> Path:
    return case.workspace.work / "reference" / f"{corpus.name}.windows.npy"


@preloaded("transformers")
def tokenize(request: dict[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker: tokenize the ``corpora`` of the request and save their windows to its ``outputs``."""
    import numpy as np

    tokenizer = load_tokenizer(request["tokenizer"], trust_remote_code=request["trust_remote_code"])
    bos = next(iter(beginning(tokenizer)), None)
    made = []
    for number, (fields, output) in enumerate(zip(request["corpora"], request["outputs"], strict=True)):
        corpus = Corpus.model_validate(fields)
        documents = texts.read(
            corpus,
            characters=request["max_tokens"] * texts.CHARACTERS_PER_TOKEN,
            cache_dir=request["cache_dir"] and Path(request["cache_dir"]),
        )
        ids = np.fromiter(itertools.chain.from_iterable(token_ids(documents, tokenizer)), dtype=np.int32)
        cut = cut_windows(ids, request["context"], request["max_tokens"], bos, corpus.name)
        with written(Path(output)) as part, part.open("wb") as file:
            np.save(file, cut)
        digest = hashlib.sha256(cut.tobytes()).hexdigest()
        made.append({"sha256": digest, "count": len(cut), "vocabulary": len(tokenizer)})
        report(number + 1, len(request["corpora"]))
    return {"corpora": made}


def token_ids(documents: Sequence[texts.Document], tokenizer: Any) -> Iterator[list[int]]:
    """Ids of the documents in order: neighbouring texts as one text, each conversation by itself.

    A text gets the tokenizer's special tokens (as llama-perplexity with add_special); a rendered conversation does not,
    since its template prints them.
    """
    for is_chat, group in itertools.groupby(documents, key=lambda document: bool(document.messages)):
        if is_chat:
            for document in group:
                text = texts.render(document, tokenizer)
                yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            text = "\n\n".join(document.text for document in group)
            yield tokenizer(text, verbose=False)["input_ids"]


def cut_windows(
    ids: NDArray[np.int32], context: int, max_tokens: int, bos: int | None, name: str
) -> NDArray[np.int32]:
    """Windows [count, context] of ``ids`` [tokens], at most ``max_tokens`` in all; ConfigError when not even one fits.

    (llama-perplexity prints a perplexity of 0 and exits with 0 then.)
    """
    count = min(len(ids), max_tokens) // context
    if not count:
        short = f"has {len(ids)} tokens" if len(ids) < context else f"may use {max_tokens} tokens"
        raise ConfigError(
            f"corpus {name!r} {short}, less than one window of {context}",
            hint="give more text, or a smaller validation.context",
        )
    cut = ids[: count * context].reshape(count, context).copy()
    if bos is not None:
        cut[:, 0] = bos
    return cut
