"""AWQ: 4- or 8-bit weights, channels that matter scaled up first (Lin et al., arXiv 2306.00978)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantool.errors import ConfigError
from quantool.methods._compressed import outline as _compressed
from quantool.methods._compressed.make import make
from quantool.methods._compressed.mappings import AWQ_REGISTRIES, Mappings
from quantool.methods._compressed.schemes import W4A16, W4A16_ASYM, W8A16
from quantool.plugins.contract import Job, Outline, Request, method
from quantool.records import Artifact
from quantool.runtime.progress import Progress

RECIPE = _compressed.Recipe("awq", "AWQ", "awq", {"W4A16": W4A16, "W4A16_ASYM": W4A16_ASYM, "W8A16": W8A16})


class Options(_compressed.CompressedOptions):
    """``quantization_config`` of the method awq."""

    mappings: Mappings | None = Field(
        None,
        description="Layers to scale, each with smooth_layer and balance_layers. Default: llmcompressor's own.",
    )
    group_size: int = Field(128, ge=32, multiple_of=32, description="Values of a row that share a scale.")
    duo_scaling: bool | Literal["both"] = Field(
        "both", description="Scale by activations and weights (true), activations alone (false), or try both."
    )
    n_grid: int = Field(20, ge=2, description="Scales tried for each mapping.")
    format: Literal["compressed-tensors", "autoawq"] = Field(
        "compressed-tensors",
        description="Layout of the files; autoawq is what TGI, LMDeploy and older engines read.",
    )


LEAST = {"both": 4, True: 3, False: 2}
"""Fewest points of llmcompressor's grid by ``duo_scaling``; it divides by zero below (``AWQModifier``)."""


def outline(request: Request, options: Options) -> Outline:
    """Plan the levels."""
    least = LEAST[options.duo_scaling]
    if options.n_grid < least:
        raise ConfigError(
            f"quantization_config.n_grid is {options.n_grid}, too few with duo_scaling: {options.duo_scaling}",
            hint=f"set n_grid to {least} or more",
        )
    return _compressed.outline(RECIPE, request, options, registries=AWQ_REGISTRIES)


@method(
    "awq",
    options=Options,
    levels=RECIPE.levels,
    outline=outline,
    needs=("llmcompressor",),
    extra="compressed",
    depends=_compressed.CALIBRATED,
)
def quantize(job: Job, options: Options, progress: Progress) -> Artifact:
    """Make one level."""
    return make(RECIPE, job, options, progress)
