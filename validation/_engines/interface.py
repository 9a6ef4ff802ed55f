"""Models that continue token ids, whatever engine runs them: what checks on behaviour need of reference and artifact.

Used inside workers only (``quantool.runtime.process.call``): an engine that aborts takes its process along. ``start`` opens
one by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quantool.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    ids: tuple[int, ...]
    """Generated token ids, without the one that ended it."""
    ended: int | None
    """The token that ended it; None when the budget did."""
    margins: tuple[float, ...] = ()
    """By how much (difference of logits) each token, the ending one too, was preferred to the second; empty where the
    engine does not tell."""


@dataclass(frozen=True)
class Scored:
    """What a model thinks of a continuation: log-probability (natural) of each of its tokens."""

    log_probs: tuple[float, ...]
    greedy: bool
    """Whether each of them is the most likely one."""


class Engine(Protocol):
    """A loaded model. Prompts are token ids of its own tokenizer, BOS included where wanted."""

    vocabulary: int
    context: int
    """Tokens that prompt and answer may have together: what was asked for, or less where the model reads less."""

    def generate(self, prompts: Sequence[Sequence[int]], budget: int) -> list[Answer]:
        """Greedy answers of at most ``budget`` tokens; ended by the tokens that the artifact itself says end a turn.

        Raises ConfigError for an empty prompt, one with an id outside the vocabulary, or one that leaves no room for
        ``budget`` tokens in ``context``.
        """

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Score each continuation after its prompt; neither may be empty, both must fit into ``context``.

        Continuations of the same prompt are cheapest when they follow each other. Raises ConfigError like ``generate``.
        """


def require_room(prompts: Sequence[Sequence[int]], more: Sequence[int], engine: Engine) -> None:
    """Raise ConfigError for a prompt that is empty, does not fit with ``more`` tokens each, or has an unknown id."""
    for number, (prompt, extra) in enumerate(zip(prompts, more, strict=True), 1):
        if not prompt or not extra:
            raise ConfigError(f"prompt {number} of {len(prompts)}: neither it nor what follows may be empty")
        if len(prompt) + extra > engine.context:
            raise ConfigError(
                f"prompt {number} of {len(prompts)} has {len(prompt)} tokens, which with {extra} more is over the"
                f" context of {engine.context}"
            )
        if not 0 <= min(prompt) <= max(prompt) < engine.vocabulary:
            raise ConfigError(
                f"prompt {number} of {len(prompts)} has ids from {min(prompt)} to {max(prompt)}, but the vocabulary"
                f" has {engine.vocabulary} entries"
            )
