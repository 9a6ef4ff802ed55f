"""The reference's output head, apart from its model: log-probabilities from stored hidden states, and the comparison.

Hidden states of a 256,000-entry vocabulary take a 1/64 to a 1/128 of the float32 logits, and no digit is lost: the head's
weight is read from the checkpoint and multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import SourceError
from quantool.validation._findings.statistics import Tokens

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

HELD_BYTES = (
    256 << 20
)  # a float32 head up to this size is kept; a larger one is converted in slices, each time
SLICE_BYTES = 16 << 20
BLOCK_BYTES = 4 << 20  # float32 work space of one comparison, small enough for a processor's cache
GPU_BLOCK_BYTES = 128 << 20  # the same on a GPU, whose memory is as fast everywhere

LOGIT_BYTES = 128 << 20  # float32 logits held at once, of all models together

Place = tuple[str, str]
"""File and tensor name in a checkpoint."""


class Unsound(Exception):  # noqa: N818 - an outcome, not a failure of ours
    """The artifact cannot be scored: it does not load, or has another vocabulary."""


@dataclass(frozen=True)
class HeadPlan:
    """Where the head lies and what the model does to its output: softcap(output x scale + bias x scale)."""

    weight: Place
    bias: Place | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> HeadPlan:
        """Read what ``fields`` wrote."""
        bias = fields["bias"]
        return cls(tuple(fields["weight"]), bias and tuple(bias), fields["scale"], fields["softcap"])

    def fields(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def plan_head(model: Any, folder: Path) -> HeadPlan:
    """Find the head of a loaded transformers model in its checkpoint ``folder``, by comparing values, not names.

    Raises SourceError when the model has no head or the checkpoint does not hold it as one tensor.
    """
    plan = find_head(model, folder)
    if plan is None:
        raise SourceError(f"the output head of {type(model).__name__} is not among the tensors of {folder}")
    return plan


def find_head(model: Any, folder: Path) -> HeadPlan | None:
    """As ``plan_head``; None when the files hold the head in another form (quantized)."""
    head = model.get_output_embeddings()
    if head is None:
        raise SourceError(f"{type(model).__name__} has no output head, so it is no language model to score")
    weight = _find(head.weight, folder)
    bias = getattr(head, "bias", None)
    found = None if bias is None else _find(bias, folder)
    if weight is None or (bias is not None and found is None):
        return None
    scale, softcap = transforms(model.config.get_text_config())
    return HeadPlan(weight, found, scale, softcap)


def transforms(config: Any) -> tuple[float, float | None]:
    """What transformers does to the head's output: a factor, and the soft cap of the logits.

    Granite divides by logits_scaling, HyperCLOVA X multiplies by it; Cohere multiplies by logit_scale, Falcon-H1 by
    lm_head_multiplier; Gemma caps with final_logit_softcapping (transformers, modeling_<type>.py of each). ``capture``
    compares the outcome with the model's own logits, so that an unknown one is found.
    """
    scale = 1.0
    scaling = getattr(config, "logits_scaling", None)
    if scaling:
        scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None)


def _find(wanted: Tensor, folder: Path) -> Place | None:
    from safetensors import safe_open

    if wanted.element_size() < 2:  # 8-bit numbers, which mean nothing without their scales
        return None
    for path in sorted(folder.glob("*.safetensors")):
        shard: Any = safe_open(path, framework="pt")
        with shard as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                if part.get_shape() == list(wanted.shape) and _equal(wanted, part):
                    return path.name, name
    return None


def _equal(wanted: Tensor, part: Any) -> bool:
    step = _rows_of(SLICE_BYTES, wanted)
    return all(
        bool((part[start : start + step].to(wanted) == wanted[start : start + step]).all())
        for start in range(0, len(wanted), step)
    )


def _rows_of(size: int, weight: Any) -> int:
    columns = weight.shape[1] if len(weight.shape) > 1 else 1
    return max(1, size // (4 * columns))


def entries_of(folder: Path, plan: HeadPlan) -> int:
    """Entries of the head's vocabulary, padding included."""
    from safetensors import safe_open

    weights: Any = safe_open(folder / plan.weight[0], framework="pt")
    entries: int = weights.get_slice(plan.weight[1]).get_shape()[0]
    return entries


