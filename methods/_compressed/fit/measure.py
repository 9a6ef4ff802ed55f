"""What each group of layers costs at each scheme: measured in the reference itself, one group at a time.

A group is what vLLM runs as one layer. Its weights are rounded to the scheme and back in the running model, everything else
stays as it is; the cost is the mean Kullback-Leibler divergence from the untouched model on calibration text. GPTQ and AWQ
round better than to nearest, for all groups alike; what is compared here is one group with another.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import DependencyError, QuantizationError
from quantool.methods._compressed.calibrate import calibration_samples
from quantool.methods._compressed.fit.rounding import rounded
from quantool.methods._compressed.schemes import WeightScheme
from quantool.methods._compressed.torch_setup import choose_device, peak_memory, seed_everything
from quantool.runtime.worker import Report, preloaded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from transformers import PreTrainedModel

TOKENS = 4096
"""Tokens of calibration text that a cost is measured on."""
KEPT_BYTES = 256 << 20
"""Log-probabilities of the untouched model that are held; of a large vocabulary fewer positions are compared."""


@preloaded("transformers")
def measure(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: append the cost of every group at every scheme to a file, one JSON line each; those in it are not measured again.

    Request: ``source`` (folder), ``config`` (the configuration), ``loader`` (name of transformers' class),
    ``max_seq_length``, ``device``, ``seed``, ``groups`` (name to names of weights), ``schemes`` (name to fields of
    ``WeightScheme``), ``costs`` (the file: ``group``, ``scheme``, ``cost`` in nats a token). Result: ``device``, ``tokens``,
    ``positions`` (compared), ``peak_rss``, ``peak_cuda``.
    """
    device = choose_device(request["device"])
    import torch
    import transformers

    seed_everything(request["seed"])
    trust = request["config"]["trust_remote_code"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["source"], trust_remote_code=trust)
    samples = _few(calibration_samples(request, tokenizer))
    model: PreTrainedModel = getattr(transformers, request["loader"]).from_pretrained(
        request["source"], dtype="auto" if device == "cuda" else torch.float32, trust_remote_code=trust
    )
    try:
        model = model.to(device).eval()  # type: ignore[arg-type]
        meter = _Divergence(model, samples)
        _measure_all(request, model, meter, report)
    except torch.OutOfMemoryError as error:
        raise DependencyError(
            f"CUDA ran out of memory: {str(error).splitlines()[0]}",
            hint="quantization_config.fit runs the whole model: free the GPU of other work, or set device: cpu",
        ) from error
    tokens = sum(map(len, samples))
    return {"device": device, "tokens": tokens, "positions": meter.positions, **peak_memory()}


def _few(samples: Sequence[list[int]]) -> list[list[int]]:
    """The first samples that make ``TOKENS`` tokens."""
    taken: list[list[int]] = []
    for sample in samples:
        if sum(map(len, taken)) >= TOKENS:
            break
        taken.append(sample)
    return taken


def _measure_all(request: dict[str, Any], model: PreTrainedModel, meter: _Divergence, report: Report) -> None:
    import torch

    schemes = {name: WeightScheme(**fields) for name, fields in request["schemes"].items()}
    path = Path(request["costs"])
    known = set(costs_of(path))
    parameters = dict(model.named_parameters())
    wanted = [(group, scheme) for group in request["groups"] for scheme in schemes]
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file, torch.inference_mode():
        file.write("\n" * torn)
        for number, (group, scheme) in enumerate(wanted, 1):
            if (group, scheme) not in known:
                weights = [_parameter(parameters, name) for name in request["groups"][group]]
                before = [weight.data for weight in weights]
                for weight, old in zip(weights, before, strict=True):
                    weight.data = rounded(old, schemes[scheme]).to(old.dtype)
                cost = meter.of(model)
                for weight, old in zip(weights, before, strict=True):
                    weight.data = old
                file.write(json.dumps({"group": group, "scheme": scheme, "cost": cost}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            report(number, len(wanted))


def _parameter(parameters: dict[str, torch.nn.Parameter], name: str) -> torch.nn.Parameter:
    if name not in parameters:
        raise QuantizationError(
            f"quantization_config.fit: transformers names {name} otherwise in the running model",
            hint="leave fit out: this architecture's layers cannot be changed one by one",
        )
    return parameters[name]


def costs_of(path: Path) -> dict[tuple[str, str], float]:
    """Costs by group and scheme; a last line that was cut off is none."""
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["group"], entry["scheme"]] = float(entry["cost"])
    return found


class _Divergence:
    """The untouched model's predictions at some positions of each sample, float32 log-probabilities."""

    def __init__(self, model: PreTrainedModel, samples: Sequence[list[int]]) -> None:
        import torch

        self._samples = samples
        entries = model.config.get_text_config().vocab_size
        stride = max(1, -(-sum(map(len, samples)) * entries * 4 // KEPT_BYTES))
        self._stride = stride
        with torch.inference_mode():
            self._reference = list(self._predictions(model))
        self.positions = sum(len(part) for part in self._reference)

    def _predictions(self, model: PreTrainedModel) -> Iterator[torch.Tensor]:
        import torch

        for sample in self._samples:
            ids = torch.tensor([sample], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :: self._stride]
            yield logits.float().log_softmax(-1)

    def of(self, model: PreTrainedModel) -> float:
        """Mean divergence of the model as it is now, nats a token. Raises QuantizationError where that is no finite number."""
        total = 0.0
        for known, found in zip(self._reference, self._predictions(model), strict=True):
            total += float((known.exp() * (known - found)).sum())
        if not math.isfinite(total):
            raise QuantizationError("quantization_config.fit: the model computes logits that are not finite")
        return total / self.positions
