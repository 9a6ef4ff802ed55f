"""A multi-token-prediction head in transformers: what it drafts on held-out windows, beside what the model itself says there.

transformers leaves such heads out of its models. A head's decoder layer is one of the model's own, so it is loaded as a
model of one layer of the same class, with the head's norm as its last one: weights, masks and positions go transformers'
own way, quantized ones too. What stands before it are two norms and a projection (DeepSeek-V3, arXiv 2412.19437, section
2.2, as vLLM and llama.cpp run it: the hidden state comes from behind the model's last norm).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.formats.safetensors import TensorHeader, check_index
from quantool.source.mtp import HeadLayout, layout_of
from quantool.validation._engines import unpacked
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.layer_files import Unstreamable, decoder_layers
from quantool.validation._engines.reference import adding, batches, open_model, tapped
from quantool.validation._engines.windows import scored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

MISFITS = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError, Unstreamable)
"""What transformers raises for a head whose layer is not one of the model's."""
FLOATS = ("BF16", "F16", "F32")
FULL = "full_attention"
PLACEHOLDERS = 8
"""Entries of the vocabulary of the model of one layer, whose embeddings and output head are not used."""


class Undraftable(Exception):  # noqa: N818 - an outcome: the head cannot be judged here
    """The head is of a kind that cannot be run; the message says why."""


def agreements(
    request: Mapping[str, Any], texts: list[NDArray[np.int32]], report: Callable[[float, float], None]
) -> list[str]:
    """For each text: ``1`` where the draft is the model's own choice and ``0`` where not, a character a scored position.

    Raises Undraftable, SourceError and Unsound.
    """
    folder = Path(request["model"])
    located = check_index(folder)
    layout = layout_of(_named(located), request["layers"])
    if layout is None:
        raise Undraftable("the layout of this head is not known to quantool")
    advance = adding(report, sum(ids.size for ids in texts))
    with open_model(folder, request["dtype"], dict(request), Path(request["scratch"])) as loaded:
        loaded.prepare(texts, advance, keep_logits=False)
        head = DraftHead(
            folder, located, layout, loaded.model, trust_remote_code=request["trust_remote_code"]
        )
        return [
            _agreed(loaded.model, head, ids, lambda tokens: advance(tokens * loaded.share)) for ids in texts
        ]


def _named(located: Mapping[str, TensorHeader]) -> list[str]:
    """Names of tensors as the unquantized checkpoint has them."""
    packed = (".qweight", ".weight_packed")
    return [
        f"{name.removesuffix(end)}.weight" for name in located for end in packed if name.endswith(end)
    ] + [*located]


def _agreed(model: Any, head: DraftHead, ids: NDArray[np.int32], advance: Callable[[float], None]) -> str:
    import torch

    context = ids.shape[1]
    wanted = scored(context)
    marks: list[str] = []
    for batch in batches(model, ids, keep_logits=False):
        placed = batch.to(model.device)
        with torch.no_grad():
            with tapped(model, range(context), keep_logits=False) as seen:
                model(input_ids=placed, use_cache=False)
            hidden = seen[0]
            own = model.get_output_embeddings()(hidden[:, wanted.start : wanted.stop]).argmax(-1)
            drafts = head.logits(placed, hidden, wanted).argmax(-1)
        marks += ["1" if same else "0" for same in (own == drafts).flatten().tolist()]
        advance(batch.numel())
    return "".join(marks)


