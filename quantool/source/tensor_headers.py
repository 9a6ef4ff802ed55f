"""The tensor headers of a source, wherever its weights are."""

from __future__ import annotations

from functools import lru_cache

from quantool.formats.safetensors import TensorHeader, check_index, remote_headers
from quantool.hub.download import hub_errors
from quantool.records import Source
from quantool.source.prepare import recipe_for


def headers(source: Source) -> dict[str, TensorHeader]:
    """Name to header of every weight tensor; read from the files, or by range requests where they are not fetched.

    Those of a prepared source that is not written yet follow from the headers that it is made of.
    """
    names = [file.name for file in source.files if file.name.endswith(".safetensors")]
    if source.prepared is not None and not all((source.folder / name).exists() for name in names):
        return recipe_for(source.prepared).made_headers()
    if source.commit is None or all((source.folder / name).exists() for name in names):
        return check_index(source.folder)
    sizes = tuple((file.name, file.bytes) for file in source.files if file.name in names)
    return {**_remote(source.model_id, source.commit, sizes)}


@lru_cache(maxsize=4)
def _remote(repo: str, commit: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, TensorHeader]:
    """A commit never changes, and every method asks."""
    with hub_errors(repo, commit):
        return remote_headers(repo, commit, dict(sizes))
