"""The tensor headers of a source, wherever its weights are."""

from __future__ import annotations

from quantool.formats.safetensors import TensorHeader, check_index
from quantool.records import Source
from quantool.source.prepare import committed_headers, preparation_for


def headers(source: Source) -> dict[str, TensorHeader]:
    """Name to header of every weight tensor; read from the files, or by range requests where they are not fetched.

    Those of a prepared source that is not written yet follow from the headers that it is made of.
    """
    names = [file.name for file in source.files if file.name.endswith(".safetensors")]
    if source.prepared is not None and not all((source.folder / name).exists() for name in names):
        return preparation_for(source.prepared).made_headers()
    if source.commit is None or all((source.folder / name).exists() for name in names):
        return check_index(source.folder)
    sizes = tuple((file.name, file.bytes) for file in source.files if file.name in names)
    return committed_headers(source.model_id, source.commit, sizes)
