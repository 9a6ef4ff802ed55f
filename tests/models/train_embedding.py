"""Train the tiny embedding model of the tests.

    OMP_WAIT_POLICY=PASSIVE python tests/models/train_embedding.py --output tests/models/tiny-embedding

A Qwen3 of two layers and 2.6 million parameters that begins with the embeddings and the first two layers of the tiny chat
model, trained with InfoNCE (van den Oord et al., arXiv 1807.03748) to tell the second half of a docstring from those of the
other docstrings of a batch. Pooling, normalisation and the token that ends a text are those of Qwen3-Embedding: last
token, cosine, ``<|endoftext|>`` appended by the tokenizer. The files are those that sentence-transformers writes. Seeds
are fixed; 400 steps take two to three minutes of processor time.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import docstrings
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

HERE = Path(__file__).resolve().parent
CHAT = HERE / "tiny-chat"
SEED = 20240607
STEPS = 400
PAIRS = 32  # of a step
TOKENS = 32  # of a half at most
RATE = 2e-3
WARMUP = 40  # steps
TEMPERATURE = 0.05
SHORTEST = 120  # characters of a docstring that can be halved
END = "<|endoftext|>"
PROMPTS = {"query": "Find the text that this is about: ", "document": ""}


def make_tokenizer() -> Any:
    """The chat model's tokenizer, which appends ``<|endoftext|>`` as Qwen3-Embedding's does."""
    saved = json.loads((CHAT / "tokenizer.json").read_text(encoding="utf-8"))
    number = next(token["id"] for token in saved["added_tokens"] if token["content"] == END)
    end = {"SpecialToken": {"id": END, "type_id": 0}}
    saved["post_processor"] |= {
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 0}}, end],
        "special_tokens": {END: {"id": END, "ids": [number], "tokens": [END]}},
    }
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)),
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: Any) -> Any:
    """Two layers of Qwen3 with the weights of the chat model as far as it has them."""
    chat = AutoModelForCausalLM.from_pretrained(CHAT, dtype="float32").model
    settings = chat.config
    model = Qwen3Model(
        Qwen3Config(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_key_value_heads,
            head_dim=settings.head_dim,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    known = {
        name: tensor for name, tensor in chat.state_dict().items() if ".2." not in name and ".3." not in name
    }
    model.load_state_dict(known, strict=False)  # Qwen3's norms of queries and keys are new
    return model


def halves(*, held_out: bool) -> list[tuple[str, str]]:
    """Both halves of every docstring of one side that is long enough, cut between words."""
    texts = [item.text for item in docstrings.collect() if item.held_out is held_out]
    cuts = [(text, text.find(" ", len(text) // 2)) for text in texts if len(text) >= SHORTEST]
    return [(text[:middle][-400:], text[middle:].strip()[:400]) for text, middle in cuts if middle > 0]


def embed(model: Any, tokenizer: Any, texts: list[str], tokens: int = TOKENS) -> torch.Tensor:
    """Vectors [texts, width] of length 1: the state of the last token."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=tokens, return_tensors="pt")
    states = model(**batch).last_hidden_state[:, -1]
    return torch.nn.functional.normalize(states.float(), dim=-1)


def train(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], steps: int) -> float:
    """InfoNCE both ways; the mean loss of the last 50 steps."""
    rng, losses = random.Random(SEED), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=WARMUP / steps
    )
    model.train()
    for step in range(steps):
        chosen = rng.sample(pairs, PAIRS)
        left = embed(model, tokenizer, [pair[0] for pair in chosen])
        right = embed(model, tokenizer, [pair[1] for pair in chosen])
        logits = left @ right.T / TEMPERATURE
        wanted = torch.arange(PAIRS)
        loss = (
            torch.nn.functional.cross_entropy(logits, wanted)
            + torch.nn.functional.cross_entropy(logits.T, wanted)
        ) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 25 == 24:
            print(
                f"step {step + 1}: loss {sum(losses[-25:]) / 25:.3f}, {time.process_time():.0f} s", flush=True
            )
    return sum(losses[-50:]) / len(losses[-50:])


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """Write bf16 weights and the files of sentence-transformers, as Qwen3-Embedding has them."""
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    write_json(output / "config.json", config | {"architectures": ["Qwen3ForCausalLM"]})
    parts = ("Transformer", "Pooling", "Normalize")
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{part}" if number else "",
            "type": f"sentence_transformers.models.{part}",
        }
        for number, part in enumerate(parts)
    ]
    write_json(output / "modules.json", modules)
    (output / "1_Pooling").mkdir(exist_ok=True)
    names = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    pooling = {f"pooling_mode_{name}": name == "lasttoken" for name in names}
    write_json(
        output / "1_Pooling/config.json",
        {"word_embedding_dimension": model.config.hidden_size, **pooling, "include_prompt": True},
    )
    write_json(
        output / "config_sentence_transformers.json",
        {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    card = "---\nlicense: apache-2.0\nlanguage: en\npipeline_tag: feature-extraction\ntags:\n- sentence-transformers\n---\n"
    (output / "README.md").write_text(
        card + "\nA tiny embedding model for tests; see ../README.md.\n", encoding="utf-8"
    )


def write_json(path: Path, value: Any) -> None:
    """JSON as these libraries write it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def held_out_recall(model: Any, tokenizer: Any) -> tuple[int, int]:
    """Of how many held-out docstrings the second half is the nearest one to the first, and of how many in all."""
    pairs = halves(held_out=True)
    model.eval()
    with torch.no_grad():
        left = embed(model, tokenizer, [pair[0] for pair in pairs], 256)
        right = embed(model, tokenizer, [pair[1] for pair in pairs], 256)
    nearest = (left @ right.T).argmax(1)
    return int((nearest == torch.arange(len(pairs))).sum()), len(pairs)


def main() -> None:
    """Train, save and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = new_model(tokenizer)
    loss = train(model, tokenizer, halves(held_out=False), arguments.steps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    right, total = held_out_recall(model, tokenizer)
    save(model, tokenizer, arguments.output)
    print(
        f"loss {loss:.3f}; nearest of {total} held-out docstrings right: {right}; {time.process_time():.0f} s of processor"
    )


if __name__ == "__main__":
    main()
