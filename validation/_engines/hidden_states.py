"""Files of hidden states: arrays [windows, scored positions, width], written while they are computed, and mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.runtime.workspace import written

if TYPE_CHECKING:
    from torch import Tensor


def save_states(batches: Iterable[tuple[int, Tensor]], ids: Any, path: Path) -> Iterator[int]:
    """Write the hidden states of the windows ``ids`` to ``path`` as they come (``reference.run``); yields each batch's tokens.

    As a NumPy array, bfloat16 as the uint16 of the same bits (NumPy has no bfloat16).
    """
    import torch

    target, done = None, 0
    for count, states in batches:
        plain = states.cpu()
        values = (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()
        if target is None:
            target = _mapped(path, (len(ids), *values.shape[1:]), values.dtype)
        target[done:count] = values
        yield (count - done) * ids.shape[1]
        done = count
    if target is not None:
        target.flush()


def _mapped(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    """A new array file, mapped, with all of its room: writing to a hole of one on a full disk is a SIGBUS."""
    import numpy as np

    target = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return target


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


def join_states(parts: Sequence[Path], target: Path) -> None:
    """Write the arrays of ``parts``, one after the other, as one to ``target``."""
    import numpy as np

    arrays = [np.load(part, mmap_mode="r") for part in parts]
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    with written(target) as file:
        whole = _mapped(file, shape, arrays[0].dtype)
        done = 0
        for array in arrays:
            whole[done : done + len(array)] = array
            done += len(array)
        whole.flush()
