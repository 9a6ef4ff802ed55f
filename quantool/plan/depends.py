"""What a method or check depends on: what it declares, or everything there is."""

from __future__ import annotations

from dataclasses import replace

from quantool.plugins.contract import Check, Method
from quantool.plugins.keys import EVERY_FIELD, Depends
from quantool.runtime.versions import DISTRIBUTIONS
from quantool.texts import inputs

EVERYTHING = Depends(
    fields=(EVERY_FIELD,),
    inputs=(inputs.calibration_by_name,),
    libraries=DISTRIBUTIONS,
)
"""For somebody else's method that declares nothing."""
EVERYTHING_JUDGED = replace(
    EVERYTHING,
    inputs=(inputs.held_out, inputs.calibration, inputs.conversations, inputs.prompts, inputs.haystack),
    engine=True,
    gates=True,
    folder=True,
)
"""For somebody else's check that declares nothing."""


def depends_of(feature: Method | Check) -> Depends:
    """The declaration that counts."""
    if feature.depends is not None:
        return feature.depends
    return EVERYTHING if isinstance(feature, Method) else EVERYTHING_JUDGED
