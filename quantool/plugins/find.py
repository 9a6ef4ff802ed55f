"""Methods and checks by name: built-in ones by listing their folder, others by entry points.

The entry-point groups are ``quantool.methods`` and ``quantool.checks``. Modules that start with an underscore are shared
code. The core never names a method or a check.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from quantool.config.schema import Config
from quantool.errors import ConfigError, DependencyError, nearest
from quantool.plugins.contract import Check, Method
from quantool.tasks import Task


def names(folder: str) -> list[str]:
    """Names available in ``folder`` (``"methods"`` or ``"checks"``), sorted, without importing any."""
    package = importlib.import_module(_package(folder))
    return sorted(_built_in(tuple(package.__path__)) | {point.name for point in _entry_points(folder)})


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises ConfigError naming the nearest when there is none, DependencyError with the extra to install when it lacks
    a library, and when somebody else's cannot be imported.
    """
    found = _find("methods", "method", name)
    if not isinstance(found, Method):
        raise ConfigError(f"{found!r} is registered as method {name!r} but is not one")
    missing = [need for need in found.needs if importlib.util.find_spec(need) is None]
    if missing:
        hint = f"pip install 'quantool[{found.extra}]'" if found.extra else f"pip install {' '.join(missing)}"
        raise DependencyError(f"method {name!r} needs {', '.join(missing)}", hint=hint)
    return found


def find_check(name: str) -> Check:
    """The check called ``name``; ConfigError naming the nearest when there is none."""
    found = _find("checks", "check", name)
    if not isinstance(found, Check):
        raise ConfigError(f"{found!r} is registered as check {name!r} but is not one")
    return found


def judging_checks(config: Config, task: Task) -> list[str]:
    """Names of the checks that judge a model of ``task``: those that the configuration names, else all that can.

    Raises ConfigError for one named there that says nothing about such models.
    """
    named = config.validation.checks
    if named is None:
        return [name for name in names("checks") if applies(name, task)]
    if strange := [name for name in named if not applies(name, task)]:
        fitting = [name for name in names("checks") if applies(name, task)]
        raise ConfigError(
            f"validation.checks: {', '.join(strange)} cannot judge this model, which is for {task.kind}",
            hint=f"leave validation.checks out, or choose of {', '.join(fitting)}",
        )
    return [*named]


def active_checks(config: Config, task: Task) -> dict[str, Check]:
    """By name the checks that will judge: of ``judging_checks`` those whose section of the configuration, if any, is set.

    One that cannot be loaded is left out: a run says so before it starts.
    """
    found: dict[str, Check] = {}
    for name in judging_checks(config, task):
        with suppress(ConfigError, DependencyError):
            check = find_check(name)
            if getattr(config.validation, name, True) is not None:
                found[name] = check
    return found


def applies(name: str, task: Task) -> bool:
    """Whether a check judges models of ``task``; of one that cannot be loaded that is not known, so it stays."""
    try:
        return task.kind in find_check(name).tasks
    except (ConfigError, DependencyError):
        return True


def _package(folder: str) -> str:
    return "quantool.validation" if folder == "checks" else f"quantool.{folder}"


@lru_cache(maxsize=8)
def _built_in(path: tuple[str, ...]) -> frozenset[str]:
    """The modules in the folders of ``path`` that are no shared code."""
    return frozenset(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def _entry_points(folder: str) -> tuple[EntryPoint, ...]:
    return _installed(f"quantool.{folder}", tuple(sys.path))


@lru_cache(maxsize=8)
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group in the folders of ``path``: reading every distribution's takes 20 ms."""
    del path
    return tuple(entry_points(group=group))


def _load(point: EntryPoint, kind: str) -> object:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        owner = point.dist.name if point.dist else point.value
        raise DependencyError(f"{kind} {point.name!r} of {owner} cannot be loaded: {error}") from error


def _find(folder: str, kind: str, name: str) -> object:
    for point in _entry_points(folder):
        if point.name == name:
            return _load(point, kind)
    known = names(folder)
    if name not in known:
        raise ConfigError(f"unknown {kind} {name!r}; known: {', '.join(known)}", hint=nearest(name, known))
    module = importlib.import_module(f"{_package(folder)}.{name}")
    for value in vars(module).values():
        if isinstance(value, (Method, Check)) and value.name == name:
            return value
    raise ConfigError(f"{module.__name__} registers no {kind} named {name!r}")
