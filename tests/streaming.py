"""Peak memory of FP8 without calibration on a checkpoint of ALIA-40b's shapes, as large as the disk takes.

    python tests/streaming.py --layers 6        17 GB of bf16 in shards of at most 5 GB

Written beside it goes about half as much. What is asserted is the bound that the method promises: a worker holds no more
than twice the largest shard (it holds a few slices).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from quantool.config.schema import Config
from quantool.formats.safetensors import INDEX
from quantool.methods._safetensors.layout import Stored, encode, file_size, index_bytes
from quantool.plan import make
from quantool.plan.depends import depends_of
from quantool.plugins import contract, find
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace
from quantool.source import resolve

HIDDEN, INNER, HEADS, KEYS, HEAD_SIZE, VOCABULARY = 8192, 24576, 64, 8, 128, 256_000
TINY = Path(__file__).parent / "models" / "tiny-chat"
SHARD = 5_000_000_000
BLOCK = 1 << 26


def tensors(layers: int) -> list[Stored]:
    """Names and shapes of the checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, HIDDEN)}
    for number in range(layers):
        place = f"model.layers.{number}"
        shapes |= {f"{place}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{place}.self_attn.{name}_proj": (KEYS * HEAD_SIZE, HIDDEN) for name in "kv"}
        shapes |= {f"{place}.mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{place}.mlp.down_proj"] = (HIDDEN, INNER)
        shapes |= {f"{place}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    return [Stored(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]


def cut(layers: int) -> dict[str, list[Stored]]:
    """The shards of the checkpoint."""
    shards: list[list[Stored]] = [[]]
    for tensor in tensors(layers):
        if sum(one.bytes for one in shards[-1]) + tensor.bytes > SHARD:
            shards.append([])
        shards[-1].append(tensor)
    names = (f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1))
    return dict(zip(names, shards, strict=True))


def begin(folder: Path, layers: int) -> dict[str, list[Stored]]:
    """Everything but the weights: configuration, tokenizer and index; returns the shards to come."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "head_dim": HEAD_SIZE,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    shards = cut(layers)
    (folder / INDEX).write_bytes(index_bytes(shards))
    return shards


def write(folder: Path, layers: int) -> int:
    """Random normal numbers, a block of them again and again; returns the bytes of the largest shard."""
    shards = begin(folder, layers)
    normal = np.random.default_rng(0).standard_normal(BLOCK // 2, dtype=np.float32) * 0.02
    block = (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    for name, stored in shards.items():
        left = sum(tensor.bytes for tensor in stored)
        with (folder / name).open("wb") as file:
            file.write(encode(stored)[0])
            while left:
                left -= file.write(block[: min(left, BLOCK)])
    return max(file_size(stored) for stored in shards.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--level", default="FP8_DYNAMIC")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
        place = Path(temporary)
        largest = write(place / "alia", asked.layers)
        size = sum(path.stat().st_size for path in (place / "alia").glob("*.safetensors"))
        config = Config.model_validate(
            {
                "model_id": str(place / "alia"),
                "output_path": str(place / "out"),
                "method": "fp8",
                "quant_level": asked.level,
                "quantization_config": {"workers": asked.workers},
                "validation": {"gates": {"*": {}}},
            }
        )
        workspace, quiet = Workspace(config.output_path), Progress(quiet=True)
        drawn = make.make_plan(config, resolve.resolve(config, weights=True, progress=quiet), workspace)
        wanted = config.requested()[0]
        method = find.find_method(wanted.method)
        started = time.monotonic()
        with workspace.lock():
            job = contract.Job(config, drawn, drawn.outputs[0], workspace, depends_of(method))
            made = method.quantize(job, make.options_of(wanted, method), quiet)
        seconds, peak = time.monotonic() - started, int(str(made.details["peak_rss"]))
    print(
        f"{size / 1e9:.1f} GB in shards of up to {largest / 1e9:.2f} GB, {asked.level}, {asked.workers} workers: "
        f"{seconds:.0f} s, peak RSS of all workers together {peak / 1e9:.2f} GB (planned {drawn.outputs[0].peak_ram / 1e9:.2f} GB), "
        f"{sum(file.bytes for file in made.files) / 1e9:.1f} GB written"
    )
    assert peak <= 2 * largest * asked.workers


if __name__ == "__main__":
    main()
