"""A model of transformers in parts: what lies around its decoder layers, with waypoints in their place, and each layer alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.formats.safetensors import TensorHeader, check_index
from quantool.validation._engines import unpacked

if TYPE_CHECKING:
    from torch import Tensor

READERS = 4
"""Weights that are read at once."""


class Unstreamable(Exception):  # noqa: N818 - an outcome: the model runs whole
    """The model cannot be run layer by layer; the message says why."""


class Arrival(Exception):  # noqa: N818 - a way out of the model's forward
    """The layer that a pass leads to has run."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class Route:
    """What the waypoints of one model do: pass on, give the states before a layer, run it and end the pass."""

    def __init__(self) -> None:
        self.busy = False
        """A pass is under way, so that the model's forward is not a caller's."""
        self._visited: list[int] | None = None
        self._target = 0
        self._module: Any = None
        self._before: Any = None
        self._rest: tuple[None, ...] | None = None

    def lead(self, target: int, module: Any, before: Any) -> None:
        """Lead the next pass to layer ``target``, which is ``module``; ``before`` is the layer before it, or its output."""
        self._target, self._module, self._before = target, module, before

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, the model's forward is a pass."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    @contextmanager
    def inspected(self) -> Iterator[list[int]]:
        """As ``taken``; every waypoint looks at what it gets, not only the one that runs a layer, and is noted in the list."""
        self._visited = []
        try:
            with self.taken():
                yield self._visited
        finally:
            self._visited = None

    def visit(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the waypoint ``number`` gives."""
        import torch

        if self._visited is not None:
            self._visited.append(number)
        if self._visited is not None or number == self._target:
            _require_plain(args, kwargs)
        if number == self._target:
            raise Arrival(self._run(self._module, args, kwargs))
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == self._target - 1:
            given = isinstance(self._before, torch.Tensor)
            hidden = self._before if given else self._run(self._before, args, kwargs)
        return hidden if self._rest is None else (hidden, *self._rest)

    def _run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The hidden states that a layer gives. Raises Unstreamable when it gives more."""
        output = module(*args, **kwargs)
        hidden: Tensor = output
        if isinstance(output, tuple):
            hidden, *rest = output
            if any(part is not None for part in rest):
                raise Unstreamable(f"{type(module).__name__} gives more than hidden states")
            self._rest = tuple(rest)
        return hidden


def _require_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise Unstreamable for an argument through which layers could hand each other what they computed."""
    import torch

    plain = (torch.Tensor, torch.dtype, torch.device, bool, int, float, str, type(None))
    named = [(f"argument {number}", value) for number, value in enumerate(args)]
    for name, value in [*named, *kwargs.items()]:
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, plain) for part in parts):
            raise Unstreamable(f"its layers share {name}, a {type(value).__name__}")


def decoder_layers(model: Any) -> tuple[str, Any]:
    """Name and ModuleList of a model's decoder layers. Raises Unstreamable when there is not one such list."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    own = [
        part
        for part in model.get_decoder().children()
        if isinstance(part, torch.nn.ModuleList) and len(part) == count
    ]
    if len(own) != 1:
        raise Unstreamable(f"{type(model).__name__} has {len(own)} lists of {count} layers")
    return next(name for name, part in model.named_modules() if part is own[0]), own[0]


def _cut_class(kind: Any, route: Route, kept: int | None) -> Any:
    """``kind``, a model class of transformers, with waypoints for its layers; with ``kept``, nothing but that layer."""

    class Cut(kind):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            path, layers = decoder_layers(self)
            for number in range(len(layers)):
                if number != kept:
                    layers[number] = _waypoint(number, layers[number], route)
            if kept is not None:
                _strip(self, path.split("."))

    Cut.__name__, Cut.__qualname__, Cut.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Cut


