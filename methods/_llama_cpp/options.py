"""Options of the method gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from quantool.methods._llama_cpp.base_file import GgufOptions
from quantool.methods._llama_cpp.fit.targets import FitTarget


class LevelOptions(GgufOptions):
    """Options of a quantized GGUF."""

    base_type: Literal["auto", "f16", "bf16", "f32"] = Field(
        "auto",
        description="Type of the file that levels are made from; auto: f16, or bf16 where f16 overflows.",
    )
    imatrix: bool | Path = Field(
        False,
        description="true: compute an importance matrix from the calibration text; a path: use that file.",
    )
    tensor_types: dict[str, str] = Field({}, description="Tensor name (regular expression) to ggml type.")
    output_tensor_type: str | None = Field(None, description="ggml type of output.weight.")
    token_embedding_type: str | None = Field(None, description="ggml type of token_embd.weight.")
    mtp_type: str = Field(
        "q8_0",
        description="ggml type of a multi-token-prediction head, which few bits ruin; level: what the level gives it.",
    )
    pure: bool = Field(False, description="No mixtures: every tensor gets the level's own type.")
    leave_output_tensor: bool = Field(False, description="Keep output.weight as it is in the base.")
    keep_split: bool = Field(
        False, description="Split where the base was split at max_shard_size: same tensors, smaller files."
    )
    allow_requantize: bool = Field(False, description="Accept a base that is quantized already.")
    fit: tuple[FitTarget, ...] = Field(
        (),
        description="Files besides the levels whose types are chosen by measuring: for a size, vram, bpw or kld, or by a recipe.",
    )
    threads: int = Field(0, ge=0, description="Threads; 0 for all cores.")

    def settings(self) -> dict[str, Any]:
        """What changes the bytes of a level, as ``_llama_cpp.quantize`` takes it (threads do not)."""
        names = (
            "tensor_types", "output_tensor_type", "token_embedding_type", "pure", "leave_output_tensor",
            "keep_split", "allow_requantize", "threads",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
