"""Which class of transformers loads a checkpoint for judging, read from its source text: importing it takes seconds."""

from __future__ import annotations

import ast
from functools import cache

from quantool.records import Source
from quantool.source.class_defaults import parsed

SUFFIXES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "Model": "AutoModel",
    "ForMaskedLM": "AutoModel",
}
"""End of an architecture's name to the class that finds its class; any other is a text generator."""
TABLES = {
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}


def auto_class(source: Source) -> str:
    """Name of the class of transformers that the reference of ``source`` is loaded through."""
    architecture = source.facts.architecture
    return next(
        (name for end, name in SUFFIXES.items() if architecture.endswith(end)), "AutoModelForCausalLM"
    )


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
