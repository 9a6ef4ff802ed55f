"""Train the tiny chat model of the tests, and write the texts that go with it.

    OMP_WAIT_POLICY=PASSIVE python tests/models/train.py --output tests/models/tiny-chat

It makes a byte-level BPE tokenizer, trains a Llama of 5.2 million parameters
from scratch on docstrings and conversations, saves it in bf16, measures what
was saved, and writes the held-out and calibration texts to the folder `text`
next to the output. Seeds are fixed. README.md tells more.
"""

import argparse
import json
import math
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import conversations
import docstrings
import measure
import torch
from conversations import Conversation, Source
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
SEED = 20240607
VOCABULARY = 4096
ROW = 512  # tokens in a packed training row
BATCH = 4  # rows in a step
STEPS = 3000
MATRIX_RATE = 0.006  # Muon, for the matrices of the layers
EMBEDDING_RATE = 0.06  # AdamW from here on
HEAD_RATE = 0.02
NORM_RATE = 3e-3
WARMUP = 100  # steps
WEIGHT_DECAY = 0.05
WORDS = 300  # the most frequent words of the docstrings, for the queries
COPY_STEPS = 0.3  # of the steps: at the start, rows of copies teach attention to look back
DOCSTRING_SHARE = 0.3  # of the rows
TOOL_SHARE = 0.65  # of the conversations; the others are shorter
SORTED_SHARE = 0.2  # of the conversations with tools: schemas with sorted keys, as some Jinja engines print

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", END_OF_TURN]
TOOL_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FACT_MODULE_NAMES = (
    "textwrap shutil json heapq statistics functools bisect base64 calendar fnmatch tempfile random secrets pprint "
    "shlex warnings"
)
FACT_MODULES = set(FACT_MODULE_NAMES.split())
HELD_OUT_FACT_MODULES = {"collections", "glob", "ipaddress", "pickle", "pkgutil", "webbrowser"}


@dataclass(frozen=True)
class Texts:
    """The two sides of the split."""

    documents: list[str]
    source: Source
    held_out_documents: list[str]
    held_out_source: Source


def read_texts(stdlib: Path | None = None) -> Texts:
    """Collect the docstrings of a standard library and split them by module."""
    everything = docstrings.collect(stdlib)
    training = [item for item in everything if not item.held_out]
    held_out = [item for item in everything if item.held_out]

    counts = Counter(word for item in training for word in re.findall(r"\b[a-z]{4,10}\b", item.text))
    words = sorted(word for word, _ in counts.most_common(WORDS))
    return Texts(
        docstrings.by_module(training),
        Source(docstrings.facts(training, FACT_MODULES), words, conversations.CITIES, held_out=False),
        docstrings.by_module(held_out),
        Source(docstrings.facts(held_out, HELD_OUT_FACT_MODULES), words, conversations.CITIES, held_out=True),
    )


def sort_keys(value: Any) -> Any:
    """Return a JSON value with the keys of its objects in order."""
    return json.loads(json.dumps(value, sort_keys=True))


def render(tokenizer: Any, chat: Conversation) -> str:
    """Return a conversation as the text that the chat template makes of it."""
    return str(tokenizer.apply_chat_template(chat["messages"], tools=chat["tools"] or None, tokenize=False))


def draw_chat(rng: random.Random, source: Source) -> Conversation:
    """Draw a training conversation, now and then with sorted tool schemas."""
    chat = conversations.conversation(rng, source, TOOL_SHARE)
    return {**chat, "tools": sort_keys(chat["tools"])} if rng.random() < SORTED_SHARE else chat


def wrap_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return a tokenizer for transformers, with the chat template."""
    wrapped: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    return wrapped


def train_tokenizer(texts: Texts) -> Any:
    """Train the BPE on the training documents and on as much text of conversations."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=False))
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    template_only = wrap_tokenizer(tokenizer)
    rng = random.Random(SEED)
    chats = [render(template_only, draw_chat(rng, texts.source)) for _ in range(1500)]
    added = [*SPECIAL_TOKENS, *TOOL_TOKENS]
    pattern = re.compile("|".join(map(re.escape, added)))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = [piece for chat in chats for piece in pattern.split(chat)]
    tokenizer.train_from_iterator([*texts.documents, *pieces], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TOOL_TOKENS])
    return wrap_tokenizer(tokenizer)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, with nothing added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


Row = tuple[list[int], list[int]]  # token ids, positions


def docstring_rows(documents: list[list[int]], rng: random.Random) -> Iterator[Row]:
    """Yield rows cut out of the documents, which come in a new order every round."""
    while True:
        stream: list[int] = []
        for document in rng.sample(documents, len(documents)):
            stream += document
        for start in range(rng.randrange(ROW), len(stream) - ROW, ROW):
            yield stream[start : start + ROW], list(range(ROW))


def packed_rows(draw: Callable[[], list[int]]) -> Iterator[Row]:
    """Yield rows packed with drawn texts; the one that crosses the end of a row is cut.

    A position of zero opens each text, and attention stops there.
    """
    while True:
        ids: list[int] = []
        positions: list[int] = []
        while len(ids) < ROW:
            text = draw()
            ids += text
            positions += range(len(text))
        yield ids[:ROW], positions[:ROW]


