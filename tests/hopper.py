"""What a run costs on Hopper GPUs, stage by stage, and the speed of what it makes in vLLM; the README's tables come from here.

    python -m tests.hopper model FOLDER           a random Llama of 6.7 B parameters (bf16, 13.5 GB)
    python -m tests.hopper model FOLDER --shape alia --layers 8     of ALIA-40b's shape (48 layers: 81 GB)
    python -m tests.hopper run FOLDER OUTPUT      all of it made and judged: seconds of each worker beside what disk, memory
                                                  and arithmetic allow, use of the GPUs
    python -m tests.hopper run FOLDER OUTPUT --levels Q4_K_M,FP8_DYNAMIC --checks perplexity,integrity --gpus 0,1 --memory 64
    python -m tests.hopper scores FOLDER ARTIFACT … --output FOLDER --tokens N --gpus 0,1 --memory GB
    python -m tests.hopper quantize FOLDER OUTPUT --calibration FILE
    python -m tests.hopper speed FOLDER …         tokens/s at batch 1 and 64, one process a folder

What is served right or wrong does not show on random weights: `quantool validate FOLDER --engine vllm` is for that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests import hopper_limits


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    hidden: int
    feed_forward: int
    heads: int
    key_heads: int
    layers: int
    vocabulary: int
    context: int = 4096


SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "alia": Shape(8192, 24576, 64, 8, 48, 256000),
}
TINY = Path(__file__).parent / "models" / "tiny-chat"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PROMPT, ANSWER = 128, 256
SHARD = 5 << 30
WRITERS = 4
ROUNDS = 5
"""Of a text of 15,448 tokens: more than 128 samples of 512."""
MEASURED = {"fp8": "FP8_DYNAMIC", "awq": "W4A16"}


def write_model(folder: Path, shape: Shape) -> None:
    """A random Llama in bf16, about 5 GB a shard, with the tiny model's tokenizer."""
    import torch

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    wide, narrow = (shape.feed_forward, shape.hidden), (shape.hidden, shape.feed_forward)
    square, keys = (shape.hidden, shape.hidden), (shape.hidden * shape.key_heads // shape.heads, shape.hidden)
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": square, "self_attn.k_proj": keys, "self_attn.v_proj": keys, "self_attn.o_proj": square,
        "mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": narrow,
        "input_layernorm": (shape.hidden,), "post_attention_layernorm": (shape.hidden,),
    }  # fmt: skip
    table = (shape.vocabulary, shape.hidden)
    ends: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens": table, "model.norm": (shape.hidden,)}, {"lm_head": table}
    ]  # fmt: skip
    size = 2 * sum(math.prod(part) for part in block.values())
    step = max(1, SHARD // size)
    groups = [
        {
            f"model.layers.{n}.{name}": part
            for n in range(first, min(first + step, shape.layers))
            for name, part in block.items()
        }
        for first in range(0, shape.layers, step)
    ] + ends
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(_write_shard, [folder / name for name in names], groups))
    index = {f"{key}.weight": name for name, group in zip(names, groups, strict=True) for key in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.feed_forward, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads, "num_hidden_layers": shape.layers, "vocab_size": shape.vocabulary,
        "rms_norm_eps": 1e-5, "max_position_embeddings": shape.context, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copyfile(TINY / name, folder / name)


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    from safetensors.torch import save_file

    save_file(
        {f"{key}.weight": _random(part) for key, part in shapes.items()}, path, metadata={"format": "pt"}
    )


def _random(shape: tuple[int, ...]) -> Any:
    """Normal weights of standard deviation 0.02; norms of 1."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()


def quantize(model: Path, output: Path, calibration: Path) -> None:
    """Make FP8_DYNAMIC (data-free) and AWQ W4A16 (128 samples of 512 tokens) and print seconds and peak memory."""
    from quantool import pipeline
    from quantool.config.schema import Config
    from quantool.runtime.progress import Progress

    for method, level in MEASURED.items():
        config = Config(
            model_id=str(model),
            method=method,
            quant_level=level,
            dataset_path=calibration if method == "awq" else None,
            sample_size=128,
            calibration_config={"max_seq_length": 512},
            output_path=output / method,
            device="cuda",
        )
        started = time.monotonic()
        (artifact,) = pipeline.make(config, Progress())
        whole = time.monotonic() - started
        print(
            f"{method} {level}: {artifact.seconds:.0f} s ({whole:.0f} s with hashing and planning), "
            f"{artifact.bytes() / 1e9:.2f} GB, {json.dumps(artifact.details)}",
            flush=True,
        )


def long_text(rounds: int) -> str:
    """The paragraphs of the tests' calibration text so many times, every time in another order: no two samples are alike."""
    paragraphs = (TINY.parent / "text" / "calibration.txt").read_text(encoding="utf-8").split("\n\n")
    dice = random.Random(0)
    return "\n\n".join(text for _ in range(rounds) for text in dice.sample(paragraphs, len(paragraphs)))


JOB = """\
model_id: {model}
quantizations:
{outputs}
dataset_path: {output}/calibration.txt
sample_size: 128
calibration_config: {{max_seq_length: 512}}
output_path: {output}
device: cuda{gpus}
validation:
  {checks}
  corpora: [{{name: docs, path: {text}/heldout.en.txt}}, {{name: chat, path: {text}/heldout.chat.jsonl}}]
"""
GGUF = "  - {method: gguf, quant_level: [LEVELS], quantization_config: {pre_tokenizer: qwen2, imatrix: true}}"


def run(model: Path, output: Path, levels: list[str], checks: str, gpus: str, memory: float) -> None:
    """Make and judge everything, as the command line does; print when each stage ended, each worker's time, use of the GPUs."""
    output.mkdir(parents=True, exist_ok=True)
    compressed = {level: method for method, level in MEASURED.items()}
    gguf = [level for level in levels if level not in compressed]
    outputs = [GGUF.replace("LEVELS", ", ".join(gguf))] if gguf else []
    outputs += [
        f"  - {{method: {compressed[level]}, quant_level: {level}}}"
        for level in levels
        if level in compressed
    ]
    (output / "calibration.txt").write_text(long_text(ROUNDS), encoding="utf-8")
    job = output / "job.yaml"
    job.write_text(
        JOB.format(
            model=model,
            output=output,
            text=TINY.parent / "text",
            outputs="\n".join(outputs),
            gpus=f":{gpus}" if gpus else "",
            checks=f"checks: [{checks}]" if checks else "",
        )
    )
    environment = os.environ | _capped(memory)
    speeds = hopper_limits.measure(model, output)
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.hopper", "traced", str(job)]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process,
        subprocess.Popen(
            ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "500"],
            stdout=subprocess.PIPE, text=True,
        ) as watch,
    ):  # fmt: skip
        for line in process.stderr or ():
            print(f"{time.monotonic() - started:7.1f}  {line}", end="", flush=True)
        code = process.wait()
        watch.terminate()
        samples = [tuple(map(float, line.split(","))) for line in watch.stdout or () if line.count(",") == 1]
    busy = sum(use for use, _ in samples) / max(1, len(samples))
    most = max((used for _, used in samples), default=0)
    print(
        f"exit {code} after {time.monotonic() - started:.0f} s; GPU busy {busy:.0f} %, at most {most / 1024:.1f} GiB"
    )
    hopper_limits.show(output / "calls.jsonl", model, output, speeds)


