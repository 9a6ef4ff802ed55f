"""A checkpoint that is quantized already: what each weight is made of, by config.json and headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.json_file import brief
from quantool.formats.quantized_weights import (
    EIGHT_BIT,
    PackedWeight,
    autoawq,
    gptq,
    misfit,
    mxfp4,
    nvfp4,
    packed,
    scaled,
)
from quantool.formats.safetensors import TensorHeader, some

SETTINGS = "quantization_config"
BF16_FIRST = "start from the bf16 or f16 checkpoint it was made from"
FORMATS = {
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "dense",
}
"""Formats of compressed-tensors that can be read."""
ACTIVATIONS = (
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale", "k_scale", "v_scale", "q_scale",
    "k_zero_point", "v_zero_point", "q_zero_point", "input_global_scale", "output_global_scale",
)  # fmt: skip
"""Last parts of the names of what belongs to activations or to the cache of keys and values: no weight is made of it."""
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
PACKED = (".weight_packed", ".qweight", ".weight_scale", ".weight_scale_inv")
"""Ends of names that only quantized checkpoints have."""
PLAIN = {"F64", "F32", "F16", "BF16", "I64", "BOOL"}
LEFTOVERS = (
    ".weight_scale",
    ".weight_scale_2",
    ".weight_global_scale",
    "_scale_inv",
    ".weight_shape",
    ".g_idx",
    ".scales",
    "_scales",
)
"""Ends of the names of parts: one that no weight has taken belongs to a weight that is lost."""

Reader = Callable[["_Unexplained"], Iterator[PackedWeight]]


@dataclass(frozen=True)
class Unpacking:
    """How the tensors of a quantized checkpoint become ordinary weights."""

    form: str
    """For people: ``FP8 in blocks of 128 x 128 (fp8)``."""
    dtype: str
    """Of the weights that are dequantized, as safetensors names it."""
    weights: Mapping[str, PackedWeight]
    copied: tuple[TensorHeader, ...]
    dropped: tuple[TensorHeader, ...]
    """Scales of activations and of the cache, which mean nothing to weights in full precision."""


@dataclass
class _Unexplained:
    """What is left to explain of the ``headers``."""

    path: Path
    settings: Mapping[str, Any]
    headers: dict[str, TensorHeader]

    def take(
        self, mark: str, parts: Mapping[str, str], optional: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, dict[str, TensorHeader]]]:
        """Modules with a tensor that ends in ``mark``, each with its ``parts`` (name of the part to end of the name)."""
        for name in [name for name in self.headers if name.endswith(mark)]:
            yield name.removesuffix(mark), self.parts(name, name.removesuffix(mark), parts, optional)

    def parts(
        self, mark: str, module: str, ends: Mapping[str, str], optional: tuple[str, ...]
    ) -> dict[str, TensorHeader]:
        """The parts of one weight, of which the tensor ``mark`` is there; SourceError for one that is lost."""
        found = {
            part: self.headers.pop(module + end) for part, end in ends.items() if module + end in self.headers
        }
        if lost := [module + ends[part] for part in ends if part not in found and part not in optional]:
            raise SourceError(
                f"{mark} is quantized, but {some(lost)} is missing: its weight cannot be computed",
                hint="the checkpoint is damaged: fetch it again",
            )
        return found


def quantization(path: Path, *parts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` of a config.json (its ``parts``: the whole, that of the language model); None without one.

    Raises SourceError for a kind that cannot be read.
    """
    found = next((part[SETTINGS] for part in parts if part.get(SETTINGS)), None)
    if found is None:
        return None
    how = found.get("quant_method") if isinstance(found, dict) else found
    if not isinstance(found, dict) or not isinstance(how, str) or how not in READERS:
        raise _unreadable(path, f"quant_method {brief(how)}")
    return found


