"""What every record of a run is: frozen, closed, and clear about what may leave this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen, closed to unknown keys, equal by value."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Privacy(StrEnum):
    """What becomes of a field when its record leaves this machine; set in the field's type (``card/redact.py``)."""

    DROPPED = "dropped"
    """It says where a run was or how far, not what was made."""
    NAMED = "named"
    """It may be a path of this machine, of which the last part is enough. Every ``Path`` is treated so without a mark."""


MachinePath = Annotated[Path, Privacy.DROPPED]
"""A folder of this machine."""
NameOrPath = Annotated[str, Privacy.NAMED]
"""A name that stands everywhere (an id on the Hub), or a path of this machine."""
