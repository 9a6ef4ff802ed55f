"""Quantization with calibration text: llmcompressor's ``oneshot`` on the whole model, one decoder layer at a time.

AWQ: Lin et al., arXiv 2306.00978. GPTQ: Frantar et al., arXiv 2210.17323. SmoothQuant: Xiao et al., arXiv 2211.10438.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import ConfigError, DependencyError, QuantizationError, SourceError
from quantool.methods._compressed.experts import counted_routing
from quantool.methods._compressed.ranks import connected, gathered, rank, ranks, share
from quantool.methods._compressed.torch_setup import (
    choose_device,
    peak_memory,
    repair_libraries,
    seed_everything,
    write_config,
)
from quantool.runtime.arithmetic import widen
from quantool.runtime.worker import Report, preloaded
from quantool.runtime.workspace import written

if TYPE_CHECKING:
    import torch
    from llmcompressor.modifiers import Modifier
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD = "5GB"
MISMATCH = "AWQ needs to match"
"""In what llmcompressor says of mappings that join layers with experts and layers without."""
KV_CACHE = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}


@preloaded("llmcompressor")
def quantize(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker that loads the model, quantizes and saves it.

    Request: ``source`` and ``output`` (folders), ``config`` (the configuration), ``algorithm`` (``rtn``, ``awq``,
    ``gptq``), ``scheme`` (fields of ``WeightScheme``), ``options`` (of the method), ``targets``, ``ignore``, ``others``
    (further groups, each with ``scheme`` and ``targets``),
    ``architecture`` (whose mappings fit), ``loader`` (name of transformers' class that loads it), ``max_seq_length``,
    ``device``, ``seed``, ``dtypes`` (safetensors' dtype by name of the tensors to be written), ``fused`` (whether the
    files hold the experts of a layer in one tensor). Writes
    weights, index, config.json and recipe.yaml. Result: ``device``, ``arithmetic`` (dtype of the products), ``peak_rss``, ``peak_cuda`` (bytes),
    ``samples``, ``tokens``, ``processes``, ``expert_tokens`` (by module: tokens routed to each expert), ``all_experts`` (whether
    all tokens went through all of them nevertheless). Progress is counted in decoder layers.

    Of several processes (``ranks``) each calls this; the first one writes, and its result is that of all.
    """
    device = choose_device(request["device"])
    import torch
    from torch.fx.proxy import TraceError
    from transformers import AutoTokenizer

    seed_everything(request["seed"])
    repair_libraries()
    trust = request["config"]["trust_remote_code"]
    tokenizer = AutoTokenizer.from_pretrained(request["source"], trust_remote_code=trust)
    samples = calibration_samples(request, tokenizer)
    try:
        with connected(request.get("processes", 1)):
            outcome = _run(request, share(samples), tokenizer, report)
            peaks = gathered(peak_memory())
    except torch.OutOfMemoryError as error:
        raise DependencyError(
            f"CUDA ran out of memory: {str(error).splitlines()[0]}",
            hint=f"lower calibration_config.max_seq_length (now {request['max_seq_length']}) or sample_size (now "
            f"{len(samples)}), free the GPU of other work, or set device: cpu",
        ) from error
    except MemoryError as error:
        raise QuantizationError(
            "out of memory",
            hint=f"lower sample_size (now {len(samples)}) or calibration_config.max_seq_length",
        ) from error
    except TraceError as error:
        raise QuantizationError(
            f"llmcompressor cannot follow the layers of this architecture: {error}",
            hint="a level without calibration (FP8_DYNAMIC, FP8_BLOCK) works on the files alone",
        ) from error
    except ValueError as error:
        if MISMATCH not in str(error):
            raise
        raise QuantizationError(
            f"llmcompressor's own AWQ mappings do not fit this checkpoint: {error}",
            hint="name smooth_layer and balance_layers in quantization_config.mappings",
        ) from error
    return {
        "device": device,
        "samples": len(samples),
        "tokens": sum(len(sample) for sample in samples),
        "processes": len(peaks),
        "all_experts": request["options"]["calibrate_all_experts"],
        **outcome,
        **{name: max(peak[name] for peak in peaks) for name in peaks[0]},
    }