def read_unpacking(
    path: Path, settings: Mapping[str, Any], dtype: Any, headers: Mapping[str, TensorHeader]
) -> Unpacking:
    """Explain every tensor of a quantized checkpoint whose config.json is ``path``.

    ``dtype`` is what config.json says of it. Raises SourceError for a form that cannot be read, a part that is missing,
    and a tensor that is neither a weight nor a part of one.
    """
    checkpoint = _Unexplained(path, settings, dict(headers))
    kind, reader = READERS[str(settings["quant_method"])]
    weights = {weight.name: weight for weight in reader(checkpoint)}
    left: list[TensorHeader] = []
    dropped: list[TensorHeader] = []
    for name, tensor in checkpoint.headers.items():
        (dropped if name.rpartition(".")[2].endswith(ACTIVATIONS) else left).append(tensor)
    strange = [tensor.name for tensor in left if tensor.dtype not in PLAIN or tensor.name.endswith(LEFTOVERS)]
    if strange:
        raise SourceError(
            f"{path.parent}: {len(strange)} tensors are neither weights nor parts of one in the layout {settings['quant_method']}: "
            f"{some(sorted(strange))}",
            hint="a part of the checkpoint is missing, or its layout is one that quantool cannot read",
        )
    if not weights:
        raise SourceError(
            f"{path} says that the weights are quantized ({settings['quant_method']}), but none is"
        )
    if twice := [name for name in weights if name in checkpoint.headers]:
        raise SourceError(f"{path.parent}: {some(twice)}: there quantized and in full precision")
    target = DTYPES.get(str(dtype).removeprefix("torch."), "BF16")
    return Unpacking(_form(kind, [*weights.values()]), target, weights, tuple(left), tuple(dropped))


def require_plain(path: Path, headers: Mapping[str, TensorHeader]) -> None:
    """SourceError for parts of quantized weights where config.json ``path`` says nothing of a quantization."""
    found = sorted(
        name for name, tensor in headers.items() if tensor.dtype.startswith("F8_") or name.endswith(PACKED)
    )
    if found:
        raise SourceError(
            f"{path.parent}: {len(found)} tensors are parts of quantized weights ({some(found)}), but config.json has no "
            f"{SETTINGS}",
            hint=f"restore {SETTINGS} in config.json, or {BF16_FIRST}",
        )


def _form(kind: str, weights: list[PackedWeight]) -> str:
    forms = sorted({_described(weight) for weight in weights})
    return f"{' and '.join(forms)} ({kind})"


def _described(weight: PackedWeight) -> str:
    """Type and sharing of scales, for people."""
    if weight.layout in ("mxfp4", "nvfp4"):
        return weight.layout.upper()
    if weight.layout != "scaled":
        return f"INT{weight.bits}"
    stored = weight.parts["weight"].dtype
    name = "INT8" if stored == "I8" else "FP8"
    if len(weight.blocks) > 1 and weight.blocks[-2] > 1 and weight.blocks[-1] < weight.shape[-1]:
        return f"{name} in blocks of {weight.blocks[-2]} x {weight.blocks[-1]}"
    return name


def _compressed(checkpoint: _Unexplained) -> Iterator[PackedWeight]:
    """compressed-tensors: what is stored decides, the settings name what must be refused."""
    settings = checkpoint.settings
    formats = {settings.get("format"), *(group.get("format") for group in _groups(checkpoint))} - {
        None,
        "mixed-precision",
    }
    if strange := formats - FORMATS:
        raise _unreadable(checkpoint.path, f"format {brief(min(map(str, strange)))} of compressed-tensors")
    sparse = settings.get("sparsity_config") or {}
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        raise _unreadable(checkpoint.path, f"sparsity_config {brief(sparse.get('format'))}")
    if settings.get("transform_config"):
        raise _unreadable(checkpoint.path, "transform_config: the weights were rotated")
    halves = {"packed": ".weight_packed", "scale": ".weight_scale", "global": ".weight_global_scale"}
    for module, parts in checkpoint.take(".weight_global_scale", halves):
        yield nvfp4(f"{module}.weight", parts)
    ends = {
        "packed": ".weight_packed", "scale": ".weight_scale", "shape": ".weight_shape", "zero_point": ".weight_zero_point",
        "g_idx": ".weight_g_idx",
    }  # fmt: skip
    for module, parts in checkpoint.take(".weight_packed", ends, ("zero_point", "g_idx")):
        name = f"{module}.weight"
        if len(parts["scale"].shape) != 2:
            raise misfit(name, parts)
        yield packed(name, parts, _columns(checkpoint, parts, name))
    yield from _eight_bit(checkpoint, EIGHT_BIT)


def _groups(checkpoint: _Unexplained) -> list[Mapping[str, Any]]:
    groups = checkpoint.settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _weight_settings(checkpoint: _Unexplained) -> list[Mapping[str, Any]]:
    return [weights for group in _groups(checkpoint) if isinstance(weights := group.get("weights"), dict)]


