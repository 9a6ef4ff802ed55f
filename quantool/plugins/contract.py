"""What a method and a check are: their registration, and what each is handed.

A method is a function marked ``@method(...)`` in a file of ``methods/`` named like it; a check is a function marked
``@check(...)`` in a file of ``validation/``. ``quantool.plugins.find`` finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, JsonValue

from quantool.plugins.keys import UNDECLARED, Depends, key_of
from quantool.tasks import TaskKind

if TYPE_CHECKING:
    from quantool.config.schema import Config, Validation
    from quantool.ledger import TensorLine
    from quantool.records import Artifact, FileRecord, Finding, Gates, OutputPlan, Plan, Source, StagePlan
    from quantool.runtime.progress import Progress
    from quantool.runtime.workspace import Workspace


class Options(BaseModel):
    """Options of a method (``quantization_config``): closed to unknown keys, every field described."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Request:
    """What a method is asked to outline: one entry of ``quantizations`` on a source."""

    config: Config
    source: Source
    levels: tuple[str, ...]
    repo_id: str | None
    workspace: Workspace
    gates: Callable[[str], Gates]
    """Gates of a level: the defaults under what the configuration says."""
    depends: Depends = UNDECLARED
    """What the method declared, or all there is."""

    def key(self, level: str, options: Options, *parts: Any) -> str:
        """The key that ``Job.key`` will give the output of a level; ``parts`` are what only the method knows."""
        return key_of(self.depends, self.source, level, parts, config=self.config, options=options)


@dataclass(frozen=True)
class Outline:
    """What a method says before weights are touched: its outputs (one a level) and the stages they share."""

    outputs: tuple[OutputPlan, ...]
    stages: tuple[StagePlan, ...] = ()
    warnings: tuple[str, ...] = ()
    lines: Mapping[str, Sequence[TensorLine]] = field(default_factory=dict)
    """By an output's id: what becomes of every tensor of the source, one line each; one that is dropped has a reason, or
    the user must leave its part out (``drop``). An output without lines counts as holding the whole source but
    ``drops``."""
    drops: Mapping[str, str] = field(default_factory=dict)
    """Parts of a checkpoint (``vision``, ``mtp`` …) that no output of this method holds, with the reason."""


@dataclass(frozen=True)
class Job:
    """One output to make: the plan, the output's part of it, and the workspace to make it in."""

    config: Config
    plan: Plan
    output: OutputPlan
    workspace: Workspace
    depends: Depends = UNDECLARED
    """What the method declared, or all there is."""

    @property
    def folder(self) -> Path:
        """The publishable folder that the files go to."""
        return self.workspace.root / self.output.repo

    def key(self, options: Options, *parts: Any) -> str:
        """The key under which the workspace keeps the output; ``parts`` are what only the method knows."""
        level = self.output.level
        return key_of(self.depends, self.plan.source, level, parts, config=self.config, options=options)

    def versions(self) -> dict[str, str]:
        """The versions that take part in making the output, for its record."""
        return self.depends.versions()


class Quantize(Protocol):
    """The work of a method. ``options`` is an instance of the class that the method was registered with."""

    def __call__(self, job: Job, options: Any, progress: Progress, /) -> Artifact:
        """Make the job's output in its folder."""


class AtOnce(Protocol):
    """How far a method can make several outputs side by side."""

    def __call__(self, jobs: Sequence[Job], options: Any, progress: Progress, /) -> int:
        """Make what the outputs share, then say how many of them may be made at the same time, in threads."""


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
    depends: Depends | None = None
    """What the bytes of its outputs depend on; None: on everything."""
    at_once: AtOnce | None = None
    """None: one output after the other."""
    adapters: bool = False
    """Whether it can leave an adapter beside its base (``merge: false``)."""


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
    files: tuple[FileRecord, ...] = ()
    """Its files and those it shares, by hash; empty where nobody hashed them."""
    neighbours: tuple[str, ...] = ()
    """Names of all files that the plan has for its folder."""
    details: Mapping[str, JsonValue] = field(default_factory=dict)
    """What its method recorded while it made it; empty for an artifact that this run did not make."""
    cache: str | None = None
    """Type of the attention cache that the engine is to use, as ``validation.long.kv`` names it; None: its own choice."""

    @property
    def settings(self) -> Validation:
        """The validation part of the configuration."""
        return self.config.validation

    def key(self, depends: Depends, *parts: Any) -> str:
        """The key of a result about the source (or, with the declared engine, the artifact) of this case."""
        return key_of(depends, self.source, *parts, config=self.config, engine=self.engine)


@dataclass(frozen=True)
class Download:
    """A published artifact on somebody's machine, without the checkpoint that it was made from."""

    artifact: Path
    """As in ``Case``."""
    engine: str
    name: str
    """As in ``Case``."""
    left: Mapping[str, JsonValue]
    """What the check left when the artifact was judged."""
    files: tuple[FileRecord, ...]
    """The artifact's files, by the hashes that they have now."""
    scratch: Path
    """A folder for logs and what a worker keeps while it runs."""
    device: str = "cpu"
    """``cpu`` or ``cuda``, for engines that can choose."""
    trust_remote_code: bool = False


