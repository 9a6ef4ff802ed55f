"""Artifacts that transformers cannot load by itself, as ordinary models: their packed weights are unpacked first.

These are the AutoAWQ layout, which transformers leaves to AutoAWQ (archived, and not to be installed beside the libraries
of today), and experts of a mixture that transformers 5.17 cannot join: those with zero points in the compressed-tensors
layout, and those left alone beside packed layers. The products of level and scale are rounded once, to the dtype that config.json names: the very weights that
transformers makes of the same numbers where it can (``quantool.formats.int4_layouts``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.formats.int4_layouts import BITS, COMPRESSED_PARTS, PARTS, dequantize, dequantize_compressed
from quantool.formats.json_file import read_optional
from quantool.formats.safetensors import TensorHeader, check_index

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZATION = "quantization_config"
LAYOUTS = (("qweight", PARTS, dequantize), ("weight_packed", COMPRESSED_PARTS, dequantize_compressed))
"""Part that tells a layout, all its parts, and what makes a weight of them."""
OPTIONAL = "weight_zero_point"


def quantization(folder: Path) -> dict[str, Any]:
    """``quantization_config`` of config.json in ``folder``; empty when there is none. SourceError for no JSON."""
    found = read_optional(folder / "config.json").get(QUANTIZATION)
    return found if isinstance(found, dict) else {}


def is_autoawq(folder: Path) -> bool:
    """Whether config.json says ``quant_method: awq``."""
    return str(quantization(folder).get("quant_method", "")).lower() == "awq"


def must_unpack(folder: Path) -> bool:
    """Whether transformers needs ``load_unpacked`` for ``folder``."""
    if is_autoawq(folder):
        return True
    if not quantization(folder):
        return False
    names = check_index(folder)
    is_packed = any(name.endswith(".weight_packed") for name in names)
    ends = (f".{OPTIONAL}", ".weight") if is_packed else (f".{OPTIONAL}",)
    return any(".experts." in name and name.endswith(ends) for name in names)


def load_unpacked(folder: Path, dtype: str, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The model of ``folder`` with its packed weights dequantized, and transformers' account of the loading.

    ``dtype`` is the name of a torch dtype, or ``auto`` for that of config.json. Takes as much memory as the
    unquantized model. Raises SourceError for versions of the layout other than gemm with 4 bits and for layers that
    lack a part; what transformers raises passes.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    check_layout(folder)
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    del config.quantization_config
    named = config.get_text_config().dtype if dtype == "auto" else getattr(torch, dtype)
    kind = named if isinstance(named, torch.dtype) else torch.float16
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SourceError(f"{folder}: transformers has no language model of type {config.model_type}")
    kind_of_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = kind_of_model.from_pretrained(
        None,
        config=config,
        state_dict=stored(folder, check_index(folder), kind),
        dtype=kind,
        output_loading_info=True,
    )
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info


def decompress(model: Any) -> None:
    """Unpack the weights of a compressed-tensors model now, not in its first forward; others are left alone.

    It stays where it is: compressed-tensors would have each module compute where its weights were at this moment, and
    look after every tensor that it reads.
    """
    if hasattr(model, "ct_decompress_hook"):
        from compressed_tensors.offload import remove_dispatch  # type: ignore[import-untyped]

        model.hf_quantizer.compressor.decompress_model(model)
        remove_dispatch(model, onload_tensors=True)


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """Inside, the activations of a compressed-tensors model are not rounded to fewer bits; others are left alone."""
    rounding = [module for module in model.modules() if hasattr(module, "quantization_scheme")]
    before = [getattr(module, "quantization_enabled", True) for module in rounding]
    for module in rounding:
        module.quantization_enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(rounding, before, strict=True):
            module.quantization_enabled = enabled


def check_layout(folder: Path) -> None:
    """Raise SourceError for an AutoAWQ layout that cannot be unpacked."""
    if not is_autoawq(folder):
        return
    found = quantization(folder)
    version, bits = str(found.get("version", "gemm")).lower(), found.get("bits", found.get("w_bit"))
    if version != "gemm" or bits != BITS:
        raise SourceError(
            f"{folder}: {bits}-bit AutoAWQ weights of version {version!r} cannot be unpacked",
            hint="4 bits of version gemm can",
        )


def stored(folder: Path, headers: dict[str, TensorHeader], dtype: Any) -> dict[str, Any]:
    """The tensors ``headers`` of ``folder`` as transformers takes them for a state dict: each is read when it is its turn.

    Packed ones stand under the name that the unquantized model gives them, and are dequantized to ``dtype`` when they are
    read; with None they stay as they are.
    """
    files = _WeightFiles(folder)
    found: dict[str, Any] = {}
    taken: set[str] = set()
    for mark, parts, unpacked in LAYOUTS if dtype is not None else ():
        for module in [name.removesuffix(f".{mark}") for name in headers if name.endswith(f".{mark}")]:
            names = {part: f"{module}.{part}" for part in parts}
            absent = [part for part, name in names.items() if name not in headers and part != OPTIONAL]
            if absent:
                raise SourceError(f"{folder}: {module} lacks {' and '.join(absent)}")
            words = {part: files.slice(headers[name]) for part, name in names.items() if name in headers}
            found[f"{module}.weight"] = _Packed(words, unpacked, dtype)
            taken |= set(names.values())
    for name, tensor in headers.items():
        if name not in taken:
            found[name] = files.slice(tensor)
    return found


@dataclass(frozen=True)
class _Packed:
    """A weight in parts, read and dequantized by ``weight[...]`` as a slice of safetensors is."""

    parts: dict[str, Any]
    unpacked: Callable[[dict[str, Tensor]], Tensor]
    dtype: Any

    def __getitem__(self, whole: Any) -> Tensor:
        words = {part: stored[whole] for part, stored in self.parts.items()}
        return self.unpacked(words).to(self.dtype).contiguous()


class _WeightFiles:
    """Open weight files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[str, Any] = {}

    def slice(self, tensor: TensorHeader) -> Any:
        """A tensor that is not read yet; ``[...]`` reads it."""
        from safetensors import safe_open

        if tensor.file not in self._handles:
            self._handles[tensor.file] = safe_open(self._folder / tensor.file, framework="pt")
        return self._handles[tensor.file].get_slice(tensor.name)