class Marked:
    """A bar that notes when it moved: how long a layer or a span took, and what came before the first and after the last."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._began = time.monotonic()
        self.marks: list[tuple[float, float]] = []

    def move(self, done: float, total: float) -> None:
        """See ``Bar``."""
        self.marks.append((round(time.monotonic() - self._began, 2), round(done / total, 4)))
        self._bar.move(done, total)


def traced(job: Path) -> None:
    """Run ``job`` in this process; beside it, calls.jsonl has begin and end of every worker."""
    from quantool import cli
    from quantool.runtime import process

    began, call = time.monotonic(), process.call
    turn = threading.Lock()

    def noted(work: Any, request: Any, **settings: Any) -> Any:
        started = time.monotonic()
        inner = settings.pop("bar", None)
        bar = Marked(inner) if inner else None
        try:
            return call(work, request, bar=bar, **settings)
        finally:
            entry = {
                "work": process.name_of(work), "log": settings["log"].stem, "begin": started - began,
                "end": time.monotonic() - began, "marks": bar.marks if bar else [],
            }  # fmt: skip
            with turn, (job.parent / "calls.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")

    process.call = noted
    sys.argv = ["quantool", str(job)]
    cli.main()


def _capped(memory: float) -> dict[str, str]:
    """The environment of processes that may have so many GB of each GPU; 0: all."""
    if not memory:
        return {}
    return {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{memory / 151:.4f}"}


def scores(model: Path, artifacts: list[Path], output: Path, tokens: int, gpus: str, memory: float) -> None:
    """Print the seconds of reference and scores on so many tokens, and the divergences; a folder is scored by transformers.

    ``memory`` is what torch may have of a GPU, GB; 0: all.
    """
    from quantool.config.schema import Config, Corpus, Validation
    from quantool.plugins.contract import Case
    from quantool.records import Gates
    from quantool.runtime.progress import Progress
    from quantool.runtime.workspace import Workspace
    from quantool.source.resolve import resolve
    from quantool.texts.corpus import corpora
    from quantool.validation._engines.reference import references
    from quantool.validation._engines.windows import windows
    from quantool.validation._findings.statistics import summarize
    from quantool.validation._score.scores import compute, kept_scores

    os.environ |= _capped(memory)
    output.mkdir(parents=True)
    text = output / "text.txt"
    text.write_text(long_text(200), encoding="utf-8")
    validation = Validation(corpora=(Corpus(name="text", path=text),), max_tokens=tokens)
    config = Config(model_id=str(model), method="gguf", validation=validation, device=f"cuda:{gpus}")
    progress = Progress()
    source = resolve(config, weights=True, progress=progress)
    cases = [
        Case(path, "transformers" if path.is_dir() else "llama.cpp", path.stem, source, config, Gates(), Workspace(output))
        for path in artifacts
    ]  # fmt: skip
    for case in cases[:1]:
        windows(case, corpora(config), progress)
        started = time.monotonic()
        known = references(case, corpora(config), progress)
        print(
            f"reference: {known[0].execution}, {known[0].arithmetic}; {time.monotonic() - started:.1f} s",
            flush=True,
        )
    for case in cases:
        started = time.monotonic()
        compute([case], known, progress)
        print(f"{case.name}: {time.monotonic() - started:.1f} s", flush=True)
        found = kept_scores(case, known)
        if found.failure:
            print(f"{case.name}: {found.failure}")
            continue
        summary = summarize(found.tokens[0])
        print(
            f"{case.name}: {found.execution}; KLD {summary.mean_kld.value:.8f}, "
            f"PPL {summary.perplexity.value:.4f} / {summary.perplexity_reference.value:.4f}",
            flush=True,
        )


def speed(folder: Path) -> None:
    """Print tokens/s of greedy answers of 256 tokens to prompts of 128, at batch 1 and 64."""
    import torch
    import vllm

    model = vllm.LLM(model=str(folder), max_model_len=1024, gpu_memory_utilization=0.6, seed=0)
    asked = vllm.SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 64):
        ids = torch.randint(10, 5000, (batch, PROMPT), generator=generator).tolist()
        prompts = [{"prompt_token_ids": one} for one in ids]
        rates = []
        for attempt in range(4):
            started = time.perf_counter()
            answers = model.generate(prompts, asked, use_tqdm=False)
            tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
            if attempt:  # the first one warms up
                rates.append(tokens / (time.perf_counter() - started))
        print(f"{folder.name}: batch {batch}: {sorted(rates)[1]:.0f} tokens/s of {rates}", flush=True)


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser()
    steps = parser.add_subparsers(dest="step", required=True)
    writing = steps.add_parser("model")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--shape", choices=SHAPES, default="llama-7b")
    writing.add_argument("--layers", type=int)
    steps.add_parser("traced").add_argument("job", type=Path)
    making = steps.add_parser("quantize")
    making.add_argument("folder", type=Path)
    making.add_argument("output", type=Path)
    making.add_argument("--calibration", type=Path, required=True)
    whole = steps.add_parser("run")
    whole.add_argument("folder", type=Path)
    whole.add_argument("output", type=Path)
    whole.add_argument("--levels", default="Q8_0,Q4_K_M,FP8_DYNAMIC,W4A16")
    whole.add_argument("--checks", default="")
    whole.add_argument("--gpus", default="")
    whole.add_argument("--memory", type=float, default=0)
    judging = steps.add_parser("scores")
    judging.add_argument("folder", type=Path)
    judging.add_argument("artifacts", type=Path, nargs="+")
    judging.add_argument("--output", type=Path, required=True)
    judging.add_argument("--tokens", type=int, default=16384)
    judging.add_argument("--gpus", default="0")
    judging.add_argument("--memory", type=float, default=0)
    steps.add_parser("speed").add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments.step == "model":
        shape = SHAPES[arguments.shape]
        write_model(arguments.folder, replace(shape, layers=arguments.layers or shape.layers))
    elif arguments.step == "run":
        run(
            arguments.folder,
            arguments.output,
            arguments.levels.split(","),
            arguments.checks,
            arguments.gpus,
            arguments.memory,
        )
    elif arguments.step == "traced":
        traced(arguments.job)
    elif arguments.step == "scores":
        scores(
            arguments.folder,
            arguments.artifacts,
            arguments.output,
            arguments.tokens,
            arguments.gpus,
            arguments.memory,
        )
    elif arguments.step == "quantize":
        quantize(arguments.folder, arguments.output, arguments.calibration)
    elif len(arguments.folders) == 1:
        speed(arguments.folders[0])
    else:
        for folder in arguments.folders:
            subprocess.run([sys.executable, "-m", "tests.hopper", "speed", str(folder)], check=False)


if __name__ == "__main__":
    main()
