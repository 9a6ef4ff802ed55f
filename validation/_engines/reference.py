"""The reference: what the checkpoint itself, run by transformers, says about the windows. Computed once, kept, shared.

Not the logits are kept but the final hidden states that enter the output head, [windows, scored positions, width] in the
checkpoint's dtype. With 256,000 entries and width 2,048 that is 1 MB a window, where llama-perplexity's base file takes
131 MB; ``Head`` turns them into float32 logits again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.config.schema import Corpus
from quantool.errors import DependencyError, SourceError
from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends
from quantool.runtime import arithmetic, process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import preloaded
from quantool.runtime.workspace import Stage, written
from quantool.validation._engines import memory, unpacked
from quantool.validation._engines.head import LOGIT_BYTES, Head, HeadPlan, plan_head
from quantool.validation._engines.layer_files import Unstreamable
from quantool.validation._engines.layer_stream import LayerStream
from quantool.validation._engines.windows import Windows, scored, windows

if TYPE_CHECKING:
    from torch import Tensor

TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""How a checkpoint is loaded: as it is stored, anything else (FP8) in bfloat16. See ``runtime.arithmetic`` for how it is run."""

REFERENCE = Depends(fields=("validation.context", "device"), libraries=("torch", "transformers"))
"""Hidden states on windows, which count by their hash."""
WHOLE = "whole"
BATCH_TOKENS = 2048
VERIFIED_POSITIONS = 32
LOGIT_TOLERANCE = 2**-6
"""Largest difference between the model's own logits and the recomputed ones, over the largest logit: four roundings to
bfloat16 (2^-8 each), which is what the model's own head and a soft cap lose."""


@dataclass(frozen=True)
class Reference:
    """The reference's hidden states on the windows of one corpus, and how to make logits of them."""

    windows: Windows
    hidden: Path
    head: HeadPlan
    key: str
    arithmetic: str
    """The dtype that its model computed in."""
    execution: str
    """Whether the model ran whole, see ``RunningModel``."""


def references(case: Case, corpora: Sequence[Corpus], progress: Progress) -> tuple[Reference, ...]:
    """The reference of each corpus, from the workspace where it is still the one of this source and text.

    Raises SourceError when transformers cannot load or run the source, or when its output head is of a kind whose
    logits cannot be recomputed; ConfigError like ``windows``.
    """
    cut = windows(case, corpora, progress)
    source = case.source
    stages = [
        Stage(
            f"reference/{part.corpus.name}",
            case.key(REFERENCE, part.sha256),
            (_file(case, part.corpus),),
        )
        for part in cut
    ]

    def produce(missing: list[int]) -> list[dict[str, Any]]:
        request = {
            "folder": str(source.folder),
            "dtype": TORCH_DTYPES.get(source.facts.dtype, "bfloat16"),
            "trust_remote_code": source.trust_remote_code,
            "device": case.config.device or "auto",
            "windows": [str(cut[number].path) for number in missing],
            "outputs": [str(_file(case, cut[number].corpus)) for number in missing],
        }
        log = case.workspace.logs / "reference.log"
        with progress.bar("reference", "tok") as bar:
            head = process.call(capture, request, log=log, bar=bar, failure=SourceError)
        return [head] * len(missing)

    heads = case.workspace.together(stages, produce)
    return tuple(
        Reference(
            part,
            stage.files[0],
            HeadPlan.of(head["head"]),
            str(stage.key),
            head["arithmetic"],
            head.get("execution", WHOLE),  # kept before models ran in any other way
        )
        for part, stage, head in zip(cut, stages, heads, strict=True)
    )


def _file(case: Case, corpus: Corpus) -> Path:
    return case.workspace.work / "reference" / f"{corpus.name}.hidden.npy"


