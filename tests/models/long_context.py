"""The tiny chat model extended eightfold by YaRN, to 16,384 tokens; its weights are the same."""

from __future__ import annotations

import json
from pathlib import Path

import making

CONTEXT, FACTOR = 16384, 8.0
TRAINED = 2048


def write_long(folder: Path) -> Path:
    """Write the checkpoint; the weights are linked, not copied."""
    folder.mkdir(parents=True)
    for path in making.TINY.iterdir():
        if path.name != "config.json" and path.is_file():
            (folder / path.name).symlink_to(path)
    settings = making.read_json(making.TINY / "config.json")
    settings["max_position_embeddings"] = CONTEXT
    settings["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": FACTOR,
        "original_max_position_embeddings": TRAINED,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
