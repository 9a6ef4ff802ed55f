"""Time and memory of quantool beside llama.cpp's own tools on the same random Llama, as a table.

    make bench                                    1.1 B parameters, Q8_0 and Q4_K_M
    python tests/bench.py --layers 4              smaller
    python tests/bench.py --only scores --layers 4 --vocabulary 256000
    python tests/bench.py --only converter --layers 8

Six tables, most with the ratio of its last line: making levels beside llama.cpp's tools, the converter with its tensors
prepared ahead beside upstream's own loop, scores beside llama-perplexity, the reference beside a plain float32 forward of
transformers, calibration in float32 beside bfloat16, and the quickstart's seconds. Nothing is asserted: machines differ. Both sides start from the same checkpoint and write to the same disk; the order
is quantool, upstream, quantool, so that a warm page cache helps neither. The scores are those of the levels beside a
reference that both sides have made before: hidden states there, llama-perplexity's base file here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantool.runtime import toolchain
from quantool.texts.readers import docstrings

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32768
LIMIT = "ONEDNN_MAX_CPU_ISA"
PARTS = ("making", "converter", "scores", "reference", "calibration", "quickstart")
COMPARED = ("upstream", "llama-perplexity", "plain float32", "bfloat16")
TINY = Path(__file__).parent / "models" / "tiny-chat"


@dataclass
class Measured:
    """Wall and processor seconds, and the peak resident memory in MB of the largest process among the children."""

    seconds: float
    processor: float
    peak: float
    beyond: float
    """The same without pages of mapped files."""


def write_model(folder: Path, layers: int, vocabulary: int) -> int:
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
        "model.embed_tokens": (vocabulary, HIDDEN),
        "lm_head": (vocabulary, HIDDEN),
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
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": layers, "vocab_size": vocabulary,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return total


def measure(commands: list[list[str]]) -> Measured:
    """Run the commands one after another and watch the memory of all their processes."""
    peak, beyond, stop = 0.0, 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak, beyond
        while not stop.wait(0.02):
            for pid in descendants(os.getpid()):
                peak = max(peak, memory(pid, "VmHWM"))
                beyond = max(beyond, memory(pid, "RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, before = time.monotonic(), spent()
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return Measured(time.monotonic() - started, spent() - before, peak, beyond)
    finally:
        stop.set()
        watcher.join()


def spent() -> float:
    """Processor seconds of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def descendants(pid: int) -> list[int]:
    """Process ids below ``pid``."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [below for child in map(int, children) for below in (child, *descendants(child))]


def memory(pid: int, field: str) -> float:
    """A field of /proc/PID/status in MB; 0 when the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith(field)]
    return int(lines[0].split()[1]) / 1000 if lines else 0.0


