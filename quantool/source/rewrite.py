"""The worker that writes an ordinary checkpoint from a quantized one, or from a base and an adapter, a few rows at a time.

Every weight is computed in float32 and rounded once, to the dtype that it is stored in. Memory does not depend on the size of
the checkpoint: a slice of one weight and its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.formats.json_file import read_json
from quantool.formats.quantized_weights import TRANSPOSED, PackedWeight
from quantool.formats.safetensors import SINGLE, TensorHeader, check_index, read_header
from quantool.formats.safetensors_layout import Stored, as_stored, by_shard, encode_in_order, write_index
from quantool.runtime.worker import Report, preloaded
from quantool.source.adapter import CONFIG, WEIGHTS, LoraAdapter, LowRank, read_adapter, require_fit
from quantool.source.quantized import Unpacking, quantization, read_unpacking, require_plain

if TYPE_CHECKING:
    from torch import Tensor

SLICE = 1 << 23
"""Elements of a weight that are computed at a time."""
PROBES = 4
"""Random vectors that a merged weight is multiplied with."""
FACTOR_ERROR = 0.02
"""How far the factor with which an adapter is found in the merged weights may be from 1: rounding to bf16 leaves 1e-3."""

LENGTH_ERROR = 0.01
"""The same of the length of a row of DoRA's."""


@dataclass(frozen=True)
class Preparation:
    """What becomes of the tensors of a checkpoint, ``headers``."""

    headers: Mapping[str, TensorHeader]
    unpacking: Unpacking | None = None
    adapter: LoraAdapter | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing has to be done."""
        return self.unpacking is None and self.adapter is None

    def shards(self) -> dict[str, list[Stored]]:
        """What is written, by file, in the order of the originals; files that hold nothing any more are left out."""
        made = {weight.stored.name: weight for weight in self.packed.values()}
        kept = (
            {tensor.name for tensor in self.unpacking.copied}
            if self.unpacking is not None
            else self.headers.keys()
        )
        found: dict[str, list[Stored]] = {}
        for shard, tensors in by_shard(self.headers).items():
            for tensor in tensors:
                if tensor.name in made:
                    weight = made[tensor.name]
                    found.setdefault(shard, []).append(Stored(weight.name, self.dtype, weight.shape))
                elif tensor.name in kept:
                    found.setdefault(shard, []).append(as_stored(tensor))
        return found if len(found) > 1 else dict.fromkeys([SINGLE], next(iter(found.values())))

    def made_headers(self) -> dict[str, TensorHeader]:
        """The headers that the checkpoint will have."""
        if self.is_plain:
            return dict(self.headers)
        found = {}
        for shard, stored in self.shards().items():
            _, starts = encode_in_order(stored)
            for tensor in stored:
                start = starts[tensor.name]
                found[tensor.name] = TensorHeader(
                    tensor.name, tensor.dtype, tensor.shape, shard, start, start + tensor.bytes
                )
        return found

    @property
    def packed(self) -> Mapping[str, PackedWeight]:
        """The weights to dequantize."""
        return self.unpacking.weights if self.unpacking is not None else {}

    @property
    def dtype(self) -> str:
        """Of those."""
        return self.unpacking.dtype if self.unpacking is not None else ""


def preparation_of(
    folder: Path, headers: Mapping[str, TensorHeader], adapter: tuple[Path, Mapping[str, TensorHeader]] | None
) -> Preparation:
    """The preparation of the checkpoint whose config.json is in ``folder``, and of an adapter (its folder and headers).

    Raises SourceError for what cannot be read, does not fit or is incomplete.
    """
    path = folder / "config.json"
    top = read_json(path)
    text = top.get("text_config")
    parts = (top, text) if isinstance(text, dict) else (top,)
    settings = quantization(path, *parts)
    preparation = Preparation(headers)
    if settings is None:
        require_plain(path, headers)
    else:
        dtype = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
        preparation = replace(preparation, unpacking=read_unpacking(path, settings, dtype, headers))
    if adapter is not None:
        added = read_adapter(adapter[0] / CONFIG, adapter[1])
        require_fit(
            added, {s.name: s for stored in preparation.shards().values() for s in stored}, str(folder)
        )
        preparation = replace(preparation, adapter=added)
    return preparation


@preloaded("torch")
def rewrite(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: write weights and index of ``folder`` (a checkpoint), with ``adapter`` (a folder, or null), below ``target``.

    Result: ``weights`` (how many were computed) and, with an adapter, ``factor``: how often it is found in the merged
    weights, which is once. Raises SourceError where a weight does not fit its target's range, ``weight_shape`` says
    another shape than the packed words, or the merged weights are not base and adapter.
    """
    folder, target = Path(request["folder"]), Path(request["target"])
    headers = check_index(folder)
    place = Path(request["adapter"]) if request["adapter"] else None
    parts = (place, {t.name: t for t in read_header(place / WEIGHTS)}) if place is not None else None
    preparation = preparation_of(folder, headers, parts)
    maker = _TensorMaker(
        preparation, _StoredTensors(folder), _StoredTensors(place) if place is not None else None
    )
    shards = preparation.shards()
    total = sum(tensor.bytes for stored in shards.values() for tensor in stored)
    done = 0
    for shard, stored in shards.items():
        with (target / shard).open("wb") as file:
            file.write(encode_in_order(stored)[0])
            for tensor in stored:
                for piece in maker.pieces(tensor):
                    file.write(piece)
                    done += len(piece)
                    report(done, total)
    write_index(target, shards)
    factor = _factor(maker, target, preparation.made_headers()) if preparation.adapter is not None else None
    return {"weights": len(preparation.packed) + len(maker.changed), "factor": factor}


