"""Quantize a checkpoint, prove each file against its bf16 reference, package what passed."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("quantool")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"

# A wheel holds methods/, validation/ and configs/ inside the package; a checkout holds them beside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "methods").is_dir():
    __path__.append(str(_checkout))
