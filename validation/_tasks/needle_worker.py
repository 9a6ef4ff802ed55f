"""The worker that hides a sentence in long text and asks a model for it.

After G. Kamradt, "Needle in a haystack: pressure testing LLMs", 2023 (github.com/gkamradt/LLMTest_NeedleInAHaystack), but
with a code of letters and digits in the place of a fact in English: it says the same in every language, cannot be guessed or
known from training, and an answer either holds it or does not.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantool.config.schema import Corpus
from quantool.errors import ConfigError
from quantool.runtime.worker import Report, preloaded
from quantool.texts import corpus
from quantool.validation._cache.questions import load_engine
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.hf_tokenizer import beginning, load_tokenizer

ANSWER = 48
"""Tokens of an answer."""
AT_ONCE = 4  # prompts between two reports
LETTERS, DIGITS = 3, 6
CHARACTERS = 32  # of text for each token wanted, more than any text has


@dataclass(frozen=True)
class Hidden:
    """One cell of the grid: a sentence that says ``value`` of ``name``, and what the model made of it."""

    length: int
    depth: float
    name: str
    value: str
    repeats: int
    """How many times the text was needed to be so long."""
    answer: str = ""
    found: bool = False


@dataclass(frozen=True)
class Haystack:
    """Text to hide in, and a tokenizer to measure it with."""

    tokenizer: Any
    text: str
    chat: bool

    def prompt(self, cell: Hidden) -> tuple[list[int], int]:
        """Ids of text and question, as many as fit with an answer into the cell's length; and how often the text stands in them.

        Raises ConfigError when the question alone does not fit.
        """
        room = cell.length - ANSWER
        ids = self.tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]
        repeats = -(-room // max(1, len(ids)))
        whole = "\n\n".join([self.text] * repeats)
        ids = self.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        count = min(room, len(ids))
        while count > 0:
            kept = self.tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False).rstrip("\ufffd")
            prompt = self._question(_with(kept, cell))
            if len(prompt) <= room:
                return prompt, max(1, -(-len(kept) // (len(self.text) + 2)))
            count -= len(prompt) - room
        raise ConfigError(
            f"validation.needle.lengths: {cell.length} tokens have no room for a text beside question and answer",
            hint="give longer ones",
        )

    def _question(self, text: str) -> list[int]:
        ids: list[int]
        if not self.chat:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return [*beginning(self.tokenizer), *ids]
        messages = [{"role": "user", "content": f"{text} ?"}]
        rendered = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        ids = self.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)


def _with(text: str, cell: Hidden) -> str:
    """The text with the sentence at the space next to the cell's depth, and the beginning of the same sentence at its end."""
    aim = round(cell.depth * len(text))
    spaces = [place.start() for place in re.finditer(r"\s", text)] if 0 < aim < len(text) else []
    place = min(spaces, key=lambda space: abs(space - aim), default=aim)
    return f"{text[:place]}\nCode {cell.name} = {cell.value}.\n{text[place:].lstrip()}\n\nCode {cell.name} ="


def cells(lengths: list[int], depths: list[float], seed: int) -> Iterator[Hidden]:
    """The grid, with a name and a code of its own for every cell; no digit is twice in a code, so that copying it is simple."""
    dice = random.Random(seed)  # noqa: S311
    names = dice.sample(
        [*itertools.product(string.ascii_uppercase, repeat=LETTERS)], len(lengths) * len(depths)
    )
    for (length, depth), name in zip(itertools.product(lengths, depths), names, strict=True):
        yield Hidden(length, depth, "".join(name), "".join(dice.sample(string.digits, DIGITS)), 1)


@preloaded("transformers")
def ask(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: hide a sentence at each of ``depths`` of texts of ``lengths`` tokens and ask for it.

    Result: ``failure``, or empty; ``cells`` (fields of ``Hidden``) by length and depth; ``chat``, whether the question went
    through the template.
    """
    tokenizer = load_tokenizer(request["tokenizer"], trust_remote_code=request["trust_remote_code"])
    lengths, depths = sorted(set(request["lengths"])), sorted(set(request["depths"]))
    haystack = Haystack(tokenizer, _text(request, max(lengths)), bool(tokenizer.chat_template))
    grid = list(cells(lengths, depths, request["seed"]))
    prompts = [haystack.prompt(cell) for cell in grid]
    answers: list[str] = []
    try:
        with load_engine(request, max(lengths)) as engine:
            for start in range(0, len(grid), AT_ONCE):
                part = [ids for ids, _ in prompts[start : start + AT_ONCE]]
                answers += [tokenizer.decode(answer.ids) for answer in engine.generate(part, ANSWER)]
                done = sum(len(ids) for ids, _ in prompts[: len(answers)])
                report(done, sum(len(ids) for ids, _ in prompts))
    except Unsound as outcome:
        return {"failure": str(outcome)}
    except ConfigError as error:  # an id that the model does not have
        return {"failure": error.message}
    answered = [
        Hidden(cell.length, cell.depth, cell.name, cell.value, repeats, answer, holds(answer, cell.value))
        for cell, (_, repeats), answer in zip(grid, prompts, answers, strict=True)
    ]
    return {"failure": "", "cells": [asdict(cell) for cell in answered], "chat": haystack.chat}


def holds(answer: str, code: str) -> bool:
    """Whether the answer says the code, in groups of digits or as one number; not as a part of a longer one."""
    joined = re.sub(r"(?<=\d)[ \u00a0\u202f.,'_-](?=\d)", "", answer)
    return re.search(rf"(?<!\d){code}(?!\d)", joined) is not None


def _text(request: dict[str, Any], tokens: int) -> str:
    """The text of the corpus as far as it can be needed; of conversations what was said in them."""
    origin = Corpus.model_validate(request["corpus"])
    cache_dir = request["cache_dir"] and Path(request["cache_dir"])
    documents = corpus.read(origin, characters=tokens * CHARACTERS, cache_dir=cache_dir)
    parts = [
        document.text or "\n".join(str(message.get("content") or "") for message in document.messages)
        for document in documents
    ]
    text = "\n\n".join(part.strip() for part in parts if part.strip())
    if not text:
        raise ConfigError(f"corpus {origin.name!r} has no text to hide a sentence in")
    return text
