"""Which class of transformers loads a checkpoint for judging, read from its source text: importing it takes seconds."""

from __future__ import annotations

import ast
from functools import cache

from quantool.records import Source
from quantool.source.class_defaults import parsed

SUFFIXES = {
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "Model": "MODEL_MAPPING_NAMES",
    "ForMaskedLM": "MODEL_MAPPING_NAMES",
}
"""End of an architecture's name to the table of classes that ``AutoModel…`` loads it by; any other is a text generator."""
CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


def loader(source: Source) -> str | None:
    """Name of the class that the reference of ``source`` is loaded as; None when transformers has none for it.

    With code of the checkpoint's own it is not known, and the architecture's name is given.
    """
    if source.trust_remote_code:
        return source.facts.architecture
    architecture = source.facts.architecture
    table = next((name for end, name in SUFFIXES.items() if architecture.endswith(end)), CAUSAL)
    return _tables()[table].get(source.facts.model_type)


@cache
def _tables() -> dict[str, dict[str, str]]:
    """The tables of ``models/auto/modeling_auto.py`` (transformers 5.17) that ``loader`` needs."""
    wanted = {CAUSAL, *SUFFIXES.values()}
    tables: dict[str, dict[str, str]] = {}
    for node in parsed("models/auto/modeling_auto.py").body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(args=[table])) if name in wanted:
                entries = ast.literal_eval(table)
                tables[name] = {
                    key: value[0] if isinstance(value, tuple) else value for key, value in entries
                }
    return tables
