"""Whether the artifact answers as the reference does: greedy answers to the same prompts, side by side.

Answers of a sound artifact part from the reference's after some tokens; at 4 bits most long ones do. So only this is
judged, and each share may miss its gate by two standard errors of a binomial:

- ``first_token``: the share of answers that begin with the reference's token is held to ``min_same_top_p`` of the level.
  Prompts to which the reference itself has two first tokens almost as likely say nothing and are left out (``tie``).
- ``ends``: an answer that goes on behind a token which ends the source's answers, or stops at an ordinary token, is
  wrong at any level: no rounding does that.
- ``stops``: an answer ends within the budget on both sides or neither. Single ones may differ either way; that one side
  stops and the other does not again and again is found by a sign test.
- ``tool_calls``: where the reference calls a function, the artifact calls the same, in as many cases as
  ``min_same_top_p`` asks for.

How long answers agree, and an example of where they part, is for the record. See ``_chat.answers`` for what is asked and what
it costs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from quantool.config.schema import Config
from quantool.plugins.contract import Case, check
from quantool.plugins.keys import Depends
from quantool.records import Finding, Gates, Source
from quantool.runtime.progress import Progress
from quantool.tasks import TaskKind
from quantool.texts import inputs
from quantool.validation._cache.keys import ANSWERS, REFERENCE_ANSWERS
from quantool.validation._cache.questions import ask_artifact, ask_reference
from quantool.validation._chat.answers import (
    ChatAnswer,
    Prompt,
    Prompts,
    prompts_of,
    questions_of,
    read_answers,
)
from quantool.validation._chat.tool_calls import calls
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.vocabulary import TOKENIZER
from quantool.validation._findings.builder import FindingBuilder
from quantool.validation._findings.limits import Gate, gated
from quantool.validation._findings.statistics import Estimate

NAME = "behaviour"
BUILD = FindingBuilder(NAME)
TIE = 0.25
"""Difference of logits that bfloat16 does not resolve: 2^-6 (``_reference.LOGIT_TOLERANCE``) of a logit of 16."""
CHANCE = 0.005
"""A one-sided split of stops that is less likely than this is not chance: 8 of 8."""
SHOWN = 90  # characters of an example
USUAL = 40
"""Prompts of a model with tools and one corpus of conversations, for the plan's estimate."""
PROMPT_TOKENS = 200


@dataclass(frozen=True)
class AnswerPair:
    """The two answers to one prompt, as far as they go before the token that ends a turn."""

    prompt: Prompt
    reference: ChatAnswer
    artifact: ChatAnswer
    ends: frozenset[int]
    """Tokens that end a turn."""

    def turn(self, answer: ChatAnswer) -> tuple[int, ...]:
        """The ids of an answer with the one that ended it, or would end it in the source."""
        whole = answer.ids if answer.ended is None else (*answer.ids, answer.ended)
        last = next((place for place, token in enumerate(whole) if token in self.ends), len(whole))
        return whole[: last + 1]

    def common(self) -> int:
        """Tokens that both begin with."""
        pairs = zip(self.turn(self.reference), self.turn(self.artifact), strict=False)
        return next(
            (place for place, (theirs, ours) in enumerate(pairs) if theirs != ours),
            min(len(self.turn(self.reference)), len(self.turn(self.artifact))),
        )

    def share(self) -> float:
        """The common tokens over those of the longer answer."""
        return self.common() / max(len(self.turn(self.reference)), len(self.turn(self.artifact)))

    def explain(self) -> str:
        """The prompt and both answers, cut."""
        return (
            f"to {_cut(self.prompt.question)!r} the reference says {_cut(self.reference.text)!r}, "
            f"this {_cut(self.artifact.text)!r}"
        )


def computes(config: Config, source: Source, /) -> tuple[int, int]:
    """As many prompts as there usually are, none for a model without a template."""
    asked = USUAL if source.facts.chat_template is not None else 0
    return asked * PROMPT_TOKENS, asked * config.validation.behaviour.max_new_tokens


def compare(case: Case, progress: Progress, /) -> None:
    """Ask the reference."""
    if case.source.facts.chat_template is not None and (prompts := prompts_of(case)).prompts:
        ask_reference(case, questions_of(case, prompts), progress)


