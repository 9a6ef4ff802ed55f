"""A YAML file as a ``Config``: every mistake in it reported at once, with its line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantool.config import rules
from quantool.config.errors import explain
from quantool.config.rules import Catalogue
from quantool.config.schema import NO_EFFECT, Calibration, Config, Validation
from quantool.config.yaml_file import YamlDocument, read


@dataclass(frozen=True)
class Loaded:
    """A configuration without mistakes, and what its author should know."""

    config: Config
    warnings: tuple[str, ...]


def load(path: Path, overrides: Sequence[str], catalogue: Catalogue) -> Loaded:
    """Read a YAML file with ``key.sub=value`` overrides on top; ``catalogue`` knows the installed methods and checks.

    Levels get the spelling of their method; nulls are dropped where a default exists. Raises ConfigError with every
    mistake on a line of its own, ``FILE:LINE:COL: key.path: what is wrong (value …); did you mean …?``. A file whose
    only fault is that its method lacks something on this machine raises that DependencyError.
    """
    document = read(path, overrides)
    warnings = _warnings(document)
    for key in NO_EFFECT:
        document.data.pop(key, None)
    given: dict[str, Any] = rules.without_nulls(document.data, Config)
    data: dict[str, Any] = rules.without_nulls(document.data, Config)  # the rules mend spellings in this one
    homes = _homes()
    named = rules.methods(data, homes, catalogue)
    for option in named.options:
        homes.setdefault(option, []).append(f"quantization_config.{option}")
    mistakes = [
        *document.mistakes,
        *named.mistakes,
        *rules.contradictions(data, catalogue),
        *rules.validation(data, named.levels, catalogue),
        *rules.options(Calibration, data, ("calibration_config",), homes),
        *explain(Config, given, homes=homes),
    ]
    if named.missing and len(mistakes) == len(named.missing):  # the file is right, this machine is not
        raise named.missing[0]
    if mistakes:
        raise document.error(
            mistakes, hint="`quantool schema` describes every key, `quantool methods` the levels"
        )
    return Loaded(Config.model_validate(data), warnings)


def schema(catalogue: Catalogue) -> dict[str, Any]:
    """Build the JSON schema (draft 2020-12) of a configuration file, for editors."""
    built = Config.model_json_schema()
    built["properties"]["calibration_config"]["anyOf"][0] = Calibration.model_json_schema()
    built["properties"] |= {
        key: {"description": f"No effect any more: {reason}.", "deprecated": True}
        for key, reason in NO_EFFECT.items()
    }
    methods, checks = catalogue.names("methods"), catalogue.names("checks")
    for place, known in (
        (built["properties"]["method"]["anyOf"][0], methods),
        (built["$defs"]["Quantization"]["properties"]["method"], methods),
        (built["$defs"]["Validation"]["properties"]["checks"]["anyOf"][0]["items"], checks),
    ):
        if known:
            place["enum"] = known
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **built, "title": "quantool"}


def _homes() -> dict[str, list[str]]:
    """Where each key belongs, for those found elsewhere."""
    homes = {name: [f"{name} at the top"] for name in Config.model_fields}
    for section, model in (("validation", Validation), ("calibration_config", Calibration)):
        for name in model.model_fields:
            homes.setdefault(name, []).append(f"{section}.{name}")
    return homes


def _warnings(document: YamlDocument) -> tuple[str, ...]:
    """Name the keys that do nothing any more in one sentence, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for key, reason in NO_EFFECT.items():
        if document.data.get(key) is not None:
            reasons.setdefault(reason, []).append(key)
    if not reasons:
        return ()
    groups = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in reasons.items())
    return (f"{document.name}: keys without effect: {groups}",)
