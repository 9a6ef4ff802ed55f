"""Sums of squared activations, taken through llama.cpp's ``cb_eval`` hook where they lie: in memory, or on the GPU.

What imatrix.cpp of llama.cpp (tools/imatrix) copies to the host and adds up there, value by value, torch adds up in place:
a GPU's tensors are read at their address by torch's CUDA, which shares the process with llama.cpp's. Products that read the
same activations (query, key and value; gate and up) are counted from one sum.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantool.errors import DependencyError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MIN_BATCH = 16  # imatrix.cpp ignores smaller matrix products
F32 = 0  # ggml.h: GGML_TYPE_F32


class GgmlTensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h; its size is compared with ``ggml_tensor_overhead()`` before use."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * 10),
    ("view_src", ctypes.POINTER(GgmlTensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]
OBJECT_SIZE = 32  # ggml.c: sizeof(struct ggml_object), part of the overhead


@dataclass
class _Shared:
    """The last activations that were summed, and the weights whose products read them."""

    address: int
    """Of their ``struct ggml_tensor``, which the next graph may use for others."""
    sums: Tensor
    rows: int
    names: set[str] = field(default_factory=set)


class Collector:
    """Sums of squares by weight name, float32 [matrices, columns], and rows counted, int64 [matrices].

    They lie where the activations do.
    """

    def __init__(self) -> None:
        library = ggml_library()
        if library.ggml_tensor_overhead() != ctypes.sizeof(GgmlTensor) + OBJECT_SIZE:
            raise DependencyError("this llama-cpp-python has another struct ggml_tensor than quantool knows")
        operations = {library.ggml_op_name(number): number for number in range(60)}
        self.dense, self.sparse = operations[b"MUL_MAT"], operations[b"MUL_MAT_ID"]
        self.library = library
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.failure: BaseException | None = None
        self._shared: _Shared | None = None

    def callback(self, pointer: int, ask: bool, _data: object) -> bool:
        """``ggml_backend_sched_eval_callback``: nothing may be raised through C."""
        try:
            return self._visit(ctypes.cast(pointer, ctypes.POINTER(GgmlTensor)).contents, ask=ask)
        except BaseException as error:  # noqa: BLE001 - kept and raised outside
            self.failure = error
            return False

    def forget(self) -> None:
        """What was computed is gone."""
        self._shared = None

    def _visit(self, tensor: GgmlTensor, *, ask: bool) -> bool:
        if tensor.op not in (self.dense, self.sparse):
            return not ask
        weight, values = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        name = name.split("#")[1] if "#" in name else name
        if ask:
            if tensor.op == self.sparse:
                return True
            wanted = values.ne[1] >= MIN_BATCH and values.type == F32 and name.startswith("blk.")
            return bool(wanted and not self._known(name, weight, ctypes.addressof(values)))
        squares = self._view(values, "float32").square()  # [ne3, ne2, ne1, ne0]
        if tensor.op == self.sparse:
            experts = self._view(tensor.src[2].contents, "int32")[0, 0]  # [tokens, experts used]
            self._add_sparse(name, weight, squares[0], experts)
        else:
            self._add_dense(name, weight, squares, ctypes.addressof(values))
        if squares.is_cuda:
            import torch

            torch.cuda.current_stream(
                squares.device
            ).synchronize()  # before llama.cpp writes over what is read here
        return True

    def _known(self, name: str, weight: GgmlTensor, address: int) -> bool:
        """Whether the product's activations are those summed last, which then count for this weight, too.

        A name that was counted from them comes again in the next graph, whose tensors may have the same addresses.
        """
        shared = self._shared
        if shared is None or shared.address != address or name in shared.names or _matrices(weight) != 1:
            return False
        self._add(name, shared.sums[None], shared.sums.new_full((1,), shared.rows, dtype=_long()))
        shared.names.add(name)
        return True

    def _view(self, tensor: GgmlTensor, dtype: str) -> Tensor:
        """A tensor's values [ne3, ne2, ne1, ne0] where they lie; on the CPU when they lie where torch cannot read them."""
        import torch

        kind: torch.dtype = getattr(torch, dtype)
        size = self.library.ggml_nbytes(ctypes.byref(tensor))
        buffer = tensor.view_src.contents.buffer if tensor.view_src else tensor.buffer
        if self.library.ggml_backend_buffer_is_host(buffer):
            flat = torch.frombuffer((ctypes.c_char * size).from_address(tensor.data), dtype=kind)
        elif _is_cuda(self.library.ggml_backend_buffer_name(buffer)):
            flat = torch.as_tensor(_OnGpu(tensor.data, size // kind.itemsize, kind), device="cuda")
        else:
            flat = torch.empty(size // kind.itemsize, dtype=kind)
            self.library.ggml_backend_tensor_get(ctypes.byref(tensor), flat.data_ptr(), 0, size)
        strides = [step // kind.itemsize for step in reversed(tensor.nb)]
        return flat.as_strided([*reversed(tensor.ne)], strides)

    def _add(self, name: str, sums: Tensor, counts: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += sums.to(self.sums[name].device)
            self.counts[name] += counts.to(self.counts[name].device)
        else:
            self.sums[name], self.counts[name] = sums.clone(), counts.clone()

    def _add_sparse(self, name: str, weight: GgmlTensor, squares: Tensor, experts: Tensor) -> None:
        """A mixture of experts: each token's row counts for the experts that it was sent to."""
        total = weight.ne[2]
        tokens, used = experts.shape
        chosen = experts.long().flatten()
        rows = squares.expand(tokens, used, -1).flatten(0, 1)  # one row a token, or one a token and expert
        self._add(name, by_expert(rows, chosen, total), chosen.bincount(minlength=total))

    def _add_dense(self, name: str, weight: GgmlTensor, squares: Tensor, address: int) -> None:
        matrices = _matrices(weight)
        of_blocks = squares.sum(2)  # [ne3, ne2, columns]
        rows = squares.shape[0] * squares.shape[1] * squares.shape[2] // matrices
        sums = squares.new_zeros(matrices, squares.shape[-1])
        for outer, blocks in enumerate(of_blocks):
            for inner, block in enumerate(blocks):
                sums[(outer % weight.ne[3]) * weight.ne[2] + inner % weight.ne[2]] += block
        self._add(name, sums, sums.new_full((1,), rows, dtype=_long()))
        self._shared = _Shared(address, sums[0], rows, {name}) if matrices == 1 else None


def by_expert(rows: Tensor, experts: Tensor, total: int) -> Tensor:
    """Sums [total, columns] of the ``rows`` [n, columns] of each of ``experts`` [n]; the same at every run."""
    import torch

    if rows.is_cuda:  # where adding by index has no order
        chosen = torch.nn.functional.one_hot(experts, total).T.to(rows)
        return chosen @ rows
    return rows.new_zeros(total, rows.shape[1]).index_add_(0, experts, rows)


class _OnGpu:
    """An array of a GPU by its address, as CUDA libraries hand them to each other (CUDA Array Interface, version 3)."""

    def __init__(self, address: int, length: int, dtype: torch.dtype) -> None:
        import torch

        self.__cuda_array_interface__ = {
            "shape": (length,),
            "typestr": {torch.float32: "<f4", torch.int32: "<i4"}[dtype],
            "data": (address, False),
            "version": 3,
        }


def ggml_library() -> Any:
    from llama_cpp._ggml import libggml_base_path

    library = ctypes.CDLL(str(libggml_base_path / "libggml-base.so"))
    library.ggml_op_name.restype = ctypes.c_char_p
    for name in ("ggml_tensor_overhead", "ggml_nbytes"):
        getattr(library, name).restype = ctypes.c_size_t
    library.ggml_nbytes.argtypes = [ctypes.c_void_p]
    library.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
    ]  # fmt: skip
    library.ggml_backend_buffer_is_host.argtypes = library.ggml_backend_buffer_name.argtypes = [
        ctypes.c_void_p
    ]
    library.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    library.ggml_backend_buffer_name.restype = ctypes.c_char_p
    return library


def _is_cuda(buffer: bytes) -> bool:
    """Whether torch can read what lies in a buffer of llama.cpp of this name (``CUDA0``)."""
    import torch

    return buffer.startswith(b"CUDA") and b"Split" not in buffer and torch.cuda.is_available()


def _matrices(weight: GgmlTensor) -> int:
    return int(weight.ne[2] * weight.ne[3])


def _long() -> torch.dtype:
    import torch

    return torch.int64