class DraftHead:
    """The first layer of the head in ``folder``, on the device and in the dtype of ``model``, the trunk."""

    def __init__(
        self,
        folder: Path,
        located: Mapping[str, TensorHeader],
        layout: HeadLayout,
        model: Any,
        *,
        trust_remote_code: bool,
    ) -> None:
        """Raises Undraftable when transformers cannot make its layer, Unsound when a weight of it is missing."""
        self._layout, self._trunk = layout, model
        try:
            self._layer, sketch = _layer(folder, located, layout, model, trust_remote_code=trust_remote_code)
            norm = type(sketch.get_decoder().norm)
        except MISFITS as error:
            raise Undraftable(
                f"its layer does not load as one of the model's ({type(error).__name__}: {error})"
            ) from error
        own = {
            part: f"{part}.weight" for part in (layout.embedding_norm, layout.hidden_norm, layout.projection)
        }
        own |= {part: f"{layout.block}{part}.weight" for part in ("embed_tokens", "shared_head.head")}
        present = {name: located[name] for name in own.values() if name in located}
        if (
            any(tensor.dtype not in FLOATS for tensor in present.values())
            or len(present) < len(layout.parts()) - 1
        ):
            raise Undraftable("what stands before its layer is quantized")
        values = unpacked.stored(folder, present, None)
        weights = {
            part: values[name][...].to(model.device, model.dtype)
            for part, name in own.items()
            if name in present
        }
        width = weights[layout.projection].shape[0]
        self._norms = [
            _norm(norm, width, weights[part], model) for part in (layout.embedding_norm, layout.hidden_norm)
        ]
        self._projection = weights[layout.projection]
        self._embeddings, self._output = weights.get("embed_tokens"), weights.get("shared_head.head")

    def logits(self, ids: Tensor, hidden: Tensor, positions: range) -> Tensor:
        """Logits of the tokens after the next ones [n, positions, vocabulary]: what follows on token ``p + 1`` stands at p.

        ``ids`` [n, context] are the tokens, ``hidden`` [n, context, width] the trunk's last states. A position p, which
        must not be 0, is drafted from the hidden state before it and the token at it.
        """
        import torch
        from torch.nn import functional

        following = ids[:, 1:]
        embedded = (
            self._trunk.get_input_embeddings()(following)
            if self._embeddings is None
            else functional.embedding(following, self._embeddings)
        )
        parts = [self._norms[0](embedded), self._norms[1](hidden[:, :-1])]
        joined = functional.linear(
            torch.cat(parts[:: -1 if self._layout.hidden_first else 1], -1), self._projection
        )
        places = torch.arange(1, ids.shape[1], device=ids.device).unsqueeze(0)
        states = self._layer.get_decoder()(
            inputs_embeds=joined, position_ids=places, use_cache=False
        ).last_hidden_state
        drafted = states[:, positions.start - 1 : positions.stop - 1]
        if self._output is None:
            logits: Tensor = self._trunk.get_output_embeddings()(drafted)
            return logits
        return functional.linear(drafted, self._output)


def _norm(kind: Any, width: int, weight: Tensor, model: Any) -> Any:
    """A norm of the model's own class, whose weights may count from one or from zero."""
    import torch

    made = kind(width, eps=model.config.get_text_config().rms_norm_eps).to(model.device, model.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def _layer(
    folder: Path,
    located: Mapping[str, TensorHeader],
    layout: HeadLayout,
    model: Any,
    *,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """The head's decoder layer as a model of one layer, and the trunk's class without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if config.get_text_config() is not config:
        raise Undraftable("its configuration is of a model that reads more than text")
    beside = (*layout.parts(), *(f"{layout.block}{part}" for part in ("embed_tokens", "shared_head.")))
    block = {
        name: tensor
        for name, tensor in located.items()
        if name.startswith(layout.block) and not name.startswith(beside)
    }
    whole = all(tensor.dtype in FLOATS for tensor in block.values())
    unpack = not whole and unpacked.must_unpack(folder)
    if (whole or unpack) and hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        sketch: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=trust_remote_code
        )
    layers, _ = decoder_layers(sketch)
    values = unpacked.stored(folder, block, model.dtype if unpack else None)
    state = {f"{layers}.0.{name.removeprefix(layout.block)}": value for name, value in values.items()}
    final = f"{layout.final_norm}.weight"
    state[f"{layers.rpartition('.')[0]}.norm.weight"] = unpacked.stored(
        folder, {final: located[final]}, None
    )[final]
    made, info = type(sketch).from_pretrained(
        None, config=_cut(config), state_dict=state, dtype=model.dtype, output_loading_info=True
    )
    unused = ("embed_tokens.weight", "lm_head.weight")
    absent = [name for name in sorted(info["missing_keys"]) if not name.endswith(unused)]
    absent += sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise Unsound(f"the head's layer lacks {', '.join(absent[:4])}")
    unpacked.decompress(made)
    return made.eval().to(model.device), sketch


def _cut(config: Any) -> Any:
    """The configuration of one layer like the model's last ones: full attention, and experts where it has any."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers, cut.vocab_size, cut.pad_token_id = 1, PLACEHOLDERS, None
    cut.tie_word_embeddings = False
    kinds = getattr(cut, "layer_types", None)
    if kinds:
        cut.layer_types = [FULL if FULL in kinds else kinds[-1]]
    if getattr(cut, "mlp_layer_types", None):
        cut.mlp_layer_types = cut.mlp_layer_types[-1:]
    for name, every in (("first_k_dense_replace", 0), ("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if hasattr(cut, name):
            setattr(cut, name, every)
    return cut
