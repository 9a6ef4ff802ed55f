"""Memory: whether a whole model fits into what is free, and batches that get smaller when a GPU's is full."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from quantool.formats.safetensors import check_index
from quantool.runtime import arithmetic, gpus
from quantool.runtime.machine import free_ram

SHARE = 0.7
"""Of the memory that is free, what a whole model may take; its activations and logits need the rest."""
BATCH_TOKENS = 2048
HALVINGS = 2

Result = TypeVar("Result")


def fits(folder: Path, *, on_gpu: bool) -> bool:
    """Whether the whole model of ``folder``, its weights unpacked, leaves room for its activations."""
    free = free_gpu() if on_gpu else free_ram()
    return unpacked_bytes(folder, on_gpu=on_gpu) <= SHARE * free


def unpacked_bytes(folder: Path, *, on_gpu: bool) -> int:
    """Bytes of all weights as they are computed with: floats on a GPU in 16 bits, on a CPU see ``arithmetic``."""
    short = 2 if on_gpu or "bfloat16" in arithmetic.native() else 4
    sizes = {"F32": 4, "F64": 8}
    levels = {"I32": 8}  # of four bits each, in a word
    return sum(
        tensor.elements * levels.get(tensor.dtype, 1) * sizes.get(tensor.dtype, short)
        for tensor in check_index(folder).values()
    )


def free_gpu() -> int:
    """Bytes that this process can have of the first GPU."""
    import torch

    free, total = torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
    return min(free, allowed - torch.cuda.memory_allocated())


class BatchSize:
    """How many tokens a model runs at once: half as many each time that the GPU's memory is full, twice at most."""

    def __init__(self, tokens: int = BATCH_TOKENS) -> None:
        self.tokens = tokens
        self._first = tokens

    def windows(self, context: int) -> int:
        """Windows of ``context`` tokens that run at once; one at least."""
        return max(1, self.tokens // context)

    @property
    def note(self) -> str:
        """What to add to the words on how the model ran; empty as long as its first size was right."""
        if self.tokens == self._first:
            return ""
        return f", in batches of {self.tokens} tokens instead of {self._first}: the GPU's memory was full"

    def with_room(self, context: int, work: Callable[[], Result]) -> Result:
        """The result of ``work``, tried again in batches of half as many tokens when the GPU's memory is full.

        What ``work`` has finished it must not do again. Raises DependencyError when batches of one window of ``context``
        tokens, or a quarter of the first size, are still too large.
        """
        import torch

        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                said = str(error).partition("\n")[0]
                least = max(context, self._first >> HALVINGS)
                if self.tokens // 2 < least:
                    raise gpus.full(f"{said} (batches of {self.tokens} tokens)") from error
                self.tokens //= 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