@check(
    NAME,
    compare=compare,
    depends=TOKENIZER
    | ANSWERS
    | REFERENCE_ANSWERS
    | Depends(
        fields=("validation.behaviour.max_new_tokens",),
        inputs=(inputs.prompts, inputs.held_out),
        gates=True,
    ),
    computes=computes,
    loads_reference=True,
    holds_model=True,
    tasks=(TaskKind.GENERATION,),
)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Greedy answers beside the reference's: first tokens, where they stop, tool calls."""
    if case.source.facts.chat_template is None:
        return [BUILD.skip("answers", "the source has no chat template, so there is nothing to ask it")]
    prompts = prompts_of(case)
    if not prompts.prompts:
        return [BUILD.skip("answers", "; ".join(prompts.notes))]
    questions = questions_of(case, prompts)
    expected = read_answers(ask_reference(case, questions, progress))
    try:
        found = read_answers(ask_artifact(case, questions, progress))
    except Unsound as reason:
        return [BUILD.fail("answers", str(reason))]
    ends = prompts.all_ends()
    pairs = [
        AnswerPair(prompt, theirs, ours, ends)
        for prompt, theirs, ours in zip(prompts.prompts, expected, found, strict=True)
    ]
    gate = case.gates.min_same_top_p
    return [
        _judge_first(pairs, case.gates),
        _judge_ends(pairs, prompts),
        _judge_stops(pairs, prompts, gate),
        _judge_calls(pairs, gate),
        _common_prefix(pairs, prompts),
    ]


def tie(gates: Gates) -> float:
    """Difference of two logits below which either may come first: ``TIE``, or what the level's divergence makes of it.

    To second order a KL divergence is half the variance of the errors of the logits (in nats, under the reference's
    distribution); the difference of two of them has twice that variance, so a standard deviation of 2 sqrt(KLD).
    """
    return max(TIE, 2 * math.sqrt(gates.max_mean_kld or 0))


def _judge_first(pairs: Sequence[AnswerPair], gates: Gates) -> Finding:
    """First tokens that are the reference's."""
    least = tie(gates)
    clear = [pair for pair in pairs if not pair.reference.margins or pair.reference.margins[0] >= least]
    same = [pair for pair in clear if pair.common()]
    detail = f"{len(same)} of {len(clear)} answers begin with the reference's token"
    if len(clear) < len(pairs):
        detail += f"; {len(pairs) - len(clear)} left out, where its own first two tokens are less than {least:.2g} apart"
    return _share("first_token", len(same), len(clear), gates.min_same_top_p, detail)


def _share(metric: str, hits: int, total: int, gate: float | None, detail: str) -> Finding:
    """The finding of a share that is held to a gate, less two standard errors that a share as large as it has."""
    if not total:
        return BUILD.skip(metric, detail)
    expected = hits / total if gate is None else gate
    estimate = Estimate(hits / total, math.sqrt(expected * (1 - expected) / total))
    return gated(Gate(metric, estimate, gate, -1, detail), None, NAME)


def _judge_ends(pairs: Sequence[AnswerPair], prompts: Prompts) -> Finding:
    """No answer goes on behind a token that ends the source's, and none stops at an ordinary one."""
    passed_over = Counter(
        token for pair in pairs for token in set(pair.artifact.ids) if token in prompts.ends
    )
    ended = Counter(pair.artifact.ended for pair in pairs if pair.artifact.ended is not None)
    known = prompts.all_ends() | prompts.special.keys()
    foreign = {token: count for token, count in ended.items() if token not in known}
    wrong = [
        f"it says {_shown(token, prompts)} and goes on in {count} of {len(pairs)} answers, where the source ends"
        for token, count in passed_over.items()
    ]
    wrong += [
        f"it stops at {_shown(token, prompts)}, an ordinary token, in {count} of {len(pairs)} answers"
        for token, count in foreign.items()
    ]
    notes = [
        f"it stops at {_shown(token, prompts)}, which the source does not name, in {count} answers"
        for token, count in ended.items()
        if token in prompts.special and token not in prompts.all_ends()
    ]
    closed = sum(prompts.turn_end in pair.turn(pair.reference) for pair in pairs)
    if prompts.turn_end is not None and prompts.turn_end not in prompts.ends and closed:
        own = "stops" if prompts.turn_end in ended else "does not stop either"
        notes.append(
            f"defect of the source: its configurations do not name {_shown(prompts.turn_end, prompts)}, with which it "
            f"ends {closed} of {len(pairs)} answers; this artifact {own} there"
        )
    return BUILD.fact(
        "ends",
        ", ".join(_shown(token, prompts) for token in sorted(ended)) or "none",
        "; ".join(wrong),
        ", ".join(_shown(token, prompts) for token in sorted(prompts.all_ends())),
        note="; ".join(notes),
    )