class _StoredTensors:
    """Open weight files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}

    def slice(self, tensor: TensorHeader) -> Any:
        """A tensor of which ``[...]`` reads a part."""
        from safetensors import safe_open

        if tensor.file not in self._handles:
            self._handles[tensor.file] = safe_open(self.folder / tensor.file, framework="pt")
        return self._handles[tensor.file].get_slice(tensor.name)

    def whole(self, tensor: TensorHeader) -> Tensor:
        """A tensor."""
        self.slice(tensor)
        found: Tensor = self._handles[tensor.file].get_tensor(tensor.name)
        return found


@dataclass(frozen=True)
class _TensorMaker:
    """Computes the tensors of a preparation."""

    preparation: Preparation
    files: _StoredTensors
    adapter_files: _StoredTensors | None

    @property
    def changed(self) -> set[str]:
        """Weights that the adapter adds to or replaces."""
        adapter = self.preparation.adapter
        return {*adapter.added, *adapter.replaced} if adapter is not None else set()

    def pieces(self, tensor: Stored) -> Iterator[memoryview]:
        """The bytes of a tensor, some rows at a time."""
        import torch

        if not tensor.shape or not tensor.bytes:
            yield _bytes(self.files.whole(self.preparation.headers[tensor.name]))
            return
        rows, step = self.rows(tensor.name), self.step(tensor)
        wanted = _torch_dtype(tensor.dtype) if self.computes(tensor.name) else None
        for first in range(0, tensor.shape[0], step):
            values = rows(first, min(first + step, tensor.shape[0]))
            if wanted is not None:
                rounded = values.to(wanted)
                if torch.isinf(rounded).any() and not torch.isinf(values).any():
                    raise SourceError(
                        f"{tensor.name} reaches {float(values.abs().max()):g}, which {tensor.dtype} cannot hold"
                    )
                values = rounded
            yield _bytes(values)

    def computes(self, name: str) -> bool:
        """Whether the tensor is anything but a copy."""
        return name in self.preparation.packed or name in self.changed

    def step(self, tensor: Stored) -> int:
        """Rows to compute at a time."""
        weight = self.preparation.packed.get(tensor.name)
        least = weight.step if weight is not None else 1
        row = math.prod(tensor.shape[1:])
        return max(1, SLICE // max(1, row) // least) * least

    def rows(self, name: str) -> Callable[[int, int], Tensor]:
        """What reads rows of a tensor: as stored for a copy, else in float32 with what the adapter adds."""
        before = self.base_rows(name)
        adapter = self.preparation.adapter
        if adapter is None or name not in self.changed or self.adapter_files is None:
            return before
        if name in adapter.replaced:
            part = self.adapter_files.slice(adapter.replaced[name])
            return lambda first, last: part[first:last].float()
        pair = adapter.added[name]
        delta, lengths = self.delta(pair), self.lengths(pair)
        if lengths is None:
            return lambda first, last: before(first, last).float() + delta(first, last)

        def stretched(first: int, last: int) -> Tensor:
            whole = before(first, last).float() + delta(first, last)
            rows: Tensor = whole * (lengths[first:last] / whole.norm(dim=1)).unsqueeze(1)
            return rows

        return stretched

    def base_rows(self, name: str) -> Callable[[int, int], Tensor]:
        """The same without an adapter."""
        weight = self.preparation.packed.get(name)
        if weight is None:
            stored = self.files.slice(self.preparation.headers[name])
            return lambda first, last: stored[first:last]
        self._check_shape(weight)

        def read(part: str, rows: slice) -> Tensor:
            tensor = weight.parts[part]
            if not tensor.shape:
                return self.files.whole(tensor)
            turned = weight.layout in TRANSPOSED and len(tensor.shape) > 1
            found: Tensor = self.files.slice(tensor)[:, rows] if turned else self.files.slice(tensor)[rows]
            return found

        return lambda first, last: weight.numbers(read, first, last)

    def _check_shape(self, weight: PackedWeight) -> None:
        if "shape" in weight.parts:
            said = tuple(self.files.whole(weight.parts["shape"]).tolist())
            if said != weight.shape:
                raise SourceError(
                    f"{weight.parts['shape'].name} is {list(said)}, the packed words are of {list(weight.shape)}",
                    hint="the checkpoint is damaged: fetch it again",
                )

    def matrices(self, pair: LowRank) -> tuple[Tensor, Tensor]:
        """A and B of an adapter in float32."""
        if self.adapter_files is None:
            raise AssertionError
        return self.adapter_files.whole(pair.a).float(), self.adapter_files.whole(pair.b).float()

    def lengths(self, pair: LowRank) -> Tensor | None:
        """DoRA's lengths of rows in float32."""
        if pair.magnitude is None or self.adapter_files is None:
            return None
        return self.adapter_files.whole(pair.magnitude).float().reshape(-1)

    def delta(self, pair: LowRank) -> Callable[[int, int], Tensor]:
        """Rows of what an adapter adds."""
        a, b = self.matrices(pair)
        if pair.transposed:
            a, b = b.T, a.T
        return lambda first, last: (b[first:last] @ a) * pair.scale