def quantool_command(model: Path, output: Path, levels: list[str]) -> list[str]:
    """Base and levels through the same code as a run, without judging."""
    code = (
        "import sys; from pathlib import Path; from quantool import pipeline; "
        "from quantool.config.schema import Config; from quantool.runtime.progress import Progress; "
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


SCORES = """
import sys; from pathlib import Path; from dataclasses import replace
from quantool.config.schema import Config; from quantool.runtime.progress import Progress; from quantool.records import Gates
from quantool.plugins.contract import Case; from quantool.plugins.find import find_check; from quantool.source.resolve import resolve
from quantool.validation._engines.reference import references; from quantool.texts.corpus import corpora
from quantool.runtime.workspace import Workspace
work, config, levels = Path(sys.argv[1]), Config.model_validate_json(sys.argv[2]), sys.argv[3:]
source = resolve(config, weights=True, progress=Progress(quiet=True))
cases = [Case(Path(path), "llama.cpp", f"bench/{number}", source, config, Gates(), Workspace(work))
         for number, path in enumerate(levels)]
references(cases[0], corpora(config), Progress(quiet=True))
if cases[0].artifact.exists():
    find_check("perplexity").prepare(cases, Progress(quiet=True))
"""


def scores(folder: Path, levels: list[str], windows: int) -> list[tuple[str, Measured]]:
    """Perplexity and divergence of the levels, by quantool and by llama-perplexity, on as many tokens of one text."""
    made = folder / "made"
    measure([quantool_command(folder / "model", made, levels)])
    base = next(made.rglob("base.gguf"))
    files = [next(made.rglob(f"*-{level}.gguf")) for level in levels]
    text = folder / "text.txt"
    text.write_text("\n\n".join(itertools.islice(docstrings(), 4000)))
    config = {
        "model_id": str(folder / "model"), "method": "gguf", "device": "cpu",
        "validation": {"corpora": [{"name": "docs", "path": str(text)}], "max_tokens": 512 * windows},
    }  # fmt: skip
    command = [sys.executable, "-c", SCORES, str(folder / "scores"), json.dumps(config)]
    rows = [("reference", measure([[*command, "no artifact"]]))]
    perplexity, stored = str(toolchain.upstream_tool("llama-perplexity")), str(folder / "base.kld")
    begin = [perplexity, "-m", str(base), "-f", str(text), "-c", "512", "--chunks", str(windows)]
    rows.append(("llama base file", measure([[*begin, "--kl-divergence-base", stored]])))
    for name in ("quantool", "llama-perplexity", "quantool"):
        if name == "quantool":
            rows.append((name, measure([[*command, *map(str, files)]])))
            for record in (folder / "scores").rglob("stages/scores-*"):
                record.unlink()
        else:
            runs = [[perplexity, "-m", str(file), "-c", "512", "--kl-divergence"] for file in files]
            rows.append((name, measure([[*run, "--kl-divergence-base", stored] for run in runs])))
    return rows


def making(folder: Path, levels: list[str]) -> list[tuple[str, Measured]]:
    """Base and levels, by quantool and by llama.cpp's tools; and what the command line takes to start."""
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
    return rows


CONVERT = """
import sys; from pathlib import Path; from quantool.config.schema import Config; from quantool.methods.gguf import Options
from quantool.methods._llama_cpp import base_file, convert; from quantool.runtime import process, toolchain
from quantool.runtime.progress import Progress; from quantool.source.resolve import resolve
from tests.upstream_conversion import convert_as_upstream
model, output, work = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
config = Config(model_id=str(model), method="gguf", quant_level="Q8_0", output_path=output)
source = resolve(config, weights=True, progress=Progress(quiet=True))
options = Options(pre_tokenizer="qwen2")
request = base_file.conversion(source, options, "f16", toolchain.locate(), output / "metadata.json")
request |= {"model": str(source.folder), "output": str(output / "base.gguf")}
call = convert.convert if work == "quantool" else convert_as_upstream
process.call(call, request, log=output / "log")
"""

PLAIN = """
import sys, torch; from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
torch.manual_seed(0)
with torch.inference_mode():
    for _ in range(int(sys.argv[2]) // 4):
        model.model(torch.randint(0, model.config.vocab_size, (4, 512)))
"""


def converter(folder: Path) -> list[tuple[str, Measured]]:
    """The conversion to f16 as quantool runs it, and with upstream's own loop over the tensors."""
    rows = []
    for name in ("quantool", "upstream", "quantool"):
        output = folder / "converted"
        output.mkdir()
        command = [sys.executable, "-c", CONVERT, str(folder / "model"), str(output), name]
        rows.append((name, measure([command])))
        shutil.rmtree(output)
    return rows


def reference(folder: Path, windows: int) -> list[tuple[str, Measured]]:
    """Hidden states of the reference, and a plain forward pass of as many tokens; both with imports and loading."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(itertools.islice(docstrings(), 4000)))
    config = {
        "model_id": str(folder / "model"), "method": "gguf", "device": "cpu",
        "validation": {"corpora": [{"name": "docs", "path": str(text)}], "max_tokens": 512 * windows},
    }  # fmt: skip
    ours = [sys.executable, "-c", SCORES, str(folder / "reference"), json.dumps(config), "no artifact"]
    theirs = [sys.executable, "-c", PLAIN, str(folder / "model"), str(windows)]
    return [("quantool", measure([ours])), ("plain float32", measure([theirs]))]


def calibration(folder: Path) -> list[tuple[str, Measured]]:
    """AWQ of the tiny model, computed in float32 (what a processor without bfloat16 gets) and in bfloat16.

    oneDNN's limit takes the processor's bfloat16 instructions away; ``tests/in_bfloat16.py`` computes in it nevertheless.
    """
    config = folder / "awq.yaml"
    config.write_text(json.dumps({
        "model_id": str(TINY), "method": "awq", "quant_level": "W4A16", "output_path": str(folder / "awq"),
        "dataset_path": str(TINY.parent / "text" / "calibration.jsonl"), "sample_size": 32, "device": "cpu",
    }))  # fmt: skip
    code = (
        "import sys; from pathlib import Path; from quantool import pipeline; from quantool.config.load import load; from quantool.plugins import find; "
        "from quantool.runtime.progress import Progress; pipeline.make(load(Path(sys.argv[1]), (), find).config, Progress(quiet=True))"
    )
    rows = []
    with limited_processor():
        for name, prefix in (("quantool", ""), ("bfloat16", "import tests.in_bfloat16; ")):
            rows.append((name, measure([[sys.executable, "-c", prefix + code, str(config)]])))
            shutil.rmtree(folder / "awq")
    return rows


@contextmanager
def limited_processor() -> Iterator[None]:
    """Let torch's library see no instructions for bfloat16."""
    before = os.environ.get(LIMIT)
    os.environ[LIMIT] = "AVX2"
    try:
        yield
    finally:
        if before is None:
            del os.environ[LIMIT]
        else:
            os.environ[LIMIT] = before


def quickstart(folder: Path) -> list[tuple[str, Measured]]:
    """``quantool configs/quickstart.yaml``, everything from nothing."""
    command = [sys.executable, "-m", "quantool", "configs/quickstart.yaml", "--quiet"]
    return [("quickstart", measure([[*command, "--set", f"output_path={folder / 'quickstart'}"]]))]


def show(title: str, rows: list[tuple[str, Measured]]) -> None:
    """Print a table and quantool's share of what the others take."""
    print(f"\n{title:17} {'seconds':>8} {'processor':>9} {'peak MB':>8} {'no files':>8}")
    for name, found in rows:
        print(f"{name:17} {found.seconds:8.1f} {found.processor:9.1f} {found.peak:8.0f} {found.beyond:8.0f}")
    ours = [found for name, found in rows if name == "quantool"]
    theirs = next((found for name, found in rows if name in COMPARED), None)
    if theirs is None:
        return
    wall = min(found.seconds for found in ours) / theirs.seconds
    processor = min(found.processor for found in ours) / theirs.processor
    print(f"quantool / {theirs_name(rows)}: {wall:.3f} of the time, {processor:.3f} of the processor time")


def theirs_name(rows: list[tuple[str, Measured]]) -> str:
    """What the rows compare with; empty when with nothing."""
    return next((name for name, _ in rows if name in COMPARED), "")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--levels", default="Q8_0,Q4_K_M")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens that are scored")
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    levels = arguments.levels.split(",")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = write_model(folder / "model", arguments.layers, arguments.vocabulary)
        print(
            f"random Llama, {parameters / 1e9:.2f} B parameters, {arguments.levels}, {os.cpu_count()} cores"
        )
        parts: dict[str, Callable[[], list[tuple[str, Measured]]]] = {
            "making": lambda: making(folder, levels),
            "converter": lambda: converter(folder),
            "scores": lambda: scores(folder, levels, arguments.windows),
            "reference": lambda: reference(folder, arguments.windows),
            "calibration": lambda: calibration(folder),
            "quickstart": lambda: quickstart(folder),
        }
        for name in [arguments.only] if arguments.only else PARTS:
            show(name, parts[name]())


if __name__ == "__main__":
    main()
