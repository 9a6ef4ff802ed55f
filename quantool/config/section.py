"""What every part of the configuration is: frozen, and closed to keys that it does not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration: closed to unknown keys. In a file, null stands for the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")
