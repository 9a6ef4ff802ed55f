"""What must hold between the keys of a configuration, and with the registered methods and checks.

Works on the plain data, so that these mistakes are found beside those of single keys, whatever else is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from quantool.config.errors import KeyPath, Mistake, explain, models_at, show, suggest
from quantool.errors import ConfigError, DependencyError
from quantool.gates import ALL_LEVELS
from quantool.record import Record

ONE_ORIGIN = "give either path or dataset"
ONE_ENGINE = "give one of slurm, local and engine"

AFTER_MERGE = ("tag", "collection")
"""Keys of ``publish`` that need a commit which stays."""

NOT_YET = "waits until the pull request is merged: publish again then, with mode: commit"

CONTEXT = 512
"""Default of ``validation.context``, in tokens."""

MAX_TOKENS = 16384
"""Default of ``validation.max_tokens``."""

Homes = Mapping[str, Sequence[str]]


class NamedMethod(Protocol):
    """What a configuration is held to by a method."""

    @property
    def options(self) -> type[BaseModel]:
        """The model of ``quantization_config``."""

    @property
    def levels(self) -> Callable[[], dict[str, str]]:
        """Level name to one line of description."""


class Catalogue(Protocol):
    """The methods and checks that there are to name: ``quantool.plugins.find``, handed in by the app."""

    def names(self, folder: str) -> list[str]:
        """Names of the ``"methods"`` or ``"checks"``, sorted."""

    def find_method(self, name: str) -> NamedMethod:
        """The method of this name; raises ConfigError or DependencyError."""


@dataclass(frozen=True)
class MethodSummary:
    """What the methods of a configuration say about themselves."""

    mistakes: tuple[Mistake, ...]
    levels: tuple[str, ...] | None
    """Levels of all methods; None when a method could not be asked."""
    options: tuple[str, ...]
    """Names of the options of all methods."""
    missing: tuple[DependencyError, ...] = ()
    """What methods lack on this machine; each is told among the mistakes as well."""


def without_nulls(value: Any, model: type[BaseModel], path: KeyPath = ()) -> Any:
    """Copy ``value``, which stands at ``path`` of a ``model``, without the nulls that stand for a default.

    A record keeps them: null switches a gate off.
    """
    if isinstance(value, list):
        return [without_nulls(item, model, (*path, index)) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    owners = [owner for owner in models_at(model, path) if not issubclass(owner, Record)]
    known = {name for owner in owners for name in owner.model_fields}
    return {
        key: without_nulls(item, model, (*path, key))
        for key, item in value.items()
        if item is not None or key not in known
    }


def methods(data: dict[str, Any], homes: Homes, catalogue: Catalogue) -> MethodSummary:
    """Check methods, levels and options; levels in ``data`` get their method's spelling, options lose nulls."""
    mistakes: list[Mistake] = []
    levels: list[str] | None = []
    options_known: list[str] = []
    outputs: set[tuple[str, str, str]] = set()
    missing: list[DependencyError] = []
    for path, entry in _entries(data):
        if not isinstance(entry.get("method"), str):
            levels = None
            continue
        try:
            found = catalogue.find_method(entry["method"])
            known = list(found.levels())
        except (ConfigError, DependencyError) as error:
            text = "; ".join(filter(None, (error.message, error.hint)))
            mistakes.append(Mistake((*path, "method"), text))
            if isinstance(error, DependencyError):
                missing.append(error)
            levels = None
            continue
        mistakes += _levels(entry, path, known, outputs)
        mistakes += options(found.options, entry, (*path, "quantization_config"), homes)
        levels = None if levels is None else [*levels, *known]
        options_known += list(found.options.model_fields)
    return MethodSummary(
        tuple(mistakes),
        None if levels is None else tuple(dict.fromkeys(levels)),
        tuple(dict.fromkeys(options_known)),
        tuple(missing),
    )


def options(model: type[BaseModel], entry: dict[str, Any], path: KeyPath, homes: Homes) -> list[Mistake]:
    """Check the mapping at the last key of ``path`` in ``entry`` as options of ``model``; it loses nulls."""
    given = entry.get(str(path[-1]), {})
    if not isinstance(given, dict):  # told by the structure
        return []
    given = without_nulls(given, model)
    if str(path[-1]) in entry:
        entry[str(path[-1])] = given
    return explain(model, given, path, homes)


def contradictions(data: dict[str, Any], catalogue: Catalogue) -> list[Mistake]:
    """Keys that exclude or need each other."""
    mistakes = []
    if data.get("quantizations"):
        text = "cannot stand beside quantizations; put it in an entry there"
        beside = [key for key in ("method", "quant_level", "quantization_config") if key in data]
        mistakes += [Mistake((key,), f"{text} {show(data[key])}") for key in beside]
    elif "method" not in data:
        known = ", ".join(catalogue.names("methods"))
        mistakes.append(Mistake(("method",), f"missing; give method, or quantizations; known: {known}"))
    if "dataset_id" in data and "dataset_path" in data:
        text = f"give either dataset_id or dataset_path {show(data['dataset_path'])}"
        mistakes.append(Mistake(("dataset_path",), text))
    if data.get("disk_bounded") is True and data.get("push_to_hub") is not True:
        text = f"needs push_to_hub: true, each level is deleted once it is uploaded {show(True)}"
        mistakes.append(Mistake(("disk_bounded",), text))
    settings = data.get("publish")
    if isinstance(settings, dict) and settings.get("mode") == "pull_request":
        early = [key for key in AFTER_MERGE if key in settings]
        mistakes += [Mistake(("publish", key), f"{NOT_YET} {show(settings[key])}") for key in early]
    if data.get("push_to_hub") is True and not data.get("repo_id"):
        text = "missing; push_to_hub needs the name of a repository"
        lacking = [path for path, entry in _entries(data) if not entry.get("repo_id")]
        mistakes += [Mistake((*path, "repo_id"), text) for path in lacking]
    return mistakes


