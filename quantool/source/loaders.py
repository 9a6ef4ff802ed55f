"""Which class of transformers loads a checkpoint for judging, read from its source text: importing it takes seconds."""

from __future__ import annotations

import ast
from functools import cache

from quantool.records import Source
from quantool.source.class_defaults import parsed
from quantool.tasks import TaskKind

CLASSES = {
    TaskKind.EMBEDDING: "AutoModel",
    TaskKind.RERANKING: "AutoModelForSequenceClassification",
    TaskKind.CLASSIFICATION: "AutoModelForSequenceClassification",
    TaskKind.GENERATION: "AutoModelForCausalLM",
}
"""What a model is for to the class of transformers that finds its class."""
TABLES = {
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}


def auto_class(source: Source) -> str:
    """Name of the class of transformers that the reference of ``source`` is loaded through."""
    return CLASSES[source.facts.task.kind]


def loader(source: Source) -> str | None:
    """Name of the class that the reference of ``source`` is loaded as; None when transformers has none for it.

    With code of the checkpoint's own it is not known, and the architecture's name is given.
    """
    if source.trust_remote_code:
        return source.facts.architecture
    return _tables()[TABLES[auto_class(source)]].get(source.facts.model_type)


@cache
def _tables() -> dict[str, dict[str, str]]:
    """The tables of ``models/auto/modeling_auto.py`` (transformers 5.17) that ``loader`` needs."""
    wanted = {*TABLES.values()}
    tables: dict[str, dict[str, str]] = {}
    for node in parsed("models/auto/modeling_auto.py").body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(args=[table])) if name in wanted:
                entries = ast.literal_eval(table)
                tables[name] = {
                    key: value[0] if isinstance(value, tuple) else value for key, value in entries
                }
    return tables
