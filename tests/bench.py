"""Time and memory of quantool beside llama.cpp's own tools on the same random Llama, as a table.

    make bench                        1.1 B parameters, Q8_0 and Q4_K_M
    python tests/bench.py --layers 4  smaller

Nothing is asserted: machines differ. Both sides start from the same checkpoint and write to the same disk; the order
is quantool, upstream, quantool, so that a warm page cache helps neither.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from quantool import toolchain

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32768
TINY = Path(__file__).parent / "models" / "tiny-chat"


@dataclass
class Measured:
    """Wall seconds, and the peak resident memory in MB of the largest process among the children."""

    seconds: float
    peak: float


def write_model(folder: Path, layers: int) -> int:
    """A random Llama in bf16, one shard a layer, with the tiny model's tokenizer; returns its parameters."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    kv = HIDDEN // HEADS * KV_HEADS
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
        "mlp.up_proj": (FEED_FORWARD, HIDDEN), "mlp.down_proj": (HIDDEN, FEED_FORWARD),
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    shards = [
        {f"model.layers.{n}.{name}.weight": shape for name, shape in block.items()} for n in range(layers)
    ]
    ends = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    shards.append({f"{name}.weight": shape for name, shape in ends.items()})
    index: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: (torch.randn(shape) * 0.02).to(torch.bfloat16) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((TINY / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_attention_heads": HEADS, "head_dim": HIDDEN // HEADS,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return total


def measure(commands: list[list[str]]) -> Measured:
    """Run the commands one after another and watch the memory of all their processes."""
    peak, stop = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, *(high_water(pid) for pid in descendants(os.getpid())), 0.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return Measured(time.monotonic() - started, peak)
    finally:
        stop.set()
        watcher.join()


def descendants(pid: int) -> list[int]:
    """Process ids below ``pid``."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [below for child in map(int, children) for below in (child, *descendants(child))]


def high_water(pid: int) -> float:
    """Peak resident memory of a process in MB; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1000 if lines else 0.0


def quantool_command(model: Path, output: Path, levels: list[str]) -> list[str]:
    """Base and levels through the same code as a run, without judging."""
    code = (
        "import sys; from pathlib import Path; from quantool import pipeline, registry; "
        "from quantool.config import Config; from quantool.progress import Progress; "
        "c = Config(model_id=sys.argv[1], method='gguf', quant_level=sys.argv[3].split(','), "
        "output_path=Path(sys.argv[2]), quantization_config={'pre_tokenizer': 'qwen2'}); "
        "pipeline.make(c, Progress(quiet=True))"
    )
    return [sys.executable, "-c", code, str(model), str(output), ",".join(levels)]


def upstream_commands(model: Path, output: Path, levels: list[str]) -> list[list[str]]:
    """convert_hf_to_gguf.py (its tokenizer table taught the tiny model's) and llama-quantize for each level."""
    folder = toolchain.locate().folder
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder / 'gguf-py')!r}]; import conversion, "
        "convert_hf_to_gguf as c; conversion.TextModel.get_vocab_base_pre = lambda *_: 'qwen2'; c.main()"
    )
    base = output / "base.gguf"
    quantize = str(toolchain.upstream_tool("llama-quantize"))
    output.mkdir()
    commands = [[sys.executable, "-c", code, str(model), "--outtype", "f16", "--outfile", str(base)]]
    return commands + [[quantize, str(base), str(output / f"{level}.gguf"), level] for level in levels]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--levels", default="Q8_0,Q4_K_M")
    arguments = parser.parse_args()
    levels = arguments.levels.split(",")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = write_model(folder / "model", arguments.layers)
        print(
            f"random Llama, {parameters / 1e9:.2f} B parameters, {arguments.levels}, {os.cpu_count()} cores\n"
        )
        rows: list[tuple[str, Measured]] = []
        for name in ("quantool", "upstream", "quantool"):
            output = folder / "output"
            if name == "quantool":
                rows.append((name, measure([quantool_command(folder / "model", output, levels)])))
            else:
                rows.append((name, measure(upstream_commands(folder / "model", output, levels))))
            shutil.rmtree(output)
        config = folder / "plan.yaml"
        config.write_text(json.dumps({
            "model_id": str(folder / "model"), "method": "gguf", "quant_level": levels,
            "quantization_config": {"pre_tokenizer": "qwen2"}, "output_path": str(folder / "planned"),
        }))  # fmt: skip
        command = [sys.executable, "-m", "quantool"]
        rows.append(("quantool plan", measure([[*command, "plan", str(config)]])))
        rows.append(("quantool --help", measure([[*command, "--help"]])))
    print(f"{'what':16} {'seconds':>8} {'peak MB':>8}")
    for name, found in rows:
        print(f"{name:16} {found.seconds:8.1f} {found.peak:8.0f}")
    ours = min(found.seconds for name, found in rows if name == "quantool")
    print(f"\nquantool / upstream: {ours / rows[1][1].seconds:.3f}")


if __name__ == "__main__":
    main()
