"""Proof of the AutoAWQ layout by AutoAWQ itself: its own dequantization of an artifact gives quantool's numbers.

AutoAWQ is archived, and its package imports with old transformers alone, so it is no dependency. Its arithmetic stands in
one file that needs torch only (``awq/utils/packing_utils.py``), which is taken from a folder of its own:

    pip install --target autoawq --no-deps autoawq==0.2.9
    PYTHONPATH=autoawq python tests/autoawq.py output/awq/tiny-chat-AWQ-W4A16-ASYM-AutoAWQ
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file

from quantool.formats.int4_layouts import PARTS, dequantize


def upstream() -> ModuleType:
    """AutoAWQ's arithmetic, without importing its package."""
    package = importlib.util.find_spec("awq")
    if package is None or not package.submodule_search_locations:
        sys.exit("AutoAWQ is not there; see the head of this file")
    path = Path(package.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    if spec is None or spec.loader is None:
        sys.exit(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    theirs = upstream()
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    for layer in layers:
        parts = {part: tensors[f"{layer}.{part}"] for part in PARTS}
        expected = theirs.dequantize_gemm(
            parts["qweight"],
            parts["qzeros"],
            parts["scales"].float(),
            settings["bits"],
            settings["group_size"],
        )
        if not torch.equal(expected.T, dequantize(parts)):
            sys.exit(f"{layer}: AutoAWQ reads other numbers")
    print(f"{len(layers)} layers: AutoAWQ's own dequantization gives the same numbers")
    if not layers:
        sys.exit("no layer is in the AutoAWQ layout")


if __name__ == "__main__":
    main()
