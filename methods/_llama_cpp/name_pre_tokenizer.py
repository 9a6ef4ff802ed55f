"""The name of the pre-tokenizer that the converter writes, and why there is none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from quantool.errors import SourceError
from quantool.methods._llama_cpp.pooled import WORD_PIECE
from quantool.methods._llama_cpp.pre_tokenizer import equal_steps, is_byte_level, other_steps, suggest


class _RecordingTokenizer:
    """A tokenizer that remembers the hash of what it encoded last, as upstream computes it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.hash = ""

    def encode(self, text: str) -> list[int]:
        """Encode like the tokenizer."""
        ids: list[int] = self.tokenizer.encode(text)
        self.hash = hashlib.sha256(str(ids).encode()).hexdigest()
        return ids


class PreTokenizer:
    """The name of the pre-tokenizer: the user's, that of upstream's hash, or the one whose steps tokenizer.json has."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.by_steps: str | None = None
        self._adds_bos = False

    def watch(self, conversion: ModuleType) -> None:
        """Answer where upstream would look the tokenizer's hash up, and explain one that has no name."""
        look_up = conversion.TextModel.get_vocab_base_pre

        def answer(model: Any, tokenizer: Any) -> str:
            path = Path(model.dir_model) / "tokenizer.json"
            saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            if saved and saved["model"].get("type") == "WordPiece":
                return self.name or WORD_PIECE
            if saved and not is_byte_level(saved):
                raise SourceError(
                    f"the tokenizer is a SentencePiece model, and its tokenizer.model is missing in {model.dir_model}",
                    hint="transformers 5 does not save tokenizer.model: copy it from the original checkpoint",
                )
            if self.name is not None:
                return self.name
            recording = _RecordingTokenizer(tokenizer)
            try:
                found: str = look_up(model, recording)
            except NotImplementedError as error:
                self.by_steps = equal_steps(saved) if saved else None
                if self.by_steps is None:
                    raise _unknown(recording.hash, saved or {}) from error
                plain, dressed = (
                    tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True)
                )
                self._adds_bos = dressed != plain and dressed[0] == tokenizer.bos_token_id
                return self.by_steps
            return found

        conversion.TextModel.get_vocab_base_pre = answer

    def write_bos(self, writer: Any, gguf: Any) -> None:
        """Say whether BOS is added, where the steps gave a name to which llama.cpp ties a default and upstream found nothing."""
        key = gguf.Keys.Tokenizer.ADD_BOS
        if self.by_steps is not None and all(key not in data for data in writer.kv_data):
            writer.add_add_bos_token(self._adds_bos)


def _unknown(digest: str, tokenizer: dict[str, Any]) -> SourceError:
    """The error for a tokenizer whose hash upstream does not list, with what to set."""
    message = f"llama.cpp does not know the pre-tokenizer with the hash {digest}"
    name = suggest(tokenizer) if tokenizer else None
    if name and (others := other_steps(tokenizer)):
        return SourceError(
            f"{message}; its pre_tokenizer is {name}'s, but llama.cpp has no {'; no '.join(others)}",
            hint=f"quantization_config.pre_tokenizer: {name} converts it all the same; the tokenizer check says what differs",
        )
    if name:
        return SourceError(
            message,
            hint=f"the steps in tokenizer.json are those that llama.cpp calls {name}, of which it has an approximation: "
            f"set quantization_config.pre_tokenizer: {name}",
        )
    return SourceError(
        message,
        hint="set quantization_config.pre_tokenizer to llama.cpp's name for it: that of the model whose tokenizer.json "
        "has the same pre_tokenizer (names: get_vocab_base_pre in conversion/base.py of llama.cpp)",
    )
