"""Vectors of reference and artifact on the same texts, computed once and kept in the workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.config.schema import Config, Corpus
from quantool.errors import ConfigError, SourceError
from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends, key_of
from quantool.records import Source
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Stage
from quantool.tasks import TaskKind
from quantool.texts import corpus as texts
from quantool.texts import inputs
from quantool.validation._cache.keys import artifact_key
from quantool.validation._engines.crash import WorkerError, crash
from quantool.validation._engines.reference import TORCH_DTYPES
from quantool.validation._findings.builder import without_folders
from quantool.validation._pooled import llama_cpp_vectors, transformers_vectors
from quantool.validation._pooled.probe import Probe, load_probes
from quantool.validation._pooled.transformers_vectors import POOLED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REFERENCE_VECTORS = Depends(
    fields=("validation.context", "validation.max_tokens", "device"),
    libraries=("torch", "transformers", "tokenizers"),
)
"""The reference's vectors of a text, which counts by its identity."""
ARTIFACT_VECTORS = Depends(fields=("device",), engine=True)
"""An artifact's vectors of the same texts, which count by the reference's key."""
VECTORS = REFERENCE_VECTORS | ARTIFACT_VECTORS | Depends(inputs=(inputs.held_out,), gates=True)
"""What a check of vectors depends on."""


@dataclass(frozen=True)
class ReferenceVectors:
    """The reference on the texts of one corpus."""

    corpus: Corpus
    key: str
    """By what results about these texts know them again."""
    probes: Path
    values: Path

    def load(self) -> tuple[list[Probe], NDArray[np.float32]]:
        """The texts and their vectors [texts, width]."""
        return load_probes(self.probes), _load(self.values)


@dataclass(frozen=True)
class ArtifactVectors:
    """An artifact on the same texts."""

    failure: str
    """Why it has no vectors; empty when it has."""
    pooling: str
    """How llama.cpp pools by the file's own key; empty of a folder, whose files say it."""
    labels: tuple[str, ...]
    """Names of a GGUF's labels; empty of a folder, whose config.json has them."""
    probes: Path
    """The texts with the token ids of the artifact's own tokenizer."""
    values: Path

    def load(self) -> tuple[list[Probe], NDArray[np.float32]] | None:
        """The texts and their vectors [texts, width]; None without any (``failure``, or pooled otherwise)."""
        return (load_probes(self.probes), _load(self.values)) if self.values.is_file() else None


def _load(path: Path) -> NDArray[np.float32]:
    import numpy as np

    values: NDArray[np.float32] = np.load(path)
    return values


def require_task(config: Config, source: Source) -> None:
    """ConfigError for an engine that gives no vectors; SourceError for an embedding model of which nobody knows the pooling."""
    del config
    task = source.facts.task
    if task.kind is TaskKind.EMBEDDING and task.pooling is None:
        raise SourceError(
            f"{source.name} is an embedding model ({source.facts.architecture}), but nothing says how its states are pooled",
            hint="add modules.json and 1_Pooling/config.json as sentence-transformers writes them",
        )
    if task.kind is TaskKind.EMBEDDING and task.pooling not in POOLED:
        raise SourceError(
            f"{source.name} pools by {task.pooling}, which quantool cannot compute",
            hint=f"known: {', '.join(POOLED)}",
        )


def prepare_reference(cases: Sequence[Case], progress: Progress) -> None:
    """Compute the reference once, before the first of ``cases`` is judged."""
    reference_vectors(cases[0], progress)


def compare_vectors(case: Case, progress: Progress, /) -> None:
    """Compute the reference."""
    reference_vectors(case, progress)


