"""What every part of a configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration: closed to unknown keys. In a file, null stands for the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")
