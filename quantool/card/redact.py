"""Records without the machine they were made on: no folder, no state, the last part of every path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OF_THE_MACHINE = frozenset(
    {"folder", "done", "free_disk", "peak_disk", "output_path", "push_to_hub", "disk_bounded", "made_from"}
)
"""Keys of a plan that say where a run was and how far, not what was made."""

PLACES = {
    "model_id", "tokenizer_name", "cache_dir", "llama_cpp_path", "imatrix", "dataset_path", "dataset_cache_dir",
    "output_path", "eval_dataset", "path", "conversations", "reference", "template", "prompts", "include_path",
    "haystack", "tokenizer",
}  # fmt: skip
"""Keys of records whose value may be a path of this machine: its name is enough."""


def without_places(record: Any) -> Any:
    """The same record without folders and state of the machine it was made on: a rerun writes the same bytes."""
    if isinstance(record, dict):
        return {
            key: _name(value) if key in PLACES else without_places(value)
            for key, value in record.items()
            if key not in OF_THE_MACHINE
        }
    if isinstance(record, list):
        return [without_places(value) for value in record]
    return record


def _name(value: object) -> object:
    """The last part of an absolute path; anything else as it is."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
