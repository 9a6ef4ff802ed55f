"""What the compressed methods refuse when a run is planned: sources, schemes and layouts that could not be made or judged."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from quantool.errors import ConfigError, SourceError
from quantool.formats.int4_layouts import PER_WORD
from quantool.formats.safetensors import TensorHeader
from quantool.methods._compressed.schemes import FLOATS, HEAD, Selection, WeightScheme
from quantool.records import Source
from quantool.source.shapes import check_config_shapes


def check_loadable(level: str, scheme: WeightScheme, located: Mapping[str, TensorHeader]) -> None:
    """SourceError for whole integers beside experts: transformers joins experts of FP8 or of packed integers alone."""
    if scheme.stored == "I8" and (experts := [name for name in located if ".experts." in name]):
        raise SourceError(
            f"{level} cannot be judged: transformers {version('transformers')} joins no experts ({experts[0]} …) of a "
            "model whose weights are 8-bit integers",
            hint="fp8 (FP8_DYNAMIC) takes as much room; awq W8A16 keeps 8-bit integers, with activations as they are",
        )


def check_autoawq(level: str, scheme: WeightScheme, selection: Selection, source: Source) -> None:
    """ConfigError for what AutoAWQ's layout does not hold: other widths than 4 bits, the output head, odd outputs."""
    if not source.facts.task.generates:
        raise ConfigError(
            f"format: autoawq is for models that write text; {source.name} is for {source.facts.task.kind}",
            hint="leave format out: transformers and vLLM read compressed-tensors",
        )
    if scheme.bits != 4:
        raise ConfigError(f"format: autoawq holds 4-bit weights, not {level}", hint="W4A16 or W4A16_ASYM")
    if any(layer.name == f"{HEAD}.weight" for layer in selection.layers):
        raise ConfigError(
            "format: autoawq keeps the output head in full precision",
            hint="put lm_head into quantization_config.ignore",
        )
    odd = [layer.name for layer in selection.layers if layer.shape[0] % PER_WORD]
    if odd:
        raise ConfigError(
            f"format: autoawq packs eight outputs a word, which {', '.join(odd[:3])} cannot",
            hint="put them into quantization_config.ignore",
        )


def check_source(source: Source, located: Mapping[str, TensorHeader]) -> None:
    """SourceError for an architecture that the loaders do not know, for weights that are quantized, and for odd shapes."""
    if not source.facts.architecture.endswith("ForCausalLM") and source.facts.task.generates:
        raise SourceError(
            f"architecture {source.facts.architecture} is not supported",
            hint="text models (…ForCausalLM), embedding models, classifiers and rerankers are; of others the method gguf"
            " makes a text-only file, with drop: [vision]",
        )
    odd = [
        tensor for tensor in located.values() if tensor.name.endswith("weight") and tensor.dtype not in FLOATS
    ]
    if odd:
        raise SourceError(
            f"the checkpoint is already quantized: {odd[0].name} is {odd[0].dtype}",
            hint="start from the bf16 one",
        )
    check_config_shapes(source, located)
