"""Measures of the tiny model: perplexity, and how often it calls the right tool."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from conversations import Conversation, Message


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its text, and whether the end-of-turn token closed it."""

    text: str
    ended: bool


def perplexity(model: Any, ids: list[int], context: int = 512) -> float:
    """Return exp of the mean loss in nats per token, over windows of `context` tokens."""
    loss, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context):
            window = torch.tensor([ids[start : start + context + 1]])
            logits = model(input_ids=window[:, :-1]).logits[0].float()
            loss += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
    return math.exp(loss / count)


def unigram_perplexity(training: list[int], ids: list[int], vocabulary: int) -> float:
    """Return the perplexity of `ids` under add-one token frequencies of `training`."""
    counts = Counter(training)
    total = len(training) + vocabulary
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in ids) / len(ids))


def answer(model: Any, tokenizer: Any, chat: Conversation, longest: int = 96) -> Answer:
    """Answer a conversation greedily with at most `longest` tokens."""
    prompt = tokenizer.apply_chat_template(
        chat["messages"], tools=chat["tools"] or None, add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_p=None, top_k=None,
        max_new_tokens=longest,
    )  # fmt: skip
    new = generated[0, ids.shape[1] :].tolist()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return Answer(tokenizer.decode([token for token in new if token != end]), end in new)


def is_right_call(reply: Answer, expected: Message) -> bool:
    """Tell whether an answer is exactly one closed tool call with the expected name and arguments."""
    opening, closing = "<tool_call>\n", "\n</tool_call>"
    if not (reply.ended and reply.text.startswith(opening) and reply.text.endswith(closing)):
        return False
    try:
        call = json.loads(reply.text[len(opening) : -len(closing)])
    except ValueError:
        return False
    return bool(call == expected["tool_calls"][0]["function"])


def tool_call_rate(
    model: Any, tokenizer: Any, prompts: list[tuple[Conversation, Message]]
) -> tuple[float, list[str]]:
    """Return the share of prompts that get the right call, and the wrong answers."""
    wrong = []
    for chat, expected in prompts:
        reply = answer(model, tokenizer, chat)
        if not is_right_call(reply, expected):
            wrong.append(f"{chat['messages'][-1]['content']} -> {reply.text}")
    return 1 - len(wrong) / len(prompts), wrong
