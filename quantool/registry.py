"""Methods and checks by name.

A method is a function marked ``@method(...)`` in a file of ``methods/`` named like it; a check is a function marked
``@check(...)`` in a file of ``validation/``. Built-in ones are found by listing the folder, without importing it;
others by the entry-point groups ``quantool.methods`` and ``quantool.checks``. Modules that start with an underscore
are shared code. The core never names one of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from quantool.errors import ConfigError, DependencyError, nearest

if TYPE_CHECKING:
    from quantool.config import Config, Validation
    from quantool.plan import Request
    from quantool.progress import Progress
    from quantool.records import Artifact, Finding, Gates, OutputPlan, Plan, Source, StagePlan
    from quantool.workspace import Workspace


class Options(BaseModel):
    """Options of a method (``quantization_config``): closed to unknown keys, every field described."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Outline:
    """What a method says before weights are touched: its outputs (one a level) and the stages they share."""

    outputs: tuple[OutputPlan, ...]
    stages: tuple[StagePlan, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One output to make: the plan, the output's part of it, and the workspace to make it in."""

    config: Config
    plan: Plan
    output: OutputPlan
    workspace: Workspace

    @property
    def folder(self) -> Path:
        """The publishable folder that the files go to."""
        return self.workspace.root / self.output.repo


class Quantize(Protocol):
    """The work of a method. ``options`` is an instance of the class that the method was registered with."""

    def __call__(self, job: Job, options: Any, progress: Progress, /) -> Artifact:
        """Make the job's output in its folder."""


class Draft(Protocol):
    """The planning of a method: validates levels and options against the source, without reading weights."""

    def __call__(self, request: Request, options: Any, /) -> Outline:
        """Say what the method would make for the request's levels."""


@dataclass(frozen=True)
class Method:
    """A registered method."""

    name: str
    options: type[Options]
    levels: Callable[[], dict[str, str]]
    """Level name to one line of description; may ask the installed tool."""
    outline: Draft
    quantize: Quantize
    needs: tuple[str, ...] = ()
    """Import names this method cannot work without."""
    extra: str = ""
    """The optional dependency group that brings them."""


@dataclass(frozen=True)
class Case:
    """One artifact to judge. ``workspace`` keeps what several artifacts share (the reference's scores)."""

    artifact: Path
    """A GGUF file (the first shard of a split one) or a folder that transformers loads."""
    engine: str
    """``llama.cpp`` or ``transformers``."""
    name: str
    """For messages and log files: ``gguf/Q4_K_M``."""
    source: Source
    config: Config
    gates: Gates
    workspace: Workspace
    output: OutputPlan | None = None
    """What the plan says about it; None for an artifact that this run did not make."""
    base: Path | None = None
    """The unquantized GGUF that it was made from (first shard), when it is there."""

    @property
    def settings(self) -> Validation:
        """The validation part of the configuration."""
        return self.config.validation


class Judge(Protocol):
    """The work of a check."""

    def __call__(self, case: Case, progress: Progress, /) -> Sequence[Finding]:
        """Judge one artifact."""


class Prepare(Protocol):
    """Work of a check that is cheaper for several artifacts at once; what it finds is kept in their workspace."""

    def __call__(self, cases: Sequence[Case], progress: Progress, /) -> None:
        """Called once before each of ``cases`` is judged; never with none."""


class Require(Protocol):
    """What a check needs of the configuration, the source and this machine."""

    def __call__(self, config: Config, source: Source, /) -> None:
        """Raise ConfigError or DependencyError for what the check would refuse hours later."""


@dataclass(frozen=True)
class Check:
    """A registered check."""

    name: str
    summary: str
    judge: Judge
    prepare: Prepare | None = None
    require: Require | None = None


def method(
    name: str,
    *,
    options: type[Options],
    levels: Callable[[], dict[str, str]],
    outline: Draft,
    needs: tuple[str, ...] = (),
    extra: str = "",
) -> Callable[[Quantize], Method]:
    """Mark a function as the method ``name``; the module's attribute becomes the ``Method``."""
    return lambda quantize: Method(name, options, levels, outline, quantize, needs, extra)


def check(
    name: str, *, prepare: Prepare | None = None, require: Require | None = None
) -> Callable[[Judge], Check]:
    """Mark a function as the check ``name``; its docstring's first line is the summary.

    ``require`` is asked by the plan when the configuration has a section of the check's name below ``validation``.
    """
    return lambda judge: Check(
        name, (judge.__doc__ or "").strip().partition("\n")[0], judge, prepare, require
    )


def names(folder: str) -> list[str]:
    """Names available in ``folder`` (``"methods"`` or ``"checks"``), sorted, without importing any."""
    package = importlib.import_module(_package(folder))
    found = {
        module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")
    }
    found |= {point.name for point in entry_points(group=f"quantool.{folder}")}
    return sorted(found)


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


def _package(folder: str) -> str:
    return "quantool.validation" if folder == "checks" else f"quantool.{folder}"


def _load(point: EntryPoint, kind: str) -> object:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        owner = point.dist.name if point.dist else point.value
        raise DependencyError(f"{kind} {point.name!r} of {owner} cannot be loaded: {error}") from error


def _find(folder: str, kind: str, name: str) -> object:
    for point in entry_points(group=f"quantool.{folder}"):
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
