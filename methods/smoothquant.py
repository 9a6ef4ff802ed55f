"""SmoothQuant: 8-bit weights and activations, outliers moved from these to those (Xiao et al., arXiv 2211.10438)."""

from __future__ import annotations

from pydantic import Field

from quantool.methods._compressed import outline as _compressed
from quantool.methods._compressed.make import make
from quantool.methods._compressed.mappings import SMOOTHQUANT_REGISTRIES, Mappings
from quantool.methods._compressed.schemes import W8A8
from quantool.plugins.contract import Job, Outline, Request, method
from quantool.records import Artifact
from quantool.runtime.progress import Progress

RECIPE = _compressed.Recipe("smoothquant", "SmoothQuant", "rtn", {"W8A8": W8A8})


class Options(_compressed.CompressedOptions):
    """``quantization_config`` of the method smoothquant."""

    smoothing_strength: float = Field(
        0.8, gt=0, lt=1, description="How much of the outliers goes to the weights: alpha of the paper."
    )
    mappings: Mappings | None = Field(
        None,
        description="Layers to smooth, each with smooth_layer and balance_layers. Default: llmcompressor's own.",
    )


def outline(request: Request, options: Options) -> Outline:
    """Plan the levels."""
    return _compressed.outline(RECIPE, request, options, registries=SMOOTHQUANT_REGISTRIES)


@method(
    "smoothquant",
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
