"""The converter's tensors, prepared by threads ahead of the one that writes them; the bytes are upstream's.

Upstream prepares a tensor (read, widen to float32, permute or merge, round) when the writer comes to it, in NumPy and on
one core. Here the next ones are prepared meanwhile, as many as ``room`` bytes hold. Rounding to 16 bits is torch's, which
needs a third to a fifth of NumPy's time, and goes without the float32 copy where nothing but widening lies between (most
of the bytes of a checkpoint). Both round to the nearest even, so that finite values get the same bits.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

THREADS = 8
"""More than fill the page cache faster than any disk is."""
SLACK = 256 << 20
"""Bytes that may be in flight beside twice the largest tensor."""


def room(elements: int, stored: int) -> int:
    """Bytes that prepared tensors may take when the largest has so many elements, stored in so many bytes."""
    return 2 * _cost(elements, stored) + SLACK


def _cost(elements: int, stored: int) -> int:
    """Bytes of a tensor while it is prepared: as float32 and as stored."""
    return 4 * elements + stored


def cores() -> int:
    """Threads that prepare tensors on this machine."""
    return min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, THREADS
    )


class _Prepared:
    """A tensor of upstream's writer that is prepared elsewhere; it has what the writer asks of one."""

    def __init__(self, lazy: Any, line: _Line, elements: int) -> None:
        self.nbytes = int(lazy.nbytes)
        self._lazy, self._line = lazy, line
        self.cost = _cost(elements, self.nbytes)
        self.task: Future[Any] | None = None

    def prepare(self) -> Any:
        """The array as it is stored, in the order of the file."""
        import numpy as np

        lazy, self._lazy = self._lazy, None
        return np.ascontiguousarray(type(lazy).to_eager(lazy))  # what it was made of goes with ``lazy``

    def bytes(self) -> int:
        """What it takes at present."""
        return self.nbytes if self.task is not None and self.task.done() else self.cost

    def tofile(self, file: Any) -> None:
        """Write it, and let the next ones be prepared."""
        self._line.first(self).result().tofile(file)
        self._line.drop()


class _Line:
    """Tensors in the order in which they will be written."""

    def __init__(self, pool: ThreadPoolExecutor, limit: int) -> None:
        self.waiting: deque[_Prepared] = deque()
        self._begun: deque[_Prepared] = deque()
        self._pool, self._limit = pool, limit

    def fill(self) -> None:
        """Begin with as many tensors as there is room for, one at least."""
        taken = sum(tensor.bytes() for tensor in self._begun)
        while self.waiting and (not self._begun or taken + self.waiting[0].cost <= self._limit):
            tensor = self.waiting.popleft()
            tensor.task = self._pool.submit(tensor.prepare)
            self._begun.append(tensor)
            taken += tensor.cost

    def first(self, tensor: _Prepared) -> Future[Any]:
        """The work on the tensor that is written now, which is the first that was begun."""
        self.fill()
        if self._begun[0] is not tensor or tensor.task is None:
            raise AssertionError("the writer takes tensors in another order than it lists them")
        return tensor.task

    def drop(self) -> None:
        """The first was written."""
        self._begun.popleft().task = None


@contextmanager
def prepared_ahead(writer: Any, gguf: Any, threads: int) -> Iterator[None]:
    """Let the lazy tensors of upstream's ``writer`` be prepared by ``threads`` while it writes others.

    Tensors that upstream writes in chunks, to hold one at a time, stay as they are.
    """
    import torch

    def begin() -> None:  # both are settings of a thread
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    infos = [info for shard in writer.tensors for info in shard.values()]
    lazy = [info for info in infos if isinstance(info.tensor, gguf.LazyNumpyTensor)]
    largest = max(lazy, key=lambda info: info.nbytes, default=None)
    limit = room(_elements(largest), largest.nbytes) if largest is not None else 0
    pool = ThreadPoolExecutor(threads, "prepare", begin)
    try:
        line = _Line(pool, limit)
        for info in lazy:
            info.tensor = _Prepared(info.tensor, line, _elements(info))
            line.waiting.append(info.tensor)
        yield
    finally:
        pool.shutdown(cancel_futures=True)


def _elements(info: Any) -> int:
    """Number of values of a tensor that the writer lists."""
    count = 1
    for size in info.shape:
        count *= int(size)
    return count


def round_with_torch(gguf: Any) -> None:
    """Let lazy float32 tensors be rounded to f16 and bf16 by torch; upstream looks ``gguf.quants.quantize`` up anew."""
    import numpy as np
    import torch

    kinds = gguf.GGMLQuantizationType
    upstream = gguf.quants.quantize

    def quantize(data: Any, kind: Any) -> Any:
        is_wide = isinstance(data, gguf.LazyNumpyTensor) and data.dtype == np.float32 and len(data.shape)
        if kind not in (kinds.F16, kinds.BF16) or not is_wide:
            return upstream(data, kind)
        dtype: type[np.generic] = np.float16
        shape = tuple(data.shape)
        if kind == kinds.BF16:
            dtype, shape = np.uint8, gguf.quant_shape_to_byte_shape(shape, kind)
        short = torch.float16 if kind == kinds.F16 else torch.bfloat16

        def rounded(wide: Any) -> Any:
            tensor = wide if isinstance(wide, torch.Tensor) else torch.from_numpy(wide)
            result = tensor.to(short).contiguous()
            return result.numpy() if kind == kinds.F16 else result.view(torch.uint8).numpy()

        meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape(dtype, shape)
        return gguf.LazyNumpyTensor(meta=meta, args=(_before_widening(data),), func=rounded)

    gguf.quants.quantize = quantize


def _before_widening(data: Any) -> Any:
    """The lazy bf16 tensor that float32 ``data`` is, when nothing but ``.to(torch.float32)`` lies between; else ``data``.

    Lazy tensors keep what they are made of in ``_args``: ``data`` is a torch tensor's ``numpy()``, that one's arguments
    are a tensor and the dtype it is cast to.
    """
    import torch

    match data._args:  # noqa: SLF001 - upstream's, whose commit is fixed; another shape is passed over
        case (wide,) if hasattr(wide, "_args") and not wide._kwargs:  # noqa: SLF001
            match wide._args:  # noqa: SLF001
                case (short, torch.float32) if (
                    hasattr(short, "_meta") and short.dtype == torch.bfloat16 and short.shape == wide.shape
                ):
                    return short
    return data
