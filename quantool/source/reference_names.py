"""Which tensors of a checkpoint transformers loads, which it lacks, and which it passes over: known from headers alone.

The model is made and "loaded" on torch's meta device, so that transformers' own renaming and merging of weights decides;
no weight is read. What is found is kept in the user's cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.errors import SourceError
from quantool.formats.safetensors import TensorHeader
from quantool.records import Source, fingerprint
from quantool.runtime import process, toolchain
from quantool.runtime.versions import version_of
from quantool.runtime.worker import Report, preloaded
from quantool.runtime.workspace import write_text
from quantool.source.loaders import auto_class

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
REFUSALS = (
    ValueError, KeyError, OSError, RuntimeError, ImportError, AttributeError, TypeError, AssertionError, ZeroDivisionError,
)  # fmt: skip
"""What transformers raises for a configuration that it cannot make a model of."""


@dataclass(frozen=True)
class ReferenceNames:
    """What transformers says after loading: names of the model's tensors, and of the checkpoint's."""

    model: str
    """Name of the class."""
    missing: tuple[str, ...] = ()
    """The model has them, the checkpoint does not."""
    unexpected: tuple[str, ...] = ()
    """The checkpoint has them, the model does not."""
    mismatched: tuple[str, ...] = ()
    """Of another shape."""
    failure: str = ""
    """Why no model could be made; empty when one was."""


def reference_names(source: Source, tensors: Mapping[str, TensorHeader]) -> ReferenceNames:
    """What the class that the reference is loaded as makes of the ``tensors``; none of the checkpoint's own code is run."""
    listed = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors.values()]
    config = (source.folder / "config.json").read_text(encoding="utf-8")
    versions = [version_of(name) for name in ("quantool", "transformers", "torch")]
    key = fingerprint(config, listed, auto_class(source), versions)
    kept = toolchain.cache_folder() / "references" / f"{key[:32]}.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        log = kept.with_suffix(".log")
        request = {"folder": str(source.folder), "tensors": listed, "auto_class": auto_class(source)}
        found = process.call(load_names, request, log=log, failure=SourceError)
        write_text(kept, json.dumps(found))
        log.unlink(missing_ok=True)
    fields = json.loads(kept.read_text(encoding="utf-8"))
    named: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return ReferenceNames(**named)


@preloaded("transformers")
def load_names(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: the fields of ``ReferenceNames`` for the ``tensors`` (name, dtype, shape) of ``folder``'s config.json."""
    del report  # a second
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = transformers.AutoConfig.from_pretrained(Path(request["folder"]))
        with torch.device("meta"):
            sketch = getattr(transformers, request["auto_class"]).from_config(config)
            weights = {
                name: torch.empty(shape, dtype=getattr(torch, DTYPES.get(dtype, "uint8")))
                for name, dtype, shape in request["tensors"]
            }
        _, info = type(sketch).from_pretrained(
            None,
            config=sketch.config,
            state_dict=weights,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map="meta",
        )
    except (*REFUSALS, StrictDataclassError) as error:
        words = " ".join(str(error).split())[:300]
        return {"model": request["auto_class"], "failure": f"{type(error).__name__}: {words}"}
    return {
        "model": type(sketch).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(name for name, *_ in info["mismatched_keys"]),
    }
