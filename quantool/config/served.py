"""The configuration of how a model is used: sampling, and long contexts with the attention caches that people run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from quantool.config.section import Section


def _ascends(text: str) -> str:
    """``0 to 0.2``: the smaller number comes first."""
    low, high = map(float, text.split(" to "))
    if low >= high:
        raise ValueError(f"must ascend: {high:g} to {low:g}")
    return text


def _share(text: str) -> str:
    if float(text.split(" to ")[1]) > 1:
        raise ValueError("must end at 1 at most")
    return text


Range = Annotated[str, Field(pattern=r"^\d+(\.\d+)? to \d+(\.\d+)?$"), AfterValidator(_ascends)]
Share = Annotated[float, Field(ge=0, le=1)]


class Sampling(Section):
    """Recommended sampling, each a number or a range (``0 to 0.2``): written into every artifact and its card."""

    temperature: Annotated[float, Field(ge=0)] | Range | None = Field(
        default=None, description="Temperature; 0 is greedy."
    )
    top_k: Annotated[int, Field(ge=0)] | Range | None = Field(
        default=None, description="Most likely tokens to draw from; 0 is all."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | Annotated[Range, AfterValidator(_share)] | None = Field(
        default=None, description="Probability mass to draw from."
    )
    min_p: Share | Annotated[Range, AfterValidator(_share)] | None = Field(
        default=None, description="Least probability, as a share of the largest one."
    )
    repetition_penalty: Annotated[float, Field(gt=0)] | Range | None = Field(
        default=None, description="1 is none."
    )


Cache = Literal["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "fp8"]


class Long(Section):
    """Long windows: divergence by position and retrieval, with each type of attention cache."""

    lengths: tuple[Annotated[int, Field(ge=256)], ...] = Field(
        default=(4096, 16384),
        min_length=1,
        description="Tokens of a window; the second half of each is scored.",
    )
    kv: tuple[Cache, ...] = Field(
        default=("f16", "q8_0", "q4_0"),
        min_length=1,
        description="Types of the attention cache: those of llama.cpp, and fp8 for vLLM; f16 is what the others are "
        "compared with.",
    )
    windows: int = Field(default=1, ge=1, description="Windows of each length and corpus.")
    max_cache_kld: float | None = Field(
        default=0.02,
        ge=0,
        description="Upper limit of the mean KL divergence (nats) that a cache adds to that of f16; null: none.",
    )
    needle: bool = Field(
        default=True, description="Whether a sentence is hidden in text of each length and asked for, too."
    )