def left_file(workspace: Workspace, case: str, check: str) -> Path:
    """Where a check leaves, as JSON, what is published with an artifact so that ``Check.replay`` can prove it again."""
    return workspace.work / "left" / f"{case.replace('/', '-')}.{check}.json"


class Judge(Protocol):
    """The work of a check."""

    def __call__(self, case: Case, progress: Progress, /) -> Sequence[Finding]:
        """Judge one artifact."""


class Replay(Protocol):
    """What a check can prove again of a published artifact."""

    def __call__(self, download: Download, progress: Progress, /) -> Sequence[Finding]:
        """Compare with what ``judge`` left in ``left_file``. Raises as ``judge`` does."""


class Writes(Protocol):
    """What a check keeps on disk."""

    def __call__(self, config: Config, source: Source, /) -> int:
        """Bytes, for all artifacts of a run together."""
        ...


class Computes(Protocol):
    """What a check lets a model compute, from which the plan tells the time."""

    def __call__(self, config: Config, source: Source, /) -> tuple[int, int]:
        """Tokens that it reads, and that it generates one by one: of the reference, and of each artifact."""
        ...


class Prepare(Protocol):
    """Work of a check that is cheaper for several artifacts at once; what it finds is kept in their workspace."""

    def __call__(self, cases: Sequence[Case], progress: Progress, /) -> None:
        """Called once before each of ``cases`` is judged; never with none."""


class Compare(Protocol):
    """Work of a check that is the same for every artifact: what the source answers, and the base of a GGUF."""

    def __call__(self, case: Case, progress: Progress, /) -> None:
        """Leave it in the workspace, for a case with a base that base's part too; the artifact is not looked at."""


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
    compare: Compare | None = None
    """What a cluster does once, before artifacts are judged on several nodes; None: nothing that takes time."""
    fetch: Require | None = None
    """Brings what it reads from the network to this machine's caches: nodes of a cluster have no network."""
    require: Require | None = None
    depends: Depends | None = None
    """What its findings depend on beside the artifact's bytes and plan; None: on everything."""
    writes: Writes | None = None
    computes: Computes | None = None
    """None: nothing that takes time."""
    loads_reference: bool = False
    """Whether it loads the checkpoint with transformers, where the section of its name (if there is one) is set."""
    holds_model: bool = False
    """Whether it holds the whole checkpoint in memory, where the section of its name (if there is one) is set."""
    tasks: frozenset[TaskKind] = frozenset(TaskKind)
    """What the models that it judges are for."""
    replay: Replay | None = None
    """None: it needs the reference."""


def method(
    name: str,
    *,
    options: type[Options],
    levels: Callable[[], dict[str, str]],
    outline: Draft,
    needs: tuple[str, ...] = (),
    extra: str = "",
    depends: Depends | None = None,
    at_once: AtOnce | None = None,
    adapters: bool = False,
) -> Callable[[Quantize], Method]:
    """Mark a function as the method ``name``; the module's attribute becomes the ``Method``.

    ``depends`` declares what the bytes depend on beside the checkpoint; without it, on every key of the configuration.
    ``at_once`` says how many outputs of one entry may be made side by side; without it they are made one by one.
    ``adapters`` says that it makes an adapter a file of its own where the configuration asks for that.
    """
    return lambda quantize: Method(
        name, options, levels, outline, quantize, needs, extra, depends, at_once, adapters
    )


def check(
    name: str,
    *,
    prepare: Prepare | None = None,
    compare: Compare | None = None,
    fetch: Require | None = None,
    require: Require | None = None,
    depends: Depends | None = None,
    writes: Writes | None = None,
    computes: Computes | None = None,
    loads_reference: bool = False,
    holds_model: bool = False,
    tasks: Iterable[TaskKind] = TaskKind,
    replay: Replay | None = None,
) -> Callable[[Judge], Check]:
    """Mark a function as the check ``name``; its docstring's first line is the summary.

    ``compare`` is work that is the same for every artifact, so that several nodes need not do it at once;
    ``fetch`` brings what is read from the network, before stages are sent to nodes without one.
    ``require`` is asked before anything is judged, and by the plan, where it is a check that has no section of its name below
    ``validation`` or whose section is set.
    ``depends`` declares what the findings depend on beside the artifact and its plan; without it, on everything.
    ``loads_reference`` says that it loads the checkpoint with transformers, so that the plan makes sure that it can.
    ``tasks`` are what the models that it judges are for; models for something else are judged without it.
    ``writes`` says how many bytes it keeps on disk, ``computes`` how many tokens it runs through a model, ``holds_model``
    that it needs memory for all weights of the checkpoint at once; the plan counts them.
    ``replay`` proves again, without the checkpoint, what the check left in ``left_file``.
    """
    return lambda judge: Check(
        name=name,
        summary=(judge.__doc__ or "").strip().partition("\n")[0],
        judge=judge,
        prepare=prepare,
        compare=compare,
        fetch=fetch,
        require=require,
        depends=depends,
        writes=writes,
        computes=computes,
        loads_reference=loads_reference,
        holds_model=holds_model,
        tasks=frozenset(tasks),
        replay=replay,
    )
