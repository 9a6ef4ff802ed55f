"""Multi-token-prediction heads: which tensors of a checkpoint are one, how it is laid out, and whether it is all there.

Such a head drafts the token after the next (DeepSeek-V3, arXiv 2412.19437, section 2.2): one decoder layer more, fed with
the final hidden state of a token and the embedding of the one that follows. transformers leaves it out when it loads a
model (``_keys_to_ignore_on_load_unexpected``); vLLM and llama.cpp draft with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantool.errors import SourceError

PROMISES = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Keys of config.json that say how many layers of such heads a checkpoint has."""
OWN_PART = re.compile(r"^(?P<part>(?:model\.)?(?:language_model\.)?mtp(?:_[a-z_]+)?)\.")
"""Names of Qwen3-Next, Qwen3.5, EXAONE-MoE, Nemotron-H (``mtp.``), MiMo (``model.mtp_layers.``, ``model.mtp.``), ERNIE 4.5
(``model.mtp_block.``, ``model.mtp_linear_proj.`` …)."""
LAYER = re.compile(r"^(?P<part>(?:model\.)?(?:language_model\.)?layers\.(?P<number>\d+))\.")
"""GLM-4.5 and later, DeepSeek-V3, Step-3.5: layers behind the last one that config.json counts."""


@dataclass(frozen=True)
class HeadLayout:
    """Where the parts of a head's first layer stand: names without ``.weight``, ``block`` as a prefix with its dot."""

    embedding_norm: str
    hidden_norm: str
    projection: str
    final_norm: str
    block: str
    hidden_first: bool = False
    """Whether the projection takes the hidden state before the embedding."""

    def parts(self) -> tuple[str, str, str, str]:
        """The names beside the decoder layer."""
        return self.embedding_norm, self.hidden_norm, self.projection, self.final_norm


def part_of(name: str, layers: int) -> str | None:
    """The prefix of the head that a tensor belongs to, without its dot; None for one of the model itself.

    ``layers`` is ``num_hidden_layers``.
    """
    if matched := OWN_PART.match(name):
        return matched["part"]
    matched = LAYER.match(name)
    return matched["part"] if matched and int(matched["number"]) >= layers else None


def head_tensors(names: Iterable[str], layers: int) -> tuple[str, ...]:
    """Those of ``names`` that belong to a head."""
    return tuple(name for name in names if part_of(name, layers))


def head_patterns(names: Iterable[str], layers: int) -> tuple[str, ...]:
    """Patterns of compressed-tensors (``re:`` and an expression) that mean the head's modules and no other."""
    parts = dict.fromkeys(part for name in names if (part := part_of(name, layers)))
    return tuple(rf"re:^{re.escape(part)}\..*" for part in parts)


def layout_of(names: Iterable[str], layers: int) -> HeadLayout | None:
    """The layout of a head's first layer; None when there is none, or of an unknown kind."""
    known = frozenset(names)
    return next(
        (layout for layout in _layouts(layers) if all(f"{part}.weight" in known for part in layout.parts())),
        None,
    )


def _layouts(layers: int) -> Iterable[HeadLayout]:
    for top in ("", "model.", "model.language_model."):
        place = f"{top}layers.{layers}"
        yield HeadLayout(
            f"{place}.enorm", f"{place}.hnorm", f"{place}.eh_proj", f"{place}.shared_head.norm", f"{place}."
        )
        place = f"{top}mtp"
        yield HeadLayout(
            f"{place}.pre_fc_norm_embedding", f"{place}.pre_fc_norm_hidden", f"{place}.fc", f"{place}.norm",
            f"{place}.layers.0.",
        )  # fmt: skip
        place = f"{top}mtp_layers.0"
        yield HeadLayout(
            f"{place}.token_layernorm", f"{place}.hidden_layernorm", f"{place}.input_proj", f"{place}.final_layernorm",
            f"{place}.", hidden_first=True,
        )  # fmt: skip


def promised_layers(config: Mapping[str, Any]) -> int:
    """How many layers of heads config.json itself (not the defaults of its class) says that the checkpoint has."""
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, dict) else (config,)
    counts = [part[key] for part in parts for key in PROMISES if type(part.get(key)) is int]
    return max(counts, default=0)


def without_promise(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (config.json) with no head promised."""
    return {
        key: without_promise(value)
        if key == "text_config" and isinstance(value, dict)
        else 0
        if key in PROMISES and type(value) is int
        else value
        for key, value in config.items()
    }


def is_absent(config: Mapping[str, Any], names: Iterable[str], layers: int, *, dropped: bool) -> bool:
    """Whether ``config`` (config.json) promises a head of which the weights, by ``names``, have nothing.

    Raises SourceError for such a one that the user has not ``dropped``, and for a head that is there in part: a layer of
    several, or one without its projection or a norm.
    """
    promised, found = promised_layers(config), head_tensors(names, layers)
    if not found:
        if promised and not dropped:
            raise SourceError(
                f"config.json promises {promised} layer{'s' * (promised > 1)} of multi-token prediction "
                f"({_promising(config)}), the weights have none: {_expected(layers)}",
                hint="take the checkpoint that has them; or drop: [mtp] declares files without a head, in whose config.json "
                "none is promised",
            )
        return promised > 0
    numbers = {matched["part"] for name in found if (matched := LAYER.match(name))}
    if numbers and len(numbers) < promised:
        raise SourceError(
            f"config.json promises {promised} layers of multi-token prediction behind layer {layers - 1}, the weights "
            f"have {len(numbers)}: {', '.join(sorted(numbers))}",
            hint="a shard is missing, or the checkpoint was converted without them",
        )
    if layout_of(found, layers) is None and (lacking := _lacking(found, layers)):
        raise SourceError(
            f"the multi-token-prediction head lacks {', '.join(lacking)}",
            hint="a shard is missing, or the checkpoint was converted by a tool that lost it",
        )
    return False


def _promising(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, dict) else (config,)
    return next(
        f"{key}: {part[key]}"
        for key in PROMISES
        for part in parts
        if type(part.get(key)) is int and part[key]
    )


def _expected(layers: int) -> str:
    """The projection that a head of each known layout starts with, where decoders of transformers have it."""
    names = [layout.projection for layout in _layouts(layers)]
    return f"neither {names[3]}.weight nor {names[1]}.weight nor {names[5]}.weight"


def _lacking(found: Iterable[str], layers: int) -> list[str]:
    """What the known layout that fits best still needs; nothing for a head of an unknown kind."""
    known = frozenset(found)
    absent = [
        [f"{part}.weight" for part in layout.parts() if f"{part}.weight" not in known]
        for layout in _layouts(layers)
    ]
    best = min(absent, key=len)
    return best if len(best) < 4 else []