def _shown(token: int, prompts: Prompts) -> str:
    return f"{token} {prompts.special[token]}" if token in prompts.special else str(token)


def _judge_stops(pairs: Sequence[AnswerPair], prompts: Prompts, gate: float | None) -> Finding:
    """Answers that stop within the budget on one side only; REGRESSION when nearly all of them are on the same side."""
    both = [
        (_stopped(pair, pair.reference, prompts), _stopped(pair, pair.artifact, prompts)) for pair in pairs
    ]
    by_reference, by_artifact = (sum(stopped) for stopped in zip(*both, strict=True))
    if not by_reference and not by_artifact:
        return BUILD.skip(
            "stops",
            "no answer of either side ends within the budget; raise validation.behaviour.max_new_tokens",
        )
    missing, excess = both.count((True, False)), both.count((False, True))
    detail = f"of {len(pairs)} answers {by_reference} end within the budget, here {by_artifact}"
    if missing or excess:
        detail += f"; {missing} end in the reference only, {excess} here only"
    more = max(missing, excess)
    chance = sum(math.comb(missing + excess, count) for count in range(more, missing + excess + 1)) / 2 ** (
        missing + excess
    )
    tolerated = gate is None or abs(missing - excess) <= (1 - gate) * len(pairs)
    problem = ""
    if more > 0 and chance < CHANCE and not tolerated:
        side = (
            "does not end where the reference does"
            if missing > excess
            else "ends where the reference goes on"
        )
        problem = f"this artifact {side}, again and again (by chance with a probability of {chance:.1g})"
    return BUILD.fact("stops", by_artifact / len(pairs), problem, by_reference / len(pairs), note=detail)


def _stopped(pair: AnswerPair, answer: ChatAnswer, prompts: Prompts) -> bool:
    """Whether an answer ended; a source that does not stop where its own template ends a turn did so nevertheless."""
    defect = prompts.turn_end if prompts.turn_end not in prompts.ends else None
    return answer.ended is not None or (defect is not None and defect in pair.turn(answer))


def _judge_calls(pairs: Sequence[AnswerPair], gate: float | None) -> Finding:
    """Tool calls of the reference that the artifact makes too."""
    read = [
        (pair, calls(pair.reference.text), calls(pair.artifact.text)) for pair in pairs if pair.prompt.tools
    ]
    called = [(pair, expected[0], answered[:1]) for pair, expected, answered in read if expected]
    if not called:
        detail = (
            f"the reference calls no function in {len(read)} prompts with tools, or in a format that is not known"
            if read
            else "there are no prompts with tools for this template"
        )
        return _share("tool_calls", 0, 0, gate, detail)
    same = [
        (expected, answered[0])
        for _, expected, answered in called
        if answered and answered[0].name == expected.name
    ]
    exact = sum(expected.arguments == answered.arguments for expected, answered in same)
    detail = f"{len(same)} of {len(called)} calls name the reference's function, {exact} with its arguments"
    more = sum(bool(answered) and not expected for _, expected, answered in read)
    if more:
        detail += f"; {more} calls where the reference makes none"
    wrong = [pair for pair, expected, answered in called if not answered or answered[0].name != expected.name]
    if wrong:
        detail += f"; {min(wrong, key=lambda pair: len(pair.prompt.question)).explain()}"
    return _share("tool_calls", len(same), len(called), gate, detail)


def _common_prefix(pairs: Sequence[AnswerPair], prompts: Prompts) -> Finding:
    """How long answers agree, for the record; with the answer that parts first."""
    tokens = sum(pair.common() for pair in pairs) / len(pairs)
    share = sum(pair.share() for pair in pairs) / len(pairs)
    same = sum(pair.share() == 1 for pair in pairs)
    detail = f"{tokens:.1f} tokens on average; {same} of {len(pairs)} answers are the same to the end"
    different = [pair for pair in pairs if pair.share() < 1]
    if different:
        first = min(different, key=lambda pair: (pair.common(), len(pair.prompt.question)))
        detail += f"; after {first.common()} tokens: {first.explain()}"
    return BUILD.fact("common_prefix", share, note="; ".join((detail, *prompts.notes)))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
