"""The budget of a checkpoint in mixed precision: as users write it, and what of it cannot be met."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from quantool.errors import ConfigError
from quantool.methods._fit.amounts import bytes_of


class Budget(BaseModel):
    """What a checkpoint may take; exactly one of the two."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: str | None = Field(None, description="Of the weight files, with a unit: 24GB.")
    bpw: float | None = Field(None, gt=0, le=32, description="Bits per weight of the whole checkpoint.")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.size is None) == (self.bpw is None):
            raise ValueError("fit takes one of size and bpw")
        if self.size is not None:
            bytes_of(self.size)
        return self

    def describe(self) -> str:
        """As a user wrote it, for records: ``size: 24GB``."""
        return f"size: {self.size}" if self.size is not None else f"bpw: {self.bpw:g}"

    def data(self, parameters: int, overhead: int) -> int:
        """Bytes that the tensors may take; ``overhead`` is what the files hold beside them."""
        if self.size is not None:
            return bytes_of(self.size) - overhead
        return int((self.bpw or 0.0) * parameters / 8)

    def spelled(self, data: int, parameters: int, overhead: int) -> str:
        """Another budget of the same kind, as one would write it: ``{size: 3.21GB}``; rounded up."""
        if self.size is not None:
            return f"{{size: {data + overhead}B}}"
        return f"{{bpw: {8 * data / parameters + 5e-4:.3f}}}"


def _known(value: Any) -> Any:
    match value:
        case {"kld": _}:
            raise ValueError("fit: kld is for the method gguf; here it is size or bpw")
        case [*_]:
            raise ValueError(
                "fit of this method is one budget; name the method again in quantizations for another"
            )
    return value


Fit = Annotated[Budget, BeforeValidator(_known)]


def refuse_unmet(
    budget: Budget, level: str, smallest: int, largest: int, parameters: int, overhead: int
) -> int:
    """The bytes that tensors may take.

    Raises ConfigError when that is less than ``smallest``, what the level takes with every layer quantized, or not less
    than ``largest``, what the checkpoint takes with none; the nearest budget that can be met is named.
    """
    data = budget.data(parameters, overhead)
    if data < smallest:
        raise ConfigError(
            f"quantization_config.fit: {level} takes more than that with every layer quantized",
            hint=f"the nearest is fit: {budget.spelled(smallest, parameters, overhead)}",
        )
    if data >= largest:
        raise ConfigError(
            "quantization_config.fit: the checkpoint fits without quantization",
            hint=f"ask for less than fit: {budget.spelled(largest, parameters, overhead)}",
        )
    return data
