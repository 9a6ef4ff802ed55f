"""GPTQ: columns rounded one after another, the error pushed into those to come (Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

from pydantic import Field

from quantool.errors import ConfigError
from quantool.methods._compressed import outline as _compressed
from quantool.methods._compressed.make import make
from quantool.methods._compressed.mappings import SMOOTHQUANT_REGISTRIES, Mappings
from quantool.methods._compressed.schemes import W4A16, W4A16_ASYM, W8A8, W8A16
from quantool.plugins.contract import Job, Outline, Request, method
from quantool.records import Artifact
from quantool.runtime.progress import Progress

RECIPE = _compressed.Recipe(
    "gptq", "GPTQ", "gptq", {"W4A16": W4A16, "W4A16_ASYM": W4A16_ASYM, "W8A16": W8A16, "W8A8": W8A8}
)


class Options(_compressed.CompressedOptions):
    """``quantization_config`` of the method gptq."""

    group_size: int = Field(
        128, ge=32, multiple_of=32, description="Values of a row that share a scale (W4, W8A16)."
    )
    block_size: int = Field(128, ge=1, description="Columns handled together.")
    dampening_frac: float = Field(
        0.01, gt=0, description="Part of the mean diagonal that is added to the Hessian."
    )
    smoothing_strength: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Smooth activations first, as SmoothQuant does (0.8 is usual); for W8A8.",
    )
    mappings: Mappings | None = Field(
        None,
        description="Layers to smooth, each with smooth_layer and balance_layers; with smoothing_strength.",
    )


def outline(request: Request, options: Options) -> Outline:
    """Plan the levels."""
    if options.mappings is not None and options.smoothing_strength is None:
        raise ConfigError(
            "quantization_config.mappings says what to smooth, but smoothing_strength is not set",
            hint="set quantization_config.smoothing_strength (0.8 is usual), or drop mappings",
        )
    registries = SMOOTHQUANT_REGISTRIES if options.smoothing_strength is not None else ()
    return _compressed.outline(RECIPE, request, options, registries=registries)


@method(
    "gptq",
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
