"""Files of hidden states: arrays [windows, scored positions, width], written while they are computed, and mapped."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def save_states(
    batches: Iterable[tuple[int, Tensor]], ids: Any, path: Path, windows: int | None = None, first: int = 0
) -> Iterator[int]:
    """Write the hidden states of the windows ``ids`` to ``path`` as they come (``reference.run``); yields each batch's tokens.

    As a NumPy array, bfloat16 as the uint16 of the same bits (NumPy has no bfloat16). With ``windows`` it has so many, of
    which these are those from ``first`` on: several processes write one file.
    """
    import torch

    target, done = None, 0
    for count, states in batches:
        plain = states.cpu()
        values = (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()
        if target is None:
            target = _mapped(path, (windows or len(ids), *values.shape[1:]), values.dtype)
        target[first + done : first + count] = values
        yield (count - done) * ids.shape[1]
        done = count
    if target is not None:
        target.flush()


def _mapped(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array file, mapped, with all of its room: writing to a hole of one on a full disk is a SIGBUS.

    One that another process has made like this already stays as it is.
    """
    import numpy as np

    head = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, described)
    place = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.posix_fallocate(place, 0, head.tell() + math.prod(shape) * dtype.itemsize)
        os.pwrite(place, head.getvalue(), 0)
    finally:
        os.close(place)
    return np.memmap(path, dtype, "r+", head.tell(), shape)


def read_hidden(path: Path) -> Any:
    """Hidden states [windows, scored, width] that ``save_states`` wrote, mapped, not read; see ``as_tensor``."""
    import numpy as np

    return np.load(path, mmap_mode="r")


def hidden_of(request: dict[str, Any]) -> list[Any]:
    """The hidden states of what a worker is to run, beside ``reference.texts_of``: its ``hidden`` files, or the ``spans``."""
    files = [read_hidden(Path(path)) for path in request["hidden"]]
    if "spans" not in request:
        return files
    return [files[text][first:last] for text, first, last in request["spans"]]


def as_tensor(part: Any) -> Tensor:
    """A part of ``read_hidden``'s hidden states as a tensor, in the dtype that the model gave them."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(part))
    return values.view(torch.bfloat16) if values.dtype == torch.uint16 else values
