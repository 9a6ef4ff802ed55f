"""Train the multi-token-prediction head of the tests on the frozen tiny chat model.

    OMP_WAIT_POLICY=PASSIVE python tests/models/train_mtp.py

The head is one layer of the model (DeepSeek-V3, arXiv 2412.19437, section 2.2): from the final hidden state of a token and
the embedding of the next one it predicts the token after that. It learns what the model itself says there, on the texts
that the model was trained on; the share of drafts that are the model's own choice is printed as it goes.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import mtp
import torch
import train
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeConfig, Glm4MoeForCausalLM

SEED = 20250915
STEPS = 350
RATE = 3e-3


class Head(torch.nn.Module):
    """The two norms and the projection around a model of one layer, whose embeddings and output head are the trunk's."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        config = Glm4MoeConfig(**mtp.config(layers=1, dense=0))
        made: Any = Glm4MoeForCausalLM
        self.model = made._from_config(config, experts_implementation="eager").float()
        self.enorm, self.hnorm = (
            type(self.model.model.norm)(config.hidden_size, config.rms_norm_eps) for _ in "eh"
        )
        self.eh_proj = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        for own, given in (
            (self.model.model.embed_tokens, trunk.model.embed_tokens),
            (self.model.lm_head, trunk.lm_head),
        ):
            own.weight = torch.nn.Parameter(given.weight.detach(), requires_grad=False)

    def forward(self, ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [rows, n - 1, entries] of the tokens after ``ids[:, 1:]``; ``hidden`` [rows, n, width] is the trunk's."""
        embedded = self.enorm(self.model.model.embed_tokens(ids[:, 1:]))
        joined = self.eh_proj(torch.cat([embedded, self.hnorm(hidden[:, :-1])], -1))
        output: torch.Tensor = self.model(
            inputs_embeds=joined, position_ids=positions[:, 1:], use_cache=False
        ).logits
        return output


def save(head: Head, path: Path) -> None:
    """Write the head as a checkpoint has it: ``model.layers.4.*``, bf16, an expert a tensor."""
    place = f"model.layers.{mtp.LAYERS}"
    with tempfile.TemporaryDirectory() as folder:
        head.model.to(torch.bfloat16).save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
    tensors = {
        name.replace("model.layers.0", place): tensor
        for name, tensor in stored.items()
        if ".layers.0." in name
    }
    tensors[f"{place}.shared_head.norm.weight"] = stored["model.norm.weight"]
    for name in ("enorm", "hnorm", "eh_proj"):
        tensors[f"{place}.{name}.weight"] = getattr(head, name).weight.detach().to(torch.bfloat16)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    """Run the whole recipe from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=mtp.HEAD)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        mtp.write_mtp(Path(folder), head=False)
        trunk: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    head = Head(trunk)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=arguments.steps, pct_start=0.1
    )
    started = time.monotonic()
    shares = []
    for step, (ids, positions) in enumerate(train.batches(tokenizer, train.read_texts(), arguments.steps), 1):
        with torch.no_grad():
            given = trunk.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            wanted = trunk.lm_head(given)[:, 1:]
        drafts = head(ids, given, positions)
        kept = positions[:, 1:] > 0  # a token that opens a text does not follow from the one before it
        loss = functional.kl_div(
            drafts[kept].log_softmax(-1), wanted[kept].log_softmax(-1), log_target=True, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shares.append(float((drafts.argmax(-1) == wanted.argmax(-1))[kept].float().mean()))
        if step % 25 == 0:
            recent = sum(shares[-25:]) / 25
            print(
                f"step {step} loss {loss:.3f} accepted {recent:.3f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
    save(head, arguments.output)


if __name__ == "__main__":
    main()