def reference_vectors(case: Case, progress: Progress) -> tuple[ReferenceVectors, ...]:
    """The reference's vectors on every corpus; SourceError when transformers cannot run the source."""
    config, source = case.config, case.source
    require_task(config, source)
    corpora = texts.corpora(config)
    folder = case.workspace.work / "reference"
    found = []
    stages = []
    for corpus in corpora:
        text = texts.identity(corpus)
        key = text and key_of(REFERENCE_VECTORS, source, text, source.facts.task.kind, config=config)
        probes, values = folder / f"{corpus.name}.probes.json", folder / f"{corpus.name}.vectors.npy"
        stages.append(Stage(f"vectors/{corpus.name}", key, (probes, values)))
        found.append((corpus, probes, values))

    def produce(missing: list[int]) -> list[dict[str, Any]]:
        request = _request(case, source.folder) | {
            "corpora": [corpora[number].model_dump(mode="json") for number in missing],
            "max_tokens": config.validation.max_tokens,
            "limit": min(config.validation.context, source.facts.context),
            "cache_dir": config.dataset_cache_dir and str(config.dataset_cache_dir),
            "probes": [str(found[number][1]) for number in missing],
            "outputs": [str(found[number][2]) for number in missing],
        }
        log = case.workspace.logs / "reference.log"
        with progress.bar("reference", "tok") as bar:
            answer = process.call(
                transformers_vectors.reference, request, log=log, bar=bar, failure=SourceError
            )
        return [answer] * len(missing)

    case.workspace.together(stages, produce)
    return tuple(
        ReferenceVectors(corpus, _content_key(case, probes), probes, values)
        for corpus, probes, values in found
    )


def _content_key(case: Case, probes: Path) -> str:
    """The key of what is computed on ``probes``, whatever text they were cut from."""
    return case.key(Depends(), probes.read_text(encoding="utf-8"))


def _request(case: Case, folder: Path) -> dict[str, Any]:
    facts = case.source.facts
    return {
        "folder": str(folder),
        "dtype": TORCH_DTYPES.get(facts.dtype, "bfloat16"),
        "device": case.config.device or "auto",
        "trust_remote_code": case.source.trust_remote_code,
        "kind": facts.task.kind,
    }


def artifact_vectors(
    case: Case, known: Sequence[ReferenceVectors], progress: Progress
) -> tuple[ArtifactVectors, ...]:
    """The artifact's vectors on the texts of ``known``, kept for each corpus."""
    if case.engine not in ("llama.cpp", "transformers"):
        raise ConfigError(f"{case.name}: {case.engine} gives no vectors here; llama.cpp and transformers do")
    folder = case.workspace.work / "vectors" / case.name
    files = [(folder / f"{one.corpus.name}.probes.json", folder / f"{one.corpus.name}.npy") for one in known]
    keys = [artifact_key(case, ARTIFACT_VECTORS, one.key) for one in known]
    records = [
        case.workspace.recall(f"vectors/{case.name}/{one.corpus.name}", key)
        for one, key in zip(known, keys, strict=True)
    ]
    missing = [number for number, record in enumerate(records) if record is None]
    if missing:
        for number in missing:
            for file in files[number]:
                file.unlink(missing_ok=True)
        answer = _answer(case, [known[n] for n in missing], [files[n] for n in missing], progress)
        for number in missing:
            made = [file for file in files[number] if file.is_file()]
            records[number] = answer
            case.workspace.keep(
                f"vectors/{case.name}/{known[number].corpus.name}", keys[number], made, answer
            )
    return tuple(
        ArtifactVectors(record["failure"], record["pooling"], tuple(record["labels"]), *pair)
        for record, pair in zip(records, files, strict=True)
        if record is not None
    )


def _answer(
    case: Case,
    known: Sequence[ReferenceVectors],
    files: Sequence[tuple[Path, Path]],
    progress: Progress,
) -> dict[str, Any]:
    request = _request(case, case.artifact) | {
        "probes": [str(one.probes) for one in known],
        "ids": [str(ids) for ids, _ in files],
        "outputs": [str(values) for _, values in files],
    }
    work = transformers_vectors.artifact
    if case.engine == "llama.cpp":
        work = llama_cpp_vectors.artifact
        request |= {"model": str(case.artifact), "gpu": case.config.device == "cuda"}
    log = case.workspace.logs / f"{case.name.replace('/', '-')}.vectors.log"
    try:
        with progress.bar(f"vectors of {case.name}", "tok") as bar:
            answer = process.call(work, request, log=log, bar=bar, failure=WorkerError)
    except WorkerError as error:
        answer = {"failure": crash(error, case.engine)}
    except SourceError as error:
        answer = {"failure": error.message}
    failure = answer["failure"] and without_folders(answer["failure"], case.artifact, case.artifact.parent)
    return {
        "failure": failure or "",
        "pooling": answer.get("pooling", ""),
        "labels": answer.get("labels", []),
    }