def calibration_samples(request: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of at most ``sample_size`` calibration samples of at most ``max_seq_length`` tokens.

    A conversation is one sample; its chat template writes the special tokens. A text (a .txt file is one) is cut into
    windows that each begin with BOS where the tokenizer adds one: the first window of every document, then the second
    of those that have it, and so on, so that the mix of documents stays. ``calibration_config.max_tokens`` ends it.
    """
    from quantool.config.schema import Config
    from quantool.texts import corpus

    config = Config.model_validate(request["config"])
    length = request["max_seq_length"]
    documents = []
    for document in corpus.calibration(config):
        text = corpus.render(document, tokenizer)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        start = [] if document.messages else _start(tokenizer)
        step = max(length - len(start), 1)
        ends = range(0, 1 if document.messages else len(ids), step)
        documents.append([window for at in ends if len(window := [*start, *ids[at : at + step]]) > 1])
    limit = (config.calibration_config or {}).get("max_tokens")
    budget = limit if isinstance(limit, int) else math.inf
    samples: list[list[int]] = []
    for window in chain.from_iterable(filter(None, row) for row in zip_longest(*documents)):
        if len(samples) == config.sample_size or sum(map(len, samples)) >= budget:
            break
        samples.append(window)
    if not samples:
        raise ConfigError(
            "the calibration text has no document of two tokens or more",
            hint="see dataset_path and dataset_id",
        )
    return samples


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS, if the tokenizer puts it before a text."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []


def _run(
    request: dict[str, Any], samples: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, report: Report
) -> dict[str, Any]:
    """Calibrate and save; ``arithmetic`` and ``expert_tokens`` of the result."""
    import torch
    from datasets import Dataset
    from llmcompressor.entrypoints.oneshot import oneshot

    model = _load(request)
    stored = model.dtype
    if not torch.cuda.is_available():
        widen(model)
    recipe = _recipe(request, model)
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]})
    with (
        _counted(report, model.config.get_text_config().num_hidden_layers + 1),
        counted_routing(model, len(samples)) as routed,
    ):
        oneshot(
            model=model,
            processor=tokenizer,  # type: ignore[arg-type]
            recipe=recipe,
            dataset=data,
            num_calibration_samples=len(samples),
            max_seq_length=request["max_seq_length"],
            shuffle_calibration_samples=False,
            pipeline="sequential",
            moe_calibrate_all_experts=request["options"]["calibrate_all_experts"],
        )
    output, used = Path(request["output"]), model.dtype
    if used != stored:
        _round_scales(model, stored)
    model.save_pretrained(output, save_compressed=True, max_shard_size=SHARD)
    if rank() == 0:
        if used != stored:
            _narrow(output, request["dtypes"])
        # The source's own file is published, or none; transformers writes one even where there was none.
        (output / "generation_config.json").unlink(missing_ok=True)
        write_config(Path(request["source"]), output)
    counted = gathered({name: counter.tokens for name, counter in routed.items()})
    return {
        "arithmetic": str(used).removeprefix("torch."),
        "expert_tokens": {name: sum(each[name] for each in counted).tolist() for name in routed},
    }


def _round_scales(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the scales of a model in float32 the values that they are written with, for which its weights are rounded."""
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _narrow(folder: Path, dtypes: Mapping[str, str]) -> None:
    """Write the float32 tensors of a saved checkpoint in the dtype that was planned for them, shard by shard."""
    import torch
    from safetensors.torch import load_file, save_file

    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        narrowed = {
            name: tensor.to(kinds[dtypes.get(name, "F32")]) if tensor.dtype == torch.float32 else tensor
            for name, tensor in tensors.items()
        }
        with written(path) as part:
            save_file(narrowed, part, metadata={"format": "pt"})


def _load(request: dict[str, Any]) -> PreTrainedModel:
    """The model on the CPU, experts as separate linear layers."""
    import transformers
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.utils import load_context

    kind = getattr(transformers, request["loader"])
    # load_context reads single experts from the files, and fills in random ones where a layer's lie in one tensor; of several
    # processes it lets one read and the others share its memory, if it knows the class.
    reading = nullcontext() if request["fused"] else load_context(*([kind] if ranks() > 1 else []))
    try:
        with reading:
            model: PreTrainedModel = kind.from_pretrained(
                request["source"], dtype="auto", trust_remote_code=request["config"]["trust_remote_code"]
            )
    except (ValueError, KeyError) as error:
        raise SourceError(f"transformers cannot load this architecture: {error}") from error
    return linearize_moe(model) if request["fused"] else model


def _recipe(request: dict[str, Any], model: PreTrainedModel) -> list[Modifier]:
    """Smoothing (if any), then the rounding that produces scales and integers."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.modifiers.transform.awq.dynamic_mappings import (
        get_layer_mappings_from_model,
    )
    from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    options, ignore = request["options"], list(request["ignore"])
    recipe: list[Modifier] = []
    if request["algorithm"] == "awq":
        given = options["mappings"]
        mappings = (
            [AWQMapping(m["smooth_layer"], list(m["balance_layers"])) for m in given]
            if given
            else AWQ_MAPPING_REGISTRY.get(request["architecture"]) or get_layer_mappings_from_model(model)
        )
        _require_match(model, [(m.smooth_layer, m.balance_layers) for m in mappings])
        recipe.append(
            AWQModifier(mappings=mappings, duo_scaling=options["duo_scaling"], n_grid=options["n_grid"])
        )
    elif options.get("smoothing_strength") is not None:
        given = options["mappings"] and [
            [m["balance_layers"], m["smooth_layer"]] for m in options["mappings"]
        ]
        recipe.append(
            SmoothQuantModifier(
                smoothing_strength=options["smoothing_strength"], mappings=given, ignore=list(ignore)
            )
        )
    groups = {
        f"group_{number}": _scheme(group)
        for number, group in enumerate((request, *request.get("others", ())))
        if group["targets"]
    }
    if request["algorithm"] == "gptq":
        recipe.append(
            GPTQModifier(
                config_groups=groups,
                ignore=ignore,
                block_size=options["block_size"],
                dampening_frac=options["dampening_frac"],
            )
        )
    else:
        strategy = {"fp8": "tensor", "fp8_head": "attn_head"}.get(options.get("kv_cache") or "")
        cache = KV_CACHE | {"strategy": strategy} if strategy else None
        recipe.append(QuantizationModifier(config_groups=groups, ignore=ignore, kv_cache_scheme=cache))
    return recipe


def _scheme(group: dict[str, Any]) -> Any:
    """A group of compressed-tensors: ``scheme`` (fields of ``WeightScheme``) on ``targets``."""
    from compressed_tensors.quantization import preset_name_to_scheme  # type: ignore[import-untyped]

    scheme = preset_name_to_scheme(group["scheme"]["preset"], list(group["targets"]))
    if group["scheme"]["group"]:
        if scheme.weights is None:  # every preset used here quantizes weights
            raise AssertionError
        scheme.weights = scheme.weights.model_copy(update={"group_size": group["scheme"]["group"]})
    return scheme


def _require_match(model: PreTrainedModel, mappings: Sequence[tuple[str, Sequence[str]]]) -> None:
    """QuantizationError when no mapping finds all its layers: AWQ would quietly be plain rounding."""
    from quantool.methods._compressed.schemes import matches

    names = [name for name, _ in model.named_modules()]

    def found(pattern: str) -> bool:
        return any(matches(name, pattern) for name in names)

    if not any(found(smooth) and all(map(found, balance)) for smooth, balance in mappings):
        raise QuantizationError(
            f"no AWQ mapping fits {type(model).__name__}",
            hint="name smooth_layer and balance_layers in quantization_config.mappings",
        )


@contextmanager
def _counted(report: Report, layers: int) -> Iterator[None]:
    """Report each finished decoder layer: llmcompressor tells nobody but its own progress bars."""
    from compressed_tensors.utils import patch_attr  # type: ignore[import-untyped]
    from llmcompressor.core import LifecycleCallbacks

    original = LifecycleCallbacks.sequential_epoch_end
    done = 0

    def counted(*args: Any) -> Any:
        nonlocal done
        outcome = original(*args)
        done += 1
        report(min(done, layers), layers)
        return outcome

    with patch_attr(LifecycleCallbacks, "sequential_epoch_end", counted):
        yield