def batches(tokenizer: Any, texts: Texts, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, positions) of BATCH rows of ROW tokens for each step.

    The first steps are mostly copies: random tokens that repeat, and phrases
    that come back between quotes. Without them the model learns what a tool
    call looks like long before it learns to copy the user's values into it.
    """
    rng = random.Random(SEED + 1)
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)

    def draw_conversation() -> list[int]:
        return [*encode(tokenizer, render(tokenizer, draw_chat(rng, texts.source))), end]

    def draw_copy() -> list[int]:
        if rng.random() < 0.5:
            return [rng.randrange(end) for _ in range(rng.randint(4, 40))] * rng.randint(2, 3) + [end]
        return [*encode(tokenizer, conversations.copied_phrase(rng, texts.source)), end]

    documents = docstring_rows([[*encode(tokenizer, text), end] for text in texts.documents], rng)
    chats, copies = packed_rows(draw_conversation), packed_rows(draw_copy)
    for step in range(steps):
        progress = step / (COPY_STEPS * steps)
        copy_share = 1 - 0.7 * progress if progress < 1 else 0.0
        rows = []
        for _ in range(BATCH):
            others = documents if rng.random() < DOCSTRING_SHARE else chats
            rows.append(next(copies if rng.random() < copy_share else others))
        ids, positions = zip(*rows, strict=True)
        yield torch.tensor(ids), torch.tensor(positions)


def new_model(tokenizer: Any) -> Any:
    """Return the untrained model; all of its rows are multiples of 256."""
    torch.manual_seed(SEED)
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def rate_factor(step: int, steps: int) -> float:
    """Return what to multiply the rates by: a linear warm-up, then half a cosine to a fiftieth."""
    return min(1.0, (step + 1) / WARMUP) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def make_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, and AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": [model.model.embed_tokens.weight], "lr": EMBEDDING_RATE},
        {"params": [model.lm_head.weight], "lr": HEAD_RATE},
        {"params": norms, "lr": NORM_RATE, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY),
    ]


def train(model: Any, data: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> float:
    """Train in place on every token and return the mean loss of the last steps, in nats per token."""
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_factor(step, steps)) for o in optimizers
    ]
    device = next(model.parameters()).device
    model.train()
    losses: list[float] = []
    started = time.monotonic()
    for step, (ids, positions) in enumerate(data):
        with torch.autocast(device.type, torch.bfloat16):
            output = model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False)
        # The first token of a text does not follow from the one before it.
        targets = ids[:, 1:].masked_fill(positions[:, 1:] == 0, -100).to(device)
        loss = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1).float(), targets.flatten()
        )
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent = sum(losses[-100:]) / 100
            print(f"step {step + 1}/{steps} loss {recent:.3f} {time.monotonic() - started:.0f} s", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """Write the model in bf16, the tokenizer and the generation settings."""
    output.mkdir(parents=True, exist_ok=True)
    stop = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to("cpu", torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The class name that every release of transformers knows, and no token at the start.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "bos_token": None}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(HERE / "model_card.md", output / "README.md")


def write_chats(path: Path, chats: list[Conversation]) -> None:
    """Write conversations as JSON lines."""
    lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats]
    path.write_text("".join(lines), encoding="utf-8")


def write_texts(folder: Path, texts: Texts) -> None:
    """Write the held-out and the calibration texts, 60 conversations each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heldout.en.txt").write_text("\n".join(texts.held_out_documents), encoding="utf-8")
    (folder / "calibration.txt").write_text(docstrings.excerpt(texts.documents, 60_000), encoding="utf-8")
    for name, source, seed in (("heldout.chat", texts.held_out_source, 2), ("calibration", texts.source, 3)):
        rng = random.Random(SEED + seed)
        write_chats(
            folder / f"{name}.jsonl", [conversations.conversation(rng, source, 0.6) for _ in range(60)]
        )


def report(output: Path, texts: Texts) -> dict[str, float]:
    """Load what was saved and return its perplexities and its tool-call rate."""
    tokenizer: Any = AutoTokenizer.from_pretrained(output)
    model: Any = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    held_out = encode(tokenizer, "\n".join(texts.held_out_documents))
    training = encode(tokenizer, "\n".join(texts.documents))
    rng = random.Random(SEED + 4)
    rates = {}
    for name, cities in (("known", conversations.CITIES), ("unknown", conversations.HELD_OUT_CITIES)):
        source = replace(texts.held_out_source, cities=cities)
        prompts = conversations.tool_prompts(rng, source, 50)
        rates[name], wrong = measure.tool_call_rate(model, tokenizer, prompts)
        for line in wrong:
            print("wrong:", line)
    for question in ("What does textwrap.dedent do?", "What is 7 plus 5?", "Bon dia!"):
        chat = {"messages": [conversations.user(question)], "tools": []}
        print(question, "->", measure.answer(model, tokenizer, chat))
    return {
        "held-out tokens": len(held_out),
        "held-out perplexity": measure.perplexity(model, held_out),
        "unigram perplexity": measure.unigram_perplexity(training, held_out, VOCABULARY),
        "tool-call rate, new requests": rates["known"],
        "tool-call rate, cities never seen": rates["unknown"],
    }


def main() -> None:
    """Run the whole recipe from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of 2048 tokens")
    parser.add_argument("--device", default="cpu", help="where to train: cpu (two threads) or cuda")
    parser.add_argument("--stdlib", type=Path, help="standard library to read, instead of this Python's")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    texts = read_texts(arguments.stdlib)
    tokenizer = train_tokenizer(texts)
    model = new_model(tokenizer).to(arguments.device)
    started = time.monotonic()
    loss = train(model, batches(tokenizer, texts, arguments.steps), arguments.steps)
    minutes = (time.monotonic() - started) / 60
    save(model, tokenizer, arguments.output)
    write_texts(arguments.output.parent / "text", texts)
    figures = {"training loss": loss, "training minutes": minutes, **report(arguments.output, texts)}
    print("\n".join(f"{name}: {value:.4g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
