"""What a run costs on Hopper GPUs, stage by stage, and the speed of what it makes in vLLM; the README's tables come from here.

    python tests/hopper.py model FOLDER           a random Llama of 6.7 B parameters (bf16, 13.5 GB)
    python tests/hopper.py run FOLDER OUTPUT      all of it made and judged: seconds of each stage, use of the GPUs
    python tests/hopper.py scores FOLDER ARTIFACT … --output FOLDER --tokens N --gpus 0,1 --memory GB
    python tests/hopper.py quantize FOLDER OUTPUT --calibration FILE
    python tests/hopper.py speed FOLDER …         tokens/s at batch 1 and 64, one process a folder

What is served right or wrong does not show on random weights: `quantool validate FOLDER --engine vllm` is for that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HIDDEN, FEED_FORWARD, HEADS, LAYERS, VOCABULARY, CONTEXT = 4096, 11008, 32, 32, 32000, 4096
TINY = Path(__file__).parent / "models" / "tiny-chat"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PROMPT, ANSWER = 128, 256
MEASURED = {"fp8": "FP8_DYNAMIC", "awq": "W4A16"}


def write_model(folder: Path) -> None:
    """A random Llama of the shape of Llama-2-7B in bf16, four layers a shard, with the tiny model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    square, wide, narrow = (HIDDEN, HIDDEN), (FEED_FORWARD, HIDDEN), (HIDDEN, FEED_FORWARD)
    block: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        "mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": narrow,
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)
    }  # fmt: skip
    groups = [
        {f"model.layers.{n}.{name}": shape for n in range(first, first + 4) for name, shape in block.items()}
        for first in range(0, LAYERS, 4)
    ]
    index: dict[str, str] = {}
    for number, shapes in enumerate([*groups, ends], 1):
        name = f"model-{number:05d}-of-{len(groups) + 1:05d}.safetensors"
        tensors = {f"{key}.weight": _random(shape) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copyfile(TINY / name, folder / name)


def _random(shape: tuple[int, ...]) -> Any:
    """Normal weights of standard deviation 0.02; norms of 1."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (torch.randn(shape, device=device) * 0.02).to(torch.bfloat16).cpu()


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


JOB = """\
model_id: {model}
quantizations:
  - {{method: gguf, quant_level: [Q8_0, Q4_K_M], quantization_config: {{pre_tokenizer: qwen2, imatrix: true}}}}
  - {{method: fp8, quant_level: FP8_DYNAMIC}}
  - {{method: awq, quant_level: W4A16}}
dataset_path: {text}/calibration.txt
sample_size: 128
calibration_config: {{max_seq_length: 512}}
output_path: {output}
device: cuda
validation:
  corpora: [{{name: docs, path: {text}/heldout.en.txt}}, {{name: chat, path: {text}/heldout.chat.jsonl}}]
"""


def run(model: Path, output: Path) -> None:
    """Make and judge everything through the command line; print when each stage ended, and how busy the GPUs were."""
    output.mkdir(parents=True, exist_ok=True)
    job = output / "job.yaml"
    job.write_text(JOB.format(model=model, output=output, text=TINY.parent / "text"))
    started = time.monotonic()
    command = [sys.executable, "-m", "quantool", str(job)]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
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
    from quantool.validation._findings.statistics import summarize
    from quantool.validation._score.scores import compute, kept_scores

    if memory:
        fraction = memory / 140
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{fraction:.4f}"
    output.mkdir(parents=True)
    text = output / "text.txt"
    text.write_text(
        (TINY.parent / "text" / "calibration.txt").read_text(encoding="utf-8") * 200, encoding="utf-8"
    )
    validation = Validation(corpora=(Corpus(name="text", path=text),), max_tokens=tokens)
    config = Config(model_id=str(model), method="gguf", validation=validation, device=f"cuda:{gpus}")
    progress = Progress()
    source = resolve(config, weights=True, progress=progress)
    cases = [
        Case(path, "transformers" if path.is_dir() else "llama.cpp", path.stem, source, config, Gates(), Workspace(output))
        for path in artifacts
    ]  # fmt: skip
    for case in cases[:1]:
        known = references(case, corpora(config), progress)
        print(f"reference: {known[0].execution}, {known[0].arithmetic}", flush=True)
    for case in cases:
        compute([case], known, progress)
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
    steps.add_parser("model").add_argument("folder", type=Path)
    making = steps.add_parser("quantize")
    making.add_argument("folder", type=Path)
    making.add_argument("output", type=Path)
    making.add_argument("--calibration", type=Path, required=True)
    whole = steps.add_parser("run")
    whole.add_argument("folder", type=Path)
    whole.add_argument("output", type=Path)
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
        write_model(arguments.folder)
    elif arguments.step == "run":
        run(arguments.folder, arguments.output)
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
            subprocess.run([sys.executable, __file__, "speed", str(folder)], check=False)


if __name__ == "__main__":
    main()