def _factor(maker: _TensorMaker, target: Path, made: Mapping[str, TensorHeader]) -> float:
    """How often the adapter is in the weights that were written: 1, measured by multiplying with random vectors.

    ``merged x - base x`` is projected on what the adapter, not multiplied out, makes of the same ``x``. Raises SourceError
    naming a weight in which it is there more or less often than once.
    """
    import torch

    adapter, written = maker.preparation.adapter, _StoredTensors(target)
    if adapter is None:
        raise AssertionError
    generator = torch.Generator().manual_seed(0)
    shared = length = 0.0
    for name, pair in adapter.added.items():
        rows, columns = pair.shape
        a, b = (matrix.double() for matrix in maker.matrices(pair))
        vectors = torch.randn(columns, PROBES, generator=generator, dtype=torch.float64)
        expected = (a.T @ (b.T @ vectors) if pair.transposed else b @ (a @ vectors)) * pair.scale
        merged, base = written.slice(made[name]), maker.base_rows(name)
        step = maker.step(Stored(name, made[name].dtype, (rows, columns)))
        lengths = maker.lengths(pair)
        pieces = []
        for first in range(0, rows, step):
            last = min(first + step, rows)
            now, before = merged[first:last].double(), base(first, last).double()
            if lengths is not None:
                sums = before + pair.scale * (b[first:last] @ a)
                now = _unstretched(name, now, sums, lengths[first:last].double())
            pieces.append((now - before) @ vectors)
        seen = torch.cat(pieces)
        own, norm = float((seen * expected).sum()), float((expected**2).sum())
        if norm and abs(own / norm - 1) > max(FACTOR_ERROR, _rounding(merged, step, rows, norm)):
            raise SourceError(f"{name}: the adapter is {own / norm:.3f} times in the merged weight, not once")
        shared, length = shared + own, length + norm
    return shared / length if length else 1.0


def _unstretched(name: str, rows: Tensor, sums: Tensor, lengths: Tensor) -> Tensor:
    """Rows of DoRA's merged weight brought to the lengths of their ``sums``; SourceError where they have not its ``lengths``."""
    if bool(((rows.norm(dim=1) - lengths.abs()).abs() > LENGTH_ERROR * lengths.abs()).any()):
        raise SourceError(
            f"{name}: rows of the merged weight have not the lengths that the adapter gives them"
        )
    found: Tensor = rows * (sums.norm(dim=1) / lengths).unsqueeze(1)
    return found


def _rounding(merged: Any, step: int, rows: int, norm: float) -> float:
    """Six standard deviations of the factor that rounding the merged weight to bf16 (half an ulp: 2**-9) leaves."""
    squares = sum(float((merged[first : first + step].double() ** 2).sum()) for first in range(0, rows, step))
    noise = 2.0**-9 / math.sqrt(3) * math.sqrt(squares / max(1, rows))
    return 6 * noise / math.sqrt(norm)


def _torch_dtype(name: str) -> Any:
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[name]


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    found: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(found)
