"""What spreads stages over machines: Slurm, the GPUs of this one, or somebody else's plug-in."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from quantool.cluster.scheduler import Scheduler
from quantool.config.cluster import Cluster
from quantool.errors import ConfigError, DependencyError, nearest

GROUP = "quantool.clusters"
"""Entry points: a name that ``cluster.engine`` takes, for a function of ``cluster`` and the output folder that gives a ``Scheduler``."""


def find_scheduler(cluster: Cluster, output: Path) -> Scheduler:
    """The engine that ``cluster`` of a configuration names.

    Raises ConfigError for a name that nobody has registered, DependencyError for a library that is missing.
    """
    if cluster.name == "slurm":
        from quantool.cluster.slurm import SlurmScheduler

        return SlurmScheduler(cluster, output)
    if cluster.name == "local":
        from quantool.cluster.local import LocalScheduler

        return LocalScheduler(cluster, output)
    points = {point.name: point for point in entry_points(group=GROUP)}
    if cluster.name not in points:
        known = ["local", "slurm", *sorted(points)]
        raise ConfigError(
            f"unknown cluster.engine {cluster.name!r}; known: {', '.join(known)}",
            hint=nearest(cluster.name, known),
        )
    try:
        made: Scheduler = points[cluster.name].load()(cluster, output)
    except (ImportError, AttributeError) as error:
        raise DependencyError(f"cluster.engine {cluster.name!r} cannot be loaded: {error}") from error
    return made
