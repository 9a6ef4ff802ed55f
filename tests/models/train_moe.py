"""Train the mixture of experts of the tests on the texts of the tiny chat model.

    OMP_WAIT_POLICY=PASSIVE python tests/models/train_moe.py

What is compared on it is how much quantization loses, so it has to have learned something, not everything: the loss and the
share of tokens that each expert sees are printed as it goes.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import moe
import torch
import train
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

SEED = 20251121
STEPS = 900
MATRIX_RATE = 0.006  # Muon, for the matrices of the attention
RATE = 3e-3  # AdamW, for experts, embeddings, routers and norms


def new_model() -> Any:
    """The untrained model, float32."""
    torch.manual_seed(SEED)
    made: Any = Qwen3MoeForCausalLM
    return made._from_config(Qwen3MoeConfig(**moe.config()), experts_implementation="eager").float()


def make_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the attention, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if "self_attn" in name and p.ndim == 2]
    kept = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.05),
        torch.optim.AdamW(rest, RATE, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def fit(model: Any, tokenizer: Any, steps: int) -> None:
    """Train in place on every token."""
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: train.rate_factor(step, steps))
        for optimizer in optimizers
    ]
    model.train()
    losses: list[float] = []
    started = time.monotonic()
    for step, (ids, positions) in enumerate(train.batches(tokenizer, train.read_texts(), steps), 1):
        output = model(input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True)
        targets = ids[:, 1:].masked_fill(positions[:, 1:] == 0, -100)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets.flatten())
        model.zero_grad()
        (loss + 0.01 * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        if step % 25 == 0:
            chosen = torch.cat([logits.topk(2).indices.flatten() for logits in output.router_logits])
            shares = torch.bincount(chosen, minlength=moe.EXPERTS) / len(chosen)
            print(
                f"step {step}/{steps} loss {sum(losses[-25:]) / 25:.3f} experts "
                f"{' '.join(f'{share:.2f}' for share in shares)} {time.monotonic() - started:.0f} s",
                flush=True,
            )


def save(model: Any, path: Path) -> None:
    """Write the weights in bf16 as a checkpoint has them, an expert a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    """Run the whole recipe from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=moe.WEIGHTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    fit(model, AutoTokenizer.from_pretrained(moe.TINY), arguments.steps)
    save(model, arguments.output)


if __name__ == "__main__":
    main()