def _waypoint(number: int, layer: Any, route: Route) -> Any:
    """A module in the place of ``layer``, with its plain attributes (``attention_type``), which its model may read."""
    import torch

    class Waypoint(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return route.visit(number, args, kwargs)

    point = Waypoint()
    known = vars(point).keys()
    vars(point).update({name: value for name, value in vars(layer).items() if name not in known})
    return point


def _strip(model: Any, path: Sequence[str]) -> None:
    """Take all modules and tensors from ``model`` that are not on the ``path`` to its layers."""
    import torch

    model.all_tied_weights_keys = {}
    for step in path:
        for name, _ in list(model.named_children()):
            if name != step:
                setattr(model, name, torch.nn.Identity())
        for tensors in (model._parameters, model._buffers):  # noqa: SLF001 - of torch.nn.Module
            tensors.clear()
        model = getattr(model, step)


class LayerFiles:
    """A folder of weights, of which transformers makes parts of a model."""

    def __init__(self, folder: Path, dtype: str, device: str, *, trust_remote_code: bool) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self._folder, self._device = folder, device
        self._headers = check_index(folder)
        self._unpack = unpacked.must_unpack(folder)
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        method = unpacked.quantization(folder).get("quant_method", "compressed-tensors")
        if self._unpack:
            unpacked.check_layout(folder)
            del config.quantization_config
        elif method != "compressed-tensors":
            raise Unstreamable(f"weights of {method} are loaded whole")
        named = config.get_text_config().dtype if dtype == "auto" else getattr(torch, dtype)
        if not isinstance(named, torch.dtype):
            raise Unstreamable("its config.json names no dtype")
        self._dtype = named
        with torch.device("meta"):
            sketch: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=named, trust_remote_code=trust_remote_code
            )
        self._config, self._kind = sketch.config, type(sketch)
        self._path, _ = decoder_layers(sketch)
        self._part_of_layer = re.compile(rf"(?:^|\.){self._path.rpartition('.')[2]}\.(\d+)\.")
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: dict[int, dict[str, Future[Tensor]]] = {}

    def read_ahead(self, number: int) -> None:
        """Begin to read a layer into memory that a GPU copies from, while another one computes."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(READERS)
        stored = self._stored(self._headers_of(number))
        self._ahead = {number: {name: self._reader.submit(_pinned, value) for name, value in stored.items()}}

    def close(self) -> None:
        """End the reading."""
        self._ahead.clear()
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def load(self, route: Route, kept: int | None = None) -> Any:
        """The model without its layers, or (``kept``) only this layer of it, on the device.

        Raises SourceError when a weight is missing.
        """
        if kept is None:
            model, absent = self._loaded(route, kept, self._stored(self._headers))
        else:
            read = {name: value.result() for name, value in self._ahead.pop(kept, {}).items()}
            model, absent = self._loaded(route, kept, read or self._stored(self._headers_of(kept)))
            if absent:  # a layer whose weights have names that do not tell
                model, absent = self._loaded(route, kept, self._stored(self._headers))
        if absent:
            raise SourceError(
                f"{self._folder} lacks weights of {self._kind.__name__}: {', '.join(absent[:5])}"
            )
        return model

    def _headers_of(self, number: int) -> dict[str, TensorHeader]:
        return {name: tensor for name, tensor in self._headers.items() if self._number_of(name) == number}

    def _stored(self, headers: dict[str, TensorHeader]) -> dict[str, Any]:
        return unpacked.stored(self._folder, headers, self._dtype if self._unpack else None)

    def _number_of(self, name: str) -> int | None:
        number = self._part_of_layer.search(name)
        return None if number is None else int(number[1])

    def _loaded(self, route: Route, kept: int | None, weights: dict[str, Any]) -> tuple[Any, list[str]]:
        kind: Any = _cut_class(self._kind, route, kept)
        with _quiet():
            model, info = kind.from_pretrained(
                None,
                config=self._config,
                state_dict=weights,
                dtype=self._dtype,
                output_loading_info=True,
            )
        unpacked.decompress(model.to(self._device))
        return model, sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])


def _pinned(stored: Any) -> Tensor:
    """A stored weight in memory, locked there where there is a GPU, which copies from it eight times as fast."""
    import torch

    weight: Tensor = stored[...]
    return weight.pin_memory() if torch.cuda.is_available() else weight.clone()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings of the tensors that are for other layers."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
