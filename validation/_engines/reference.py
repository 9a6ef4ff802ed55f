"""The reference: what the checkpoint itself, run by transformers, says about the windows. Computed once, kept, shared.

Not the logits are kept but the final hidden states that enter the output head, [windows, scored positions, width] in the
checkpoint's dtype. With 256,000 entries and width 2,048 that is 1 MB a window, where llama-perplexity's base file takes
131 MB; ``Head`` turns them into float32 logits again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.config.schema import Corpus
from quantool.errors import DependencyError, SourceError
from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends
from quantool.runtime import arithmetic
from quantool.runtime.gpus import devices
from quantool.runtime.progress import Progress
from quantool.runtime.worker import preloaded
from quantool.runtime.workspace import Stage, written
from quantool.validation._engines import memory, unpacked
from quantool.validation._engines.head import LOGIT_BYTES, Head, HeadPlan, plan_head
from quantool.validation._engines.hidden_states import save_states
from quantool.validation._engines.layer_files import Unstreamable
from quantool.validation._engines.layer_stream import LayerStream
from quantool.validation._engines.memory import BatchSize
from quantool.validation._engines.spans import Span, drop_parts, growing_file, in_shares, places_of, spans_of
from quantool.validation._engines.windows import Windows, scored, windows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""How a checkpoint is loaded: as it is stored, anything else (FP8) in bfloat16. See ``runtime.arithmetic`` for how it is run."""

REFERENCE = Depends(fields=("validation.context", "device"), libraries=("torch", "transformers"))
"""Hidden states on windows, which count by their hash."""
WHOLE = "whole"
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
    stages = [
        Stage(
            f"reference/{part.corpus.name}",
            case.key(REFERENCE, part.sha256),
            (_file(case, part.corpus),),
        )
        for part in cut
    ]

    def produce(missing: list[int]) -> list[dict[str, Any]]:
        kept = [(cut[number], stages[number]) for number in missing]
        head = _computed(case, [part for part, _ in kept], [str(stage.key) for _, stage in kept], progress)
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