class Head:
    """The head of a checkpoint, cut to its first ``rows`` entries, on a ``device`` of torch's."""

    def __init__(
        self, folder: Path, plan: HeadPlan, rows: int | None = None, device: str | torch.device = "cpu"
    ) -> None:
        import torch
        from safetensors import safe_open

        self.plan = plan
        self.device = torch.device(device)
        # A slice is read from the mapped file when it is used, and keeps the file open.
        weights: Any = safe_open(folder / plan.weight[0], framework="pt")
        self._weight = weights.get_slice(plan.weight[1])
        self._dtype: str = self._weight.get_dtype()
        total, hidden = self._weight.get_shape()
        self.rows = total if rows is None else min(rows, total)
        self._bias: Tensor | None = None
        if plan.bias:
            shard: Any = safe_open(folder / plan.bias[0], framework="pt")
            with shard as file:
                self._bias = file.get_tensor(plan.bias[1])[: self.rows].float().to(self.device)
        on_gpu = self.device.type != "cpu"
        step = max(1, (GPU_BLOCK_BYTES if on_gpu else SLICE_BYTES) // (4 * hidden))
        self._spans = [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]
        self._held: list[Tensor] | None = None
        if on_gpu:  # held as it is stored: a GPU widens faster than it multiplies
            self._held = [self._read(span) for span in self._spans]
        elif 4 * self.rows * hidden <= HELD_BYTES:
            self._held = [self._read(span).float() for span in self._spans]

    def _read(self, span: tuple[int, int]) -> Tensor:
        part: Tensor = self._weight[span[0] : span[1]]
        return part.to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [n, rows] of ``hidden`` [n, width], which is best given in the dtype that it is stored in."""
        import torch

        inputs = hidden.to(self.device).float()
        out = torch.empty(len(inputs), self.rows, device=self.device)
        with _products_of(hidden.dtype, self._dtype, self.device):
            for number, span in enumerate(self._spans):
                weight = self._held[number] if self._held else self._read(span)
                torch.mm(inputs, weight.float().T, out=out[:, span[0] : span[1]])
        if self._bias is not None:
            out += self._bias
        if self.plan.scale != 1.0:
            out *= self.plan.scale
        if self.plan.softcap:
            out.div_(self.plan.softcap).tanh_().mul_(self.plan.softcap)
        return out

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Float32 log-probabilities [n, rows] of ``hidden`` [n, width]."""
        import torch

        out = self.logits(hidden)
        for block in torch.split(out, _block(out)):
            block -= block.logsumexp(-1, keepdim=True)  # noqa: PLW2901 - in place
        return out


def gpu_bytes(folder: Path, plan: HeadPlan, context: int) -> int:
    """Bytes that a head takes on a GPU together with what ``compare`` needs for a window of ``context`` tokens."""
    from safetensors import safe_open

    weights: Any = safe_open(folder / plan.weight[0], framework="pt")
    shape: tuple[int, int] = weights.get_slice(plan.weight[1]).get_shape()
    entries, hidden = shape
    return 4 * entries * (hidden + context) + 4 * GPU_BLOCK_BYTES


def compare(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor | None:
    """Score ``logits`` against log-probabilities of the reference (both [n, vocabulary]); ``targets`` [n] come next.

    Computed where the reference's are. Returns [4, n] on the CPU, in nats: -ln p of the reference, -ln p of the artifact, KL divergence sum p_ref ln(p_ref / p), and 1
    where both prefer the same token (all as in llama.cpp's perplexity.cpp, ``log_softmax`` with
    ``kl_divergence_result``). None when a logit is not finite.
    """
    import torch

    step = _block(reference)
    parts = []
    for log_p, part, target in zip(
        torch.split(reference, step), torch.split(logits, step), torch.split(targets, step), strict=True
    ):
        values = part.to(log_p.device)
        log_q = values - values.logsumexp(-1, keepdim=True)
        wanted = target.to(log_p.device).unsqueeze(1)
        nll_reference = -log_p.gather(1, wanted).squeeze(1)
        nll = -log_q.gather(1, wanted).squeeze(1)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        divergence = torch.linalg.vecdot(log_p.exp(), log_q.neg_().add_(log_p))
        parts.append(torch.stack((nll_reference, nll, divergence, same)))
    scores = torch.cat(parts, dim=1).cpu()
    return scores if torch.isfinite(scores).all() else None


def common_vocabulary(reference: int, artifact: int, tokens: int) -> int:
    """Entries to compare: all when the sizes agree, the smaller number when what is beyond it is padding.

    ``tokens`` is the size of the tokenizer. Raises Unsound when the artifact lacks entries that the tokenizer uses.
    """
    common = min(reference, artifact)
    if reference != artifact and common < tokens:
        raise Unsound(
            f"its vocabulary has {artifact} entries, that of the reference {reference}, of which the tokenizer uses {tokens}"
        )
    return common


def following(ids: NDArray[np.int32], positions: range) -> Tensor:
    """The ids that come after ``positions`` in the windows ``ids`` [windows, context], flat."""
    import torch

    return torch.from_numpy(ids[:, positions.start + 1 : positions.stop + 1]).long().flatten()


def joined(parts: list[Tensor]) -> Tokens:
    """The results of ``compare`` in order."""
    import torch

    return Tokens(*torch.cat(parts, dim=1).numpy())


def normalized(logits: Tensor, device: torch.device) -> Tensor:
    """Log-probabilities of ``logits`` [n, vocabulary], as a tensor of their own on ``device``."""
    import torch

    out = torch.empty_like(logits, device=device)
    step = _block(out)
    for part, target in zip(torch.split(logits, step), torch.split(out, step), strict=True):
        values = part.to(device)
        torch.sub(values, values.logsumexp(-1, keepdim=True), out=target)
    return out


@contextmanager
def _products_of(hidden: torch.dtype, weight: str, device: torch.device) -> Iterator[None]:
    """Let oneDNN multiply in bfloat16 where both sides are: such products are exact in float32, and so are sums kept.

    (torch.set_float32_matmul_precision, "medium". Even without bfloat16 units it is 1.5 times as fast on a Zen 4, where
    torch takes MKL otherwise.) A GPU's tensor cores keep shorter sums, so there the products are float32's.
    """
    import torch

    exact = hidden == torch.bfloat16 and weight == "BF16" and device.type == "cpu"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if exact else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _block(logits: Tensor) -> int:
    """Rows of ``logits`` [n, vocabulary] to work on at once, where they are."""
    size = BLOCK_BYTES if logits.device.type == "cpu" else GPU_BLOCK_BYTES
    return max(1, size // (4 * logits.shape[1]))
