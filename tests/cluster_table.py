"""The README's table of a simulated cluster: ``python -m tests.cluster_table``.

configs/alia-40b.yaml on a checkpoint of its exact shapes (81 GB, sparse), by the plan's estimates for nodes of MareNostrum's
shape, on 1, 2, 4 and 8 of them. No weight is read.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from quantool.cluster.graph import graph_of
from quantool.cluster.resources import NodeShape, resources_of
from quantool.cluster.simulate import Makespan, simulate
from quantool.config.load import load
from quantool.formats.safetensors_layout import encode, file_size
from quantool.pipeline import plan
from quantool.plugins import find
from quantool.runtime import gpus
from quantool.runtime.progress import Progress
from tests.streaming import begin

ROOT = Path(__file__).parents[1]
LAYERS = 48
NODE = NodeShape(80, 500 << 30, 4)
NODES = (1, 2, 4, 8)
LANGUAGES = ("es", "ca", "eu", "gl", "en")


def makespans(folder: Path) -> list[Makespan]:
    """Simulate the configuration on a checkpoint written to ``folder``; its texts stand for those of five languages."""
    model = folder / "alia-40b"
    for name, stored in begin(model, LAYERS).items():
        with (model / name).open("wb") as file:
            file.write(encode(stored)[0])
            file.truncate(file_size(stored))
    texts = ROOT / "tests/models/text"
    corpora = ", ".join(f"{{name: {name}, path: {texts / 'heldout.en.txt'}}}" for name in LANGUAGES)
    changes = {
        "model_id": model,
        "output_path": folder / "out",
        "push_to_hub": "false",
        "dataset_path": texts / "calibration.jsonl",
        "validation.corpora": f"[{corpora}]",
        "validation.lm_eval": "null",  # no task says before what it will take
        "validation.needle": "null",  # the tiny tokenizer's checkpoint reads no 32k tokens
    }
    words = [f"{key}={value}" for key, value in changes.items()]
    config = load(ROOT / "configs/alia-40b.yaml", words, find).config
    with gpus.of_nodes(NODE.gpus):
        made = plan(config, Progress(quiet=True))
    graph = graph_of(made, config)
    needed = resources_of(graph, made, config, NODE)
    return [simulate(graph, needed, NODE, count) for count in NODES]


def main() -> None:
    """Print the table as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        rows = makespans(Path(folder))
    lines = ["| nodes | minutes | efficiency |", "|---|---|---|"]
    lines += [f"| {row.nodes} | {row.seconds / 60:.0f} | {row.efficiency:.2f} |" for row in rows]
    lines.append(f"longest chain: {' → '.join(rows[0].chain)}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