def _computed(
    case: Case, texts: Sequence[Windows], keys: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Compute the hidden states of ``texts``, kept under ``keys``; a run that was broken off goes on behind its last span."""
    files = [_file(case, text.corpus) for text in texts]
    every = spans_of([text.count for text in texts], case.settings.context)
    growing = [growing_file(file, key) for file, key in zip(files, keys, strict=True)]
    # Of the worker's account of the model nothing is kept: with nothing missing it makes the last span again.
    known = [
        span.part(files[span.text], keys[span.text]).is_file() and growing[span.text].is_file()
        for span in every
    ]
    missing = [span for span, done in zip(every, known, strict=True) if not done] or every[-1:]

    def request(share: Sequence[Span]) -> dict[str, Any]:
        return {
            "folder": str(case.source.folder),
            "dtype": TORCH_DTYPES.get(case.source.facts.dtype, "bfloat16"),
            "trust_remote_code": case.source.trust_remote_code,
            "device": devices(case.config.device).kind,
            "windows": [str(text.path) for text in texts],
            "spans": [astuple(span) for span in share],
            "states": [str(place) for place in growing],
            "outputs": [str(span.part(files[span.text], keys[span.text])) for span in share],
        }

    log = case.workspace.logs / "reference.log"
    with progress.bar("reference", "tok") as bar:
        hands = devices(case.config.device).each()
        heads = in_shares(capture, missing, request, hands, log=log, bar=bar, failure=SourceError)
    for file, place in zip(files, growing, strict=True):
        with written(file) as part:
            place.replace(part)
    drop_parts(files)
    return heads[0] | {"execution": ", ".join(dict.fromkeys(head["execution"] for head in heads))}


def _file(case: Case, corpus: Corpus) -> Path:
    return case.workspace.work / "reference" / f"{corpus.name}.hidden.npy"


@preloaded("transformers")
def capture(request: dict[str, Any], report: Callable[[float, float], None]) -> dict[str, Any]:
    """Worker: run the checkpoint on every file of ``windows`` and save its hidden states to ``outputs``.

    With ``spans`` ([text, first, last]: see ``spans.Span``), on these parts of the files: all go to the file of the text in
    ``states``, which other processes write too, and each has an output of its own, an empty file, when it is there.
    """
    folder, outputs = Path(request["folder"]), [Path(output) for output in request["outputs"]]
    texts = texts_of(request)
    with open_model(folder, request["dtype"], request, outputs[0].parent) as loaded:
        model = loaded.model
        plan = plan_head(model, folder)
        head = Head(folder, plan, device=model.device)
        for ids in texts:
            if ids.max() >= head.rows:
                raise SourceError(
                    f"the tokenizer gives id {ids.max()}, but the model has {head.rows} entries"
                )
        advance = adding(report, sum(text.size for text in texts))
        waiting = list(zip(texts, outputs, places_of(request), strict=True))

        def save_all() -> None:
            loaded.prepare([ids for ids, *_ in waiting], advance, keep_logits=False)
            verify(model, head, waiting[0][0][:1])
            while waiting:
                ids, output, place = waiting[0]
                states = run(model, ids, loaded.size, keep_logits=False)
                with written(output) as part:
                    part.touch()
                    for tokens in save_states(states, ids, *(place or [part])):
                        advance(tokens * loaded.share)
                del waiting[0]

        loaded.size.with_room(texts[0].shape[1], save_all)
        computed = str(model.dtype).removeprefix("torch.")
        return {"head": plan.fields(), "arithmetic": computed, "execution": loaded.execution}


def texts_of(request: dict[str, Any]) -> list[NDArray[np.int32]]:
    """Window ids [windows, context] of what a worker is to run: its ``windows`` files, or the ``spans`` of them."""
    import numpy as np

    files = [np.load(path) for path in request["windows"]]
    if "spans" not in request:
        return files
    return [files[text][first:last] for text, first, last in request["spans"]]


@dataclass(frozen=True)
class RunningModel:
    """A model that is ready to run, whole or layer by layer."""

    model: Any
    stream: LayerStream | None
    way: str
    """``whole``, ``layer by layer``, or ``whole: `` and why it is not layer by layer though memory is short."""
    size: BatchSize = field(default_factory=BatchSize)

    @property
    def execution(self) -> str:
        """How it ran: the ``way``, and in what batches where not in those of the first size."""
        return f"{self.way}{self.size.note}"

    @property
    def share(self) -> float:
        """The part of the work that is left to do after ``prepare``."""
        return self.stream.share if self.stream else 1.0

    def prepare(self, texts: Sequence[Any], advance: Callable[[float], None], *, keep_logits: bool) -> None:
        """Run the layers of a model that runs layer by layer on all that ``verify`` and ``run`` will ask of it."""
        if self.stream:
            every = [
                batch
                for ids in texts
                for batch in batches(self.model, ids, self.size, keep_logits=keep_logits)
            ]
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
        if not by_layer and on_gpu and (model := _load_where_room(folder, dtype, request)) is not None:
            yield RunningModel(model, None, WHOLE)
            return
        by_layer = by_layer or on_gpu  # another process has taken the room in between
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


def _load_where_room(folder: Path, dtype: str, request: dict[str, Any]) -> Any | None:
    """As ``load_model``; None where the GPU has less room than it said."""
    import torch

    try:
        return load_model(folder, dtype, request["device"], request["trust_remote_code"])
    except torch.OutOfMemoryError:
        gc.collect()
        return None


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
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                device_map="cuda" if on_gpu and find_spec("accelerate") else None,  # without a stay in memory
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
        return model.eval()
    unpacked.decompress(model.to("cuda"))
    return model.eval()


def run(
    model: Any, ids: Any, size: BatchSize | None = None, *, keep_logits: bool
) -> Iterator[tuple[int, Tensor]]:
    """Run ``ids`` [windows, context] in batches; yield the number of windows done and what was computed.

    That is, for the scored positions of the batch, the hidden states before the head [windows, scored, width] or, with
    ``keep_logits``, the logits [windows, scored, vocabulary].
    """
    import torch

    done = 0
    with torch.no_grad(), tapped(model, scored(ids.shape[1]), keep_logits=keep_logits) as seen:
        for batch in batches(model, ids, size, keep_logits=keep_logits):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits
            done += len(batch)
            yield done, logits if keep_logits else seen[-1]
            seen.clear()


def batches(model: Any, ids: Any, size: BatchSize | None = None, *, keep_logits: bool) -> Iterator[Tensor]:
    """The windows ``ids`` [windows, context] in the batches in which ``run`` runs them, on the CPU."""
    context = ids.shape[1]
    step = (size or BatchSize()).windows(context)
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
    made = head.logits(seen[-1][0]).cpu()
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