@preloaded("transformers")
def capture(request: dict[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker: run the checkpoint on every file of ``windows`` and save its hidden states to ``outputs``."""
    import numpy as np

    folder, outputs = Path(request["folder"]), [Path(output) for output in request["outputs"]]
    texts = [np.load(path) for path in request["windows"]]
    with open_model(folder, request["dtype"], request, outputs[0].parent) as loaded:
        model = loaded.model
        plan = plan_head(model, folder)
        head = Head(folder, plan)
        for ids in texts:
            if ids.max() >= head.rows:
                raise SourceError(
                    f"the tokenizer gives id {ids.max()}, but the model has {head.rows} entries"
                )
        advance = adding(report, sum(text.size for text in texts))
        loaded.prepare(texts, advance, keep_logits=False)
        verify(model, head, texts[0][:1])
        for ids, output in zip(texts, outputs, strict=True):
            with written(output) as part:
                for tokens in _saved(model, ids, part):
                    advance(tokens * loaded.share)
        computed = str(model.dtype).removeprefix("torch.")
        return {"head": plan.fields(), "arithmetic": computed, "execution": loaded.execution}


def _saved(model: Any, ids: Any, path: Path) -> Iterator[int]:
    """Write the hidden states of the windows ``ids`` to ``path`` as they come; yields the tokens of each batch.

    As a NumPy array, bfloat16 as the uint16 of the same bits (NumPy has no bfloat16).
    """
    import numpy as np
    import torch

    target, done = None, 0
    for count, states in run(model, ids, keep_logits=False):
        plain = states.cpu()
        values = (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()
        if target is None:
            shape = (len(ids), *values.shape[1:])
            target = np.lib.format.open_memmap(path, mode="w+", dtype=values.dtype, shape=shape)
            with path.open("r+b") as file:  # writing to a hole of a mapped file on a full disk is a SIGBUS
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        target[done:count] = values
        yield (count - done) * ids.shape[1]
        done = count
    if target is not None:
        target.flush()


def read_hidden(path: Path) -> Any:
    """Hidden states [windows, scored, width] that ``_saved`` wrote, mapped, not read; see ``as_tensor``."""
    import numpy as np

    return np.load(path, mmap_mode="r")


def as_tensor(part: Any) -> Tensor:
    """A part of ``read_hidden``'s hidden states as a tensor, in the dtype that the model gave them."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(part))
    return values.view(torch.bfloat16) if values.dtype == torch.uint16 else values


@dataclass(frozen=True)
class RunningModel:
    """A model that is ready to run, whole or layer by layer."""

    model: Any
    stream: LayerStream | None
    execution: str
    """``whole``, ``layer by layer``, or ``whole: `` and why it is not layer by layer though memory is short."""

    @property
    def share(self) -> float:
        """The part of the work that is left to do after ``prepare``."""
        return self.stream.share if self.stream else 1.0

    def prepare(self, texts: Sequence[Any], advance: Callable[[float], None], *, keep_logits: bool) -> None:
        """Run the layers of a model that runs layer by layer on all that ``verify`` and ``run`` will ask of it."""
        if self.stream:
            every = [batch for ids in texts for batch in batches(self.model, ids, keep_logits=keep_logits)]
            self.stream.prepare([torch_ids(texts[0][:1]), *every], advance)


@contextmanager
def open_model(folder: Path, dtype: str, request: dict[str, Any], scratch: Path) -> Iterator[RunningModel]:
    """The model of ``folder`` as ``load_model`` gives it, or layer by layer where memory is short.

    Of the worker's ``request`` counts ``device``, ``trust_remote_code`` and, if it is there, ``by_layer``, which decides
    instead of the memory. ``scratch`` is a folder for hidden states.
    """
    on_gpu = uses_gpu(request["device"])
    trusted: bool = request["trust_remote_code"]
    execution = WHOLE
    by_layer = request.get("by_layer")
    if by_layer is None:
        by_layer = not memory.fits(folder, on_gpu=on_gpu)
    if by_layer:
        try:
            stream = LayerStream(folder, dtype, on_gpu=on_gpu, trust_remote_code=trusted, scratch=scratch)
        except Unstreamable as reason:
            execution = f"whole: {reason}"
        else:
            try:
                yield RunningModel(stream.model, stream, "layer by layer")
            finally:
                stream.close()
            return
    yield RunningModel(load_model(folder, dtype, request["device"], trusted), None, execution)


def adding(report: Callable[[float, float], None], total: int) -> Callable[[float], None]:
    """Report sums of what the calls are told, of ``total`` at most."""
    done = 0.0

    def advance(tokens: float) -> None:
        nonlocal done
        done = min(total, done + tokens)
        report(done, total)

    return advance


def uses_gpu(device: str) -> bool:
    """Whether the model runs on a GPU. Raises DependencyError when the device is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DependencyError("device is cuda, but torch finds none", hint="set device: cpu")
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def load_model(folder: Path, dtype: str, device: str, trust_remote_code: bool) -> Any:
    """A causal language model of ``folder``, every weight from its files, ready to run (on a CPU see ``arithmetic.widen``).

    Raises SourceError when transformers does not know it or a weight is missing (which transformers would fill with
    random numbers), DependencyError when the device is not there.
    """
    from transformers import AutoModelForCausalLM

    on_gpu = uses_gpu(device)
    try:
        loaded: Any = (
            unpacked.load_unpacked(folder, dtype, trust_remote_code)
            if unpacked.must_unpack(folder)
            else AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise SourceError(f"transformers cannot load {folder}: {error}") from error
    model, info = loaded
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise SourceError(f"{folder} lacks weights of {type(model).__name__}: {', '.join(absent[:5])}")
    if not on_gpu:
        arithmetic.widen(model)
    return model.eval().to("cuda" if on_gpu else "cpu")


def run(model: Any, ids: Any, *, keep_logits: bool) -> Iterator[tuple[int, Tensor]]:
    """Run ``ids`` [windows, context] in batches; yield the number of windows done and what was computed.

    That is, for the scored positions of the batch, the hidden states before the head [windows, scored, width] or, with
    ``keep_logits``, the logits [windows, scored, vocabulary].
    """
    import torch

    done = 0
    with torch.no_grad(), tapped(model, scored(ids.shape[1]), keep_logits=keep_logits) as seen:
        for batch in batches(model, ids, keep_logits=keep_logits):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits
            done += len(batch)
            yield done, logits if keep_logits else seen[-1]
            seen.clear()


def batches(model: Any, ids: Any, *, keep_logits: bool) -> Iterator[Tensor]:
    """The windows ``ids`` [windows, context] in the batches in which ``run`` runs them, on the CPU."""
    context = ids.shape[1]
    step = max(1, BATCH_TOKENS // context)
    if keep_logits:
        window_bytes = 4 * len(scored(context)) * len(model.get_output_embeddings().weight)
        step = max(1, min(step, LOGIT_BYTES // window_bytes))
    for start in range(0, len(ids), step):
        yield torch_ids(ids[start : start + step])


def torch_ids(ids: Any) -> Tensor:
    """Token ids as torch takes them."""
    import torch

    return torch.from_numpy(ids).long()


@contextmanager
def tapped(model: Any, positions: range, *, keep_logits: bool) -> Iterator[list[Tensor]]:
    """Note the head's input at ``positions`` in the list, and give the head no more than is asked for.

    Without ``keep_logits`` the head computes one position, which costs nothing.
    """
    seen: list[Tensor] = []

    def tap(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001
        states = inputs[0][:, positions.start : positions.stop]
        seen.append(states.detach().clone())
        return (states if keep_logits else states[:, -1:], *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(tap)
    try:
        yield seen
    finally:
        handle.remove()


def verify(model: Any, head: Head, ids: Any) -> None:
    """Compare recomputed logits with the model's own on the window ``ids`` [1, context].

    Raises SourceError naming the architecture when they differ by more than roundings: then the model does something
    to the head's output that ``transforms`` does not know.
    """
    import torch

    positions = scored(ids.shape[1])[-VERIFIED_POSITIONS:]
    with torch.no_grad(), tapped(model, positions, keep_logits=True) as seen:
        batch = torch_ids(ids).to(model.device)
        own = model(input_ids=batch, use_cache=False).logits[0].float().cpu()
    made = head.logits(seen[-1][0].cpu())
    if own.shape != made.shape or not torch.isfinite(own).all():
        raise SourceError(
            f"{type(model).__name__} gives logits {list(own.shape)} that are not finite or not its head's {list(made.shape)}"
        )
    off = float((own - made).abs().max() / own.abs().max())
    if off > LOGIT_TOLERANCE:
        raise SourceError(
            f"the logits of {type(model).__name__} cannot be recomputed from its output head"
            f" (they differ by {off:.1%} of the largest)",
            hint="quantool does not know what this architecture does after its head; please report it",
        )
