"""Which part of a model each tensor of a checkpoint belongs to, by config.json's own sections and the tensors' names.

Text is what a language model alone has; a multimodal checkpoint has towers beside it, some have a head that drafts further
tokens (MTP), classifiers a head of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from quantool.errors import SourceError
from quantool.formats.json_file import read_json
from quantool.formats.safetensors import TensorHeader
from quantool.ledger import AUDIO, HEAD, MTP, SPEECH, TEXT, TOWERS, VISION
from quantool.records import Source
from quantool.source.mtp import part_of as head_of

STEMS = {
    VISION: ("vision", "visual", "image", "vit", "vpm", "siglip", "sam_", "patch_embed", "resampler", "view_seperator"),
    AUDIO: ("audio", "sound", "conformer"),
    SPEECH: ("talker", "token2wav", "code2wav", "speech_decoder", "depth_decoder"),
    HEAD: ("score", "classifier", "classification_head", "pre_classifier", "qa_outputs", "pooler"),
}  # fmt: skip
"""How a module outside the layers begins that belongs to a part (names of transformers 5.17 and llama.cpp 0.3.36)."""
BRIDGES = ("projector", "projection", "connector", "merger", "aligner", "mm_", "multi_modal", "multimodal")
"""What such a module holds that leads from a tower to the language model."""
LANGUAGE = ("language_model", "text_model", "lm_head")
"""What all that it holds is text, but for layers that draft further tokens."""
EMBEDDED = {"embed_vision": VISION, "embed_audio": AUDIO, "speech_encoder": AUDIO, "speech_embeddings": AUDIO}
SECTIONS = {
    VISION: ("vision_config", "vision_tower_config", "visual", "image_config", "vision_cfg", "img_processor"),
    AUDIO: ("audio_config", "audio_processor", "audio_cfg", "sound_config", "speech_config"),
    SPEECH: ("talker_config", "token2wav_config", "code2wav_config"),
}
BESIDE_VECTORS = ("lm_head.", "cls.", "pooler.", "bert.pooler.")
"""Beginnings of names of what an embedding model's checkpoint may hold and no pooled vector reads: heads of its training."""
ADVICE = "fetch the rest of the checkpoint, or mend config.json if it never had this part"


@dataclass(frozen=True)
class Parts:
    """The parts that a config.json speaks of."""

    sections: frozenset[str]
    """Towers that it has a section for."""
    layers: int
    """Decoder layers; what is numbered from there on drafts further tokens."""

    @classmethod
    def of(cls, source: Source) -> Parts:
        """Read the config.json of a source."""
        top = read_json(source.folder / "config.json")
        named = {part for part, keys in SECTIONS.items() if any(_is_section(top.get(key)) for key in keys)}
        return cls(frozenset(named), source.facts.layers)

    def part_of(self, name: str) -> str:
        """The part of a tensor; text for what nothing else is said of."""
        return _part_of(self, name)

    def _named(self, name: str) -> str:
        if head_of(name, self.layers) is not None:
            return MTP
        pieces = name.split(".")
        number = next((place for place, piece in enumerate(pieces) if piece.isdecimal()), None)
        for piece in pieces[:number]:
            if piece in LANGUAGE:
                break
            if piece in EMBEDDED:
                return EMBEDDED[piece]
            for part, stems in STEMS.items():
                if piece.startswith(stems):
                    return part
            if self.sections and any(bridge in piece for bridge in BRIDGES):
                return self._bridged()
        return TEXT

    def _bridged(self) -> str:
        """Where a bridge leads from that does not say it."""
        return AUDIO if AUDIO in self.sections and VISION not in self.sections else VISION

    def refuse_absent(self, source: Source, tensors: Iterable[str]) -> None:
        """SourceError for a part that config.json promises and of which the weights have nothing."""
        present = {self.part_of(name) for name in tensors}
        for part in TOWERS:
            if part in self.sections - present and not source.facts.architecture.endswith("ForCausalLM"):
                raise SourceError(
                    f"config.json has a section for {part}, but no tensor of the checkpoint belongs to it",
                    hint=ADVICE,
                )


@lru_cache(maxsize=1 << 17)
def _part_of(parts: Parts, name: str) -> str:
    """Every output asks for every tensor, of which there can be a hundred thousand."""
    return parts._named(name)  # noqa: SLF001 - its own


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def sizes(parts: Parts, tensors: Mapping[str, TensorHeader]) -> dict[str, tuple[int, int]]:
    """Part to its tensors and its weights, in the order of the checkpoint."""
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        part = parts.part_of(name)
        count, weights = found.get(part, (0, 0))
        found[part] = (count + 1, weights + tensor.elements)
    return found
