"""Calibration shared by several processes, one for each GPU: who this one is, its samples, what all found together.

llmcompressor 0.14 does the rest when torch.distributed is initialized: rank 0 loads the weights into memory that all share,
each rank runs its own samples, their sums are reduced, and the layers to round are dealt out.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from quantool.errors import ConfigError

Item = TypeVar("Item")


def rank() -> int:
    """The number of this process; 0 for one that is alone."""
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def ranks() -> int:
    """How many there are."""
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@contextmanager
def connected(processes: int) -> Iterator[None]:
    """Inside, so many ``processes``, which torchrun has started, reach each other; nothing is done for one that is alone."""
    if processes == 1:
        yield
        return
    import torch
    from compressed_tensors.distributed import init_dist  # type: ignore[import-untyped]

    sharing: Any = torch.multiprocessing
    sharing.set_sharing_strategy("file_system")  # the other one keeps a file open for each tensor
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    if torch.cuda.is_available():
        init_dist()
    else:
        torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # a process that failed does not wait for the others: they are ended


def share(samples: Sequence[list[Item]]) -> list[list[Item]]:
    """Of samples of different lengths, those of this process: dealt out from the longest to the shortest, there and back.

    ConfigError when a process would get none.
    """
    if ranks() == 1:
        return [*samples]
    if len(samples) < ranks():
        raise ConfigError(
            f"the calibration text has {len(samples)} samples, too few for {ranks()} GPUs",
            hint="name fewer GPUs (device: cuda:0), or more text",
        )
    order = sorted(samples, key=len, reverse=True)
    turn = 2 * ranks()
    return [sample for place, sample in enumerate(order) if place % turn in (rank(), turn - 1 - rank())]


def gathered(value: Item) -> list[Item]:
    """What every process gives here, by rank."""
    import torch

    if ranks() == 1:
        return [value]
    found: list[Any] = [None] * ranks()
    torch.distributed.all_gather_object(found, value)
    return found