def _columns(checkpoint: _Unexplained, parts: Mapping[str, TensorHeader], name: str) -> int:
    """Columns of a packed weight, from the width that the settings give it: ``weight_shape`` is data, not header."""
    words, groups = parts["packed"].shape[-1], parts["scale"].shape[1]
    for weights in _weight_settings(checkpoint):
        bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
        if bits not in (2, 4, 8):
            continue
        if strategy == "group" and isinstance(size, int) and -(-groups * size * bits // 32) == words:
            return groups * size
        if strategy == "channel" and groups == 1:
            return int(words * 32 // bits)
    raise SourceError(
        f"{name}: {list(parts['packed'].shape)} words and {groups} groups fit no group of {checkpoint.path.name}'s {SETTINGS}",
        hint=BF16_FIRST,
    )


def _eight_bit(checkpoint: _Unexplained, dtypes: set[str]) -> Iterator[PackedWeight]:
    """Tensors of 8 bits with their scales; neighbours that share one by the settings, where they do not divide evenly."""
    sizes = [
        checkpoint.settings.get("weight_block_size"),
        *(w.get("block_structure") for w in _weight_settings(checkpoint)),
    ]
    block = next(
        (
            tuple(size)
            for size in sizes
            if isinstance(size, list) and all(type(n) is int and n > 0 for n in size)
        ),
        (),
    )
    for name in [name for name, tensor in checkpoint.headers.items() if tensor.dtype in dtypes]:
        if name.endswith(("_zero_point", "_scale", "_scale_inv")):
            continue
        ending = "_scale_inv" if f"{name}_scale_inv" in checkpoint.headers else "_scale"
        ends = {"weight": "", "scale": ending, "zero_point": "_zero_point"}
        yield scaled(name, checkpoint.parts(name, name, ends, ("zero_point",)), block)


def _fp8(checkpoint: _Unexplained) -> Iterator[PackedWeight]:
    """DeepSeek's and transformers' FP8: in blocks, or one scale a tensor."""
    yield from _eight_bit(checkpoint, EIGHT_BIT - {"I8"})


def _modelopt(checkpoint: _Unexplained) -> Iterator[PackedWeight]:
    """NVIDIA's FP8, one scale a tensor, and NVFP4 (ModelOpt 0.3x, ``export/quant_utils.py``)."""
    if (algorithm := checkpoint.settings.get("quant_algo")) not in ("FP8", "NVFP4"):
        raise _unreadable(checkpoint.path, f"quant_algo {brief(algorithm)} of ModelOpt")
    ends = {"packed": ".weight", "scale": ".weight_scale", "second": ".weight_scale_2"}
    for module, parts in checkpoint.take(".weight_scale_2", ends):
        yield nvfp4(f"{module}.weight", parts)
    yield from _fp8(checkpoint)


def _mxfp4(checkpoint: _Unexplained) -> Iterator[PackedWeight]:
    for name, parts in checkpoint.take("_blocks", {"blocks": "_blocks", "scales": "_scales"}):
        yield mxfp4(name, parts)


def _autoawq(checkpoint: _Unexplained) -> Iterator[PackedWeight]:
    settings = checkpoint.settings
    version, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", settings.get("w_bit"))
    if version != "gemm" or bits != 4:
        raise _unreadable(checkpoint.path, f"AutoAWQ of version {brief(version)} with {brief(bits)} bits")
    ends = {part: f".{part}" for part in ("qweight", "qzeros", "scales")}
    for module, parts in checkpoint.take(".qweight", ends):
        yield autoawq(f"{module}.weight", parts)


def _gptq(checkpoint: _Unexplained) -> Iterator[PackedWeight]:
    version = str(checkpoint.settings.get("checkpoint_format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2"):
        raise _unreadable(checkpoint.path, f"checkpoint_format {brief(version)} of GPTQ")
    ends = {part: f".{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    for module, parts in checkpoint.take(".qweight", ends):
        yield gptq(f"{module}.weight", parts, 0 if version == "gptq_v2" else 1)


READERS: dict[str, tuple[str, Reader]] = {
    "compressed-tensors": ("compressed-tensors", _compressed),
    "fp8": ("FP8 of transformers", _fp8),
    "fbgemm_fp8": ("FBGEMM", _fp8),
    "modelopt": ("ModelOpt", _modelopt),
    "mxfp4": ("gpt-oss", _mxfp4),
    "awq": ("AutoAWQ", _autoawq),
    "gptq": ("GPTQ", _gptq),
}
"""By ``quant_method``: the name for people, and what explains the tensors."""


def _unreadable(path: Path, what: str) -> SourceError:
    return SourceError(
        f"{path}: the checkpoint is already quantized in a form that quantool cannot read ({what})",
        hint=BF16_FIRST,
    )
