"""A language model that runs layer after layer over all windows, so that two of its layers are the most that memory holds.

transformers makes the model, and it alone: what lies around the decoder layers is loaded once, with waypoints in the place
of the layers, and each layer by itself, through transformers' own conversion of weights (fused experts, quantized layers).
For every layer the model's own forward runs on every batch up to that layer, which so gets its own masks and position
embeddings; the waypoint before it gives what the layer before it gave.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.runtime import arithmetic
from quantool.validation._engines.layer_files import Arrival, LayerFiles, Route, Unstreamable, decoder_layers

if TYPE_CHECKING:
    from torch import Tensor

HELD_BYTES = 256 << 20
"""Hidden states kept in memory; the rest lie in a file."""
TRIAL_TOKENS = 64
REFUSALS = (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a model raises whose layers are not what a waypoint takes them for."""


class LayerStream:
    """``model``: a causal language model that computes like the whole one and never holds more than two of its layers.

    Call it as any model; ``prepare`` makes that cheap for batches that are known beforehand.
    """

    def __init__(
        self, folder: Path, dtype: str, *, on_gpu: bool, trust_remote_code: bool, scratch: Path
    ) -> None:
        """Load what lies around the layers, and prove on the first two that layers can run one by one.

        ``scratch`` is a folder for hidden states. Raises Unstreamable when they cannot, SourceError for missing weights.
        """
        self._device = "cuda" if on_gpu else "cpu"
        self._reads_ahead = on_gpu  # a CPU has one memory, and no time while it computes
        self._route = Route()
        self._states = _HiddenStates(scratch)
        self._numbers: dict[bytes, int] = {}
        try:
            self._files = LayerFiles(folder, dtype, self._device, trust_remote_code=trust_remote_code)
            self.model = self._placed(self._files.load(self._route))
            self.layers = len(decoder_layers(self.model)[1])
            self._prove()
        except REFUSALS as error:
            raise Unstreamable(
                f"its layers cannot run one by one ({type(error).__name__}: {error})"
            ) from error
        self._hook = self.model.register_forward_pre_hook(self._give_states, with_kwargs=True)

    def close(self) -> None:
        """Give back disk and memory; the model cannot be called any more."""
        import torch

        if self._reads_ahead:
            peak = torch.cuda.max_memory_allocated() / 1e9
            sys.stdout.write(f"layer by layer: at most {peak:.2f} GB of the GPU's memory\n")
        self._hook.remove()
        self._files.close()
        self._states.close()

    @property
    def share(self) -> float:
        """The part of all the work on a token that one layer is; what follows the layers counts as one more."""
        return 1 / (self.layers + 1)

    def prepare(self, batches: Sequence[Tensor], advance: Callable[[float], None] = lambda _: None) -> None:
        """Run all layers on ``batches`` (token ids [n, context]), one layer after the other.

        ``advance`` gets the tokens that are done, a layer of one as ``share``. Raises SourceError when a layer does what
        the first two do not: then the model can only be run whole.
        """
        fresh = {key: ids for ids in batches if (key := _key(ids)) not in self._numbers}
        numbers = {key: number for number, key in enumerate(fresh, len(self._numbers))}
        with ExitStack() as undo:
            undo.callback(self._states.forget, numbers.values())
            self._run(fresh, numbers, advance)
            undo.pop_all()
        self._numbers |= numbers

    def _run(
        self, fresh: Mapping[bytes, Tensor], numbers: Mapping[bytes, int], advance: Callable[[float], None]
    ) -> None:
        """Run all layers on the ids ``fresh``, whose states are kept under ``numbers``."""
        for layer in range(self.layers if fresh else 0):
            with self._layer(layer) as module:
                if self._reads_ahead and layer + 1 < self.layers:
                    self._files.read_ahead(layer + 1)
                for key, ids in fresh.items():
                    before = self._states.read(numbers[key]) if layer else None
                    try:
                        states = self._pass(ids, layer, module, before)
                    except Unstreamable as reason:
                        raise SourceError(
                            f"layer {layer} of {type(self.model).__name__} cannot run by itself: {reason}",
                            hint="this model needs memory for all of its weights",
                        ) from reason
                    self._states.write(numbers[key], states)
                    advance(ids.numel() * self.share)

    def _give_states(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        """Before a forward of the model: let its last waypoint give what all layers make of these ids."""
        if self._route.busy:
            return
        ids = kwargs["input_ids"]
        self.prepare([ids])
        self._route.lead(self.layers, None, self._states.read(self._numbers[_key(ids)]))

    def _pass(self, ids: Tensor, number: int, module: Any, before: Any) -> Tensor:
        """What layer ``number`` gives in the model's own forward, where the one before it gives ``before`` (or is it)."""
        import torch

        self._route.lead(number, module, before)
        try:
            with torch.no_grad(), self._route.taken():
                self.model(input_ids=ids.to(self.model.device), use_cache=False)
        except Arrival as arrival:
            return arrival.output
        raise Unstreamable("the model's forward leaves it out")

    @contextmanager
    def _layer(self, number: int) -> Iterator[Any]:
        """Layer ``number``, whose memory is given back at the end.

        Nobody else does in time: modules refer to each other, quantized ones to themselves (compressed-tensors binds their
        forward to them), and the garbage collector counts objects, of which a layer of 400 MB has few.
        """
        module = self._placed(decoder_layers(self._files.load(self._route, number))[1][number])
        try:
            yield module
        finally:
            for part in module.modules():
                part._parameters.clear()  # noqa: SLF001 - of torch.nn.Module
                part._buffers.clear()  # noqa: SLF001

    def _placed(self, module: Any) -> Any:
        if self._device == "cpu":
            arithmetic.widen(module)
        return module.eval().to(self._device)

    def _prove(self) -> None:
        """Compare the first two layers, one by one, with both in one forward; raises Unstreamable, or one of REFUSALS.

        Another text goes through the first in between, so that nothing is left of the own one outside its states.
        """
        import torch

        size = min(TRIAL_TOKENS, self.model.get_input_embeddings().num_embeddings)
        ids = torch.arange(size).unsqueeze(0)
        with self._layer(0) as first:
            alone = self._pass(ids, 0, first, None)
            if self.layers > 1:
                self._pass(ids.flip(1), 0, first, None)
                with self._layer(1) as second:
                    apart = self._pass(ids, 1, second, alone)
                    if not torch.equal(apart, self._pass(ids, 1, second, first)):
                        raise Unstreamable("its layers give other results one by one than together")
        self._route.lead(self.layers, None, alone)
        with torch.no_grad(), self._route.inspected() as visited:
            self.model(input_ids=ids.to(self.model.device), use_cache=False)
        if visited != list(range(self.layers)):
            raise Unstreamable(f"its forward goes through its {self.layers} layers in the order {visited}")


def _key(ids: Tensor) -> bytes:
    values = ids.cpu().long()
    return bytes(str(tuple(values.shape)), "ascii") + values.numpy().tobytes()


@dataclass(frozen=True)
class _Slot:
    """Where hidden states lie in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: Any
    device: Any


class _HiddenStates:
    """Hidden states by number: the first in memory, on their device; those beyond ``HELD_BYTES`` in a file without name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[int, Tensor] = {}
        self._room = HELD_BYTES
        self._file: Any = None
        self._slots: dict[int, _Slot] = {}

    def write(self, number: int, states: Tensor) -> None:
        """Keep ``states``, which have one shape and dtype for a number at all times. OSError when the disk is full."""
        import torch

        size = states.numel() * states.element_size()
        if number not in self._slots and (number in self._held or size <= self._room):
            self._room -= 0 if number in self._held else size
            self._held[number] = states
            return
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as the model
        if number not in self._slots:
            end = self._file.seek(0, os.SEEK_END)
            self._slots[number] = _Slot(end, tuple(states.shape), states.dtype, states.device)
        self._file.seek(self._slots[number].offset)
        self._file.write(states.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def forget(self, numbers: Iterable[int]) -> None:
        """Drop what was written under ``numbers``, which may have other shapes next time."""
        for number in numbers:
            self._slots.pop(number, None)
            if (states := self._held.pop(number, None)) is not None:
                self._room += states.numel() * states.element_size()

    def close(self) -> None:
        """Forget all states."""
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def read(self, number: int) -> Tensor:
        """What was written last, on the device that it came from."""
        import torch

        if number in self._held:
            return self._held[number]
        slot = self._slots[number]
        states = torch.empty(slot.shape, dtype=slot.dtype)
        self._file.seek(slot.offset)
        self._file.readinto(states.flatten().view(torch.uint8).numpy().data)
        return states.to(slot.device)