def validation(data: dict[str, Any], levels: Sequence[str] | None, catalogue: Catalogue) -> list[Mistake]:
    """Check corpora, checks, windows and gates; the levels of gates get their method's spelling."""
    settings = data.get("validation")
    if not isinstance(settings, dict):
        return []
    mistakes = [*_corpora(settings), *_checks(settings, catalogue)]
    context, budget = settings.get("context", CONTEXT), settings.get("max_tokens", MAX_TOKENS)
    if _is_int(context) and _is_int(budget) and budget < context:
        key = "max_tokens" if "max_tokens" in settings else "context"
        text = f"a window of {context} tokens (context) does not fit into {budget} (max_tokens)"
        mistakes.append(Mistake(("validation", key), text))
    if isinstance(settings.get("gates"), dict) and levels is not None:
        settings["gates"], wrong = _gates(settings["gates"], levels)
        mistakes += wrong
    return mistakes


def _entries(data: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """The mappings that name a method, with their paths."""
    listed = data.get("quantizations")
    if not listed:
        yield (), data
    elif isinstance(listed, list):
        for index, entry in enumerate(listed):
            if isinstance(entry, dict):
                yield ("quantizations", index), entry


def _levels(
    entry: dict[str, Any], path: KeyPath, known: list[str], outputs: set[tuple[str, str, str]]
) -> list[Mistake]:
    """Check ``quant_level`` of one entry and give it the method's spelling; ``outputs`` are those seen so far."""
    path = (*path, "quant_level")
    given = entry.get("quant_level", [])
    listed = given if isinstance(given, list) else [given]
    options = entry.get("quantization_config")
    if not listed and not (isinstance(options, dict) and options.get("fit")):
        return [Mistake(path, f"missing; the levels of {entry['method']} are {', '.join(known)}")]
    folded = {level.casefold(): level for level in known}
    form = str(options.get("format")) if isinstance(options, dict) else "None"  # a level can be made in two
    mistakes, spelled = [], []
    for index, level in enumerate(listed):
        here = (*path, index) if isinstance(given, list) else path
        spelled.append(folded.get(level.casefold(), level) if isinstance(level, str) else level)
        if not isinstance(level, str):  # told by the structure
            continue
        output = (entry["method"], spelled[-1], form)
        if level.casefold() not in folded:
            near = suggest(level, known) or f"; known: {', '.join(known)}"
            mistakes.append(Mistake(here, f"{entry['method']} has no such level {show(level)}{near}"))
        elif output in outputs:
            mistakes.append(Mistake(here, f"{entry['method']} is asked for this level twice {show(level)}"))
        outputs.add(output)
    entry["quant_level"] = spelled if isinstance(given, list) else spelled[0]
    return mistakes


def _corpora(settings: dict[str, Any]) -> list[Mistake]:
    corpora = settings.get("corpora")
    if not isinstance(corpora, list):
        return []
    mistakes, seen = [], set()
    for index, corpus in enumerate(corpora):
        if not isinstance(corpus, dict):
            continue
        path = ("validation", "corpora", index)
        if ("path" in corpus) == ("dataset" in corpus):
            mistakes.append(Mistake(path, f"{ONE_ORIGIN} {show(corpus)}"))
        name = corpus.get("name")
        if isinstance(name, str):
            if name in seen:
                mistakes.append(Mistake((*path, "name"), f"another corpus has this name {show(name)}"))
            seen.add(name)
    return mistakes


def _checks(settings: dict[str, Any], catalogue: Catalogue) -> list[Mistake]:
    given = settings.get("checks")
    if not isinstance(given, list):
        return []
    known = catalogue.names("checks")
    path = ("validation", "checks")
    if not given:
        return [Mistake(path, f"at least one is needed; leave it out for all: {', '.join(known)}")]
    return [
        Mistake((*path, index), f"there is no such check {show(name)}{suggest(name, known)}")
        for index, name in enumerate(given)
        if isinstance(name, str) and name not in known
    ]


def _gates(gates: dict[str, Any], levels: Sequence[str]) -> tuple[dict[str, Any], list[Mistake]]:
    folded = {level.casefold(): level for level in (*levels, ALL_LEVELS)}
    spelled: dict[str, Any] = {}
    mistakes = []
    for level, limits in gates.items():
        path = ("validation", "gates", level)
        name = folded.get(level.casefold(), level)
        if level.casefold() not in folded:
            mistakes.append(Mistake(path, f"no method of this run has such a level{suggest(level, levels)}"))
        elif name in spelled:
            mistakes.append(Mistake(path, f"the gates of {name} stand here twice"))
        spelled[level if name in spelled else name] = limits
    return spelled, mistakes


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
