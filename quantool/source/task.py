"""What a checkpoint is for: from config.json, and from modules.json as sentence-transformers writes it.

``modules.json`` lists what a text goes through in turn: the transformer, how its states are pooled, whether the vector is
normalized (sentence-transformers, ``SentenceTransformer._load_sbert_model``). Modules with weights of their own (``Dense``)
are refused: none of the methods carries them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.json_file import (
    SMALL,
    JsonError,
    brief,
    parse_json,
    read_bounded,
    read_json,
    read_optional,
)
from quantool.tasks import PIPELINE_TAGS, Task, TaskKind

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
SENTENCE_FILES = (MODULES, PROMPTS, "sentence_bert_config.json")
"""What sentence-transformers writes beside the files of transformers."""
CLASSIFIER = "ForSequenceClassification"
MODE = "pooling_mode"
SHORT = {"cls_token": "cls", "mean_tokens": "mean"}
"""What the keys ``pooling_mode_…`` of older versions are called in newer ones, where that is not their own name."""
EMBEDDING_TAGS = ("feature-extraction", "sentence-similarity")
FOLDER = re.compile(r"[\w-][\w.-]*")
MOST_MODULES = 16


def module_files(folder: Path, names: Collection[str]) -> list[str]:
    """The configurations that ``modules.json`` of a folder leads to, among the ``names`` that there are."""
    if MODULES not in names:
        return []
    wanted = [f"{module['path']}/config.json" for module in read_modules(folder) if module["path"]]
    return [name for name in wanted if name in names]


def read_modules(folder: Path) -> list[dict[str, str]]:
    """``path`` and ``type`` (the name of the class) of each module in ``modules.json``; SourceError for anything else."""
    path = folder / MODULES
    listed = _listed(path)
    if not 1 <= len(listed) <= MOST_MODULES:
        raise SourceError(f"{path} lists {len(listed)} modules")
    found = []
    for entry in listed:
        match entry:
            case {"path": str(place), "type": str(kind)} if not place or FOLDER.fullmatch(place):
                found.append({"path": place, "type": kind.rpartition(".")[2]})
            case _:
                raise SourceError(f"{path}: {brief(entry)} is no module with a path and a type")
    return found


def _listed(path: Path) -> list[Any]:
    try:
        listed = parse_json(read_bounded(path, SMALL.bytes))
    except JsonError as error:
        raise SourceError(f"{path}{error.place} is no JSON: {error}") from error
    if not isinstance(listed, list):
        raise SourceError(f"{path} is no list of modules")
    return listed


def sentence_task(folder: Path) -> Task:
    """The task of a folder with ``modules.json``; SourceError for modules that are not carried or not understood."""
    modules = read_modules(folder)
    for module in modules:
        if module["type"] not in ("Transformer", "Pooling", "Normalize"):
            raise SourceError(
                f"{folder / MODULES}: the module {module['path'] or module['type']} is a {module['type']}, which quantool "
                "does not carry",
                hint="embedding models of a Transformer, Pooling and Normalize are supported",
            )
    configs = [f"{module['path']}/config.json" for module in modules if module["path"]]
    pooling = [module for module in modules if module["type"] == "Pooling"]
    if len(pooling) > 1:
        raise SourceError(f"{folder / MODULES} lists {len(pooling)} poolings")
    return Task(
        kind=TaskKind.EMBEDDING,
        pooling=read_pooling(folder / pooling[0]["path"] / "config.json") if pooling else None,
        prompts=_prompts(folder / PROMPTS),
        normalized=any(module["type"] == "Normalize" for module in modules),
        files=(MODULES, *(name for name in configs if (folder / name).is_file())),
    )


def _prompts(path: Path) -> dict[str, str]:
    found = read_optional(path).get("prompts") or {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise SourceError(f"{path}: prompts is {brief(found)}, expected texts by name")
    return found


def read_pooling(path: Path) -> str:
    """How ``1_Pooling/config.json`` says that states are pooled; SourceError when it says nothing or several ways."""
    if not path.is_file():
        raise SourceError(
            f"{path} is missing: modules.json names it, and without it nobody knows how this model's states are pooled",
            hint="copy it from the original repository",
        )
    settings = read_json(path)
    if isinstance(named := settings.get(MODE), str):
        return named
    modes = [
        key.removeprefix(f"{MODE}_")
        for key, value in settings.items()
        if key.startswith(MODE) and value is True
    ]
    if len(modes) != 1:
        raise SourceError(f"{path} names {len(modes)} ways of pooling: {', '.join(modes) or 'none'}")
    return SHORT.get(modes[0], modes[0])


def task_of(folder: Path, architecture: str, top: dict[str, Any], pipeline_tag: str | None) -> Task:
    """The task of a checkpoint; ``top`` is config.json, ``pipeline_tag`` the one of its card.

    Raises SourceError as ``sentence_task`` does, and for labels that are none.
    """
    if architecture.endswith(CLASSIFIER):
        labels = labels_of(top, folder / "config.json")
        ranks = len(labels) == 1 or pipeline_tag == PIPELINE_TAGS[TaskKind.RERANKING]
        return Task(kind=TaskKind.RERANKING if ranks else TaskKind.CLASSIFICATION, labels=labels)
    if (folder / MODULES).is_file():
        return sentence_task(folder)
    if architecture.endswith("Model") or pipeline_tag in EMBEDDING_TAGS:
        return Task(kind=TaskKind.EMBEDDING)
    return Task()


def labels_of(top: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Names of a classifier's labels, ``top`` being config.json; without ``id2label`` transformers has ``num_labels`` of them, two by default."""
    match top.get("id2label"), top.get("num_labels"):
        case dict() as named, _:
            try:
                return tuple(str(named[str(number)]) for number in range(len(named)))
            except KeyError as error:
                raise SourceError(f"{path}: id2label has no label {error.args[0]}") from error
        case None, int(count) if 1 <= count <= 1 << 16:
            return tuple(f"LABEL_{number}" for number in range(count))
        case None, None:
            return ("LABEL_0", "LABEL_1")
        case wrong, count:
            raise SourceError(f"{path}: {brief(wrong if wrong is not None else count)} is no table of labels")
