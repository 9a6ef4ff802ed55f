"""What a fitted file is to keep: a size, the memory that it runs in, bits a weight, a divergence; or a recipe to follow."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from quantool.footprint import running_bytes
from quantool.methods._fit.amounts import bytes_of
from quantool.plugins.contract import Options
from quantool.records import ModelFacts

CONTEXT = 8192
"""Tokens that a file for some memory has to have room for, where nobody says."""
GOALS = ("size", "vram", "bpw", "kld", "recipe")


class FitTarget(Options):
    """One entry of ``fit``: exactly one of size, vram, bpw, kld and recipe."""

    size: str | None = Field(None, description="Bytes of the file, e.g. 24GB or 22GiB.")
    vram: str | None = Field(
        None, description="Memory for weights, attention cache and compute buffer together, e.g. 24GiB."
    )
    context: int | None = Field(
        None, ge=256, description=f"With vram: tokens of the cache; default {CONTEXT}."
    )
    kv: Literal["f16", "bf16", "q8_0", "q4_0"] | None = Field(
        None, description="With vram: type of the cache; default f16."
    )
    bpw: float | None = Field(None, gt=0, le=32, description="Bits of tensor data a weight.")
    kld: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Mean KL divergence (nats) that the smallest file to be found keeps.",
    )
    recipe: Path | None = Field(
        None, description="File of lines tensor=type, as a search leaves it and llama-quantize takes it."
    )

    @field_validator("size", "vram")
    @classmethod
    def _is_amount(cls, text: str | None) -> str | None:
        if text is not None:
            bytes_of(text)
        return text

    @model_validator(mode="after")
    def _has_one_goal(self) -> Self:
        given = [goal for goal in GOALS if getattr(self, goal) is not None]
        if len(given) != 1:
            raise ValueError(
                f"an entry of fit has exactly one of {', '.join(GOALS)}, not {' and '.join(given) or 'none'}"
            )
        if self.vram is None and (
            beside := [key for key in ("context", "kv") if getattr(self, key) is not None]
        ):
            raise ValueError(f"{beside[0]} goes with vram, not with {given[0]}")
        return self

    def describe(self) -> str:
        """The entry as a user wrote it, for messages and records: ``size: 24GB``."""
        given = {key: value for key, value in self.model_dump(mode="json").items() if value is not None}
        return ", ".join(f"{key}: {value}" for key, value in given.items())

    def budget(self, facts: ModelFacts) -> int | None:
        """Bytes of the file that a size or a memory allows; None for the other goals. Negative where the cache alone is more."""
        if self.size is not None:
            return bytes_of(self.size)
        if self.vram is not None:
            return bytes_of(self.vram) - running_bytes(
                facts, 0, self.context or min(CONTEXT, facts.context), self.kv or "f16"
            )
        return None
