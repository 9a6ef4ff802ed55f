"""How long a graph takes on so many nodes, by its estimates: a list schedule, the longest chain first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantool.cluster.graph import RunStage
from quantool.cluster.resources import NodeShape, Resources


@dataclass(frozen=True)
class Makespan:
    """What a simulated run took."""

    nodes: int
    seconds: float
    chain: tuple[str, ...]
    """The stages of the longest chain, which no number of nodes makes shorter."""
    bound: float
    """Seconds that no schedule can be quicker than: the longest chain, or all work evenly over the nodes."""

    @property
    def efficiency(self) -> float:
        """The bound over the seconds: 1 is as good as can be."""
        return self.bound / self.seconds


def simulate(
    stages: Sequence[RunStage], needed: Mapping[str, Resources], node: NodeShape, nodes: int
) -> Makespan:
    """Do the stages on ``nodes`` nodes, each stage on one that has room for it, as a scheduler without priorities of users would."""
    behind = _chains(stages, needed)
    free = [(node.cpus, node.memory, node.gpus)] * nodes
    waiting = sorted(stages, key=lambda stage: -behind[stage.name][0])
    running: list[tuple[float, int, str]] = []
    done: set[str] = set()
    now = 0.0
    while waiting or running:
        for stage in [stage for stage in waiting if {*stage.after} <= done]:
            want = needed[stage.name]
            asked = (want.cpus, want.memory, want.gpus)
            place = next((n for n, room in enumerate(free) if _fits(asked, room)), None)
            if place is not None:
                free[place] = _less(free[place], asked)
                running.append((now + want.seconds, place, stage.name))
                waiting.remove(stage)
        if not running:
            raise ValueError(f"no node has room for {waiting[0].name}")
        ended = min(running)
        running.remove(ended)
        now, place, name = ended
        want = needed[name]
        free[place] = _less(free[place], (-want.cpus, -want.memory, -want.gpus))
        done.add(name)
    longest = max(behind.values())
    work = sum(each.seconds * _share(each, node) for each in needed.values()) / nodes
    return Makespan(nodes, now, longest[1], max(longest[0], work))


def _chains(
    stages: Sequence[RunStage], needed: Mapping[str, Resources]
) -> dict[str, tuple[float, tuple[str, ...]]]:
    """For each stage the longest chain that begins with it: seconds and names."""
    chains: dict[str, tuple[float, tuple[str, ...]]] = {}
    for stage in reversed(stages):
        rest = max(
            (chains[other.name] for other in stages if stage.name in other.after),
            default=(0.0, ()),
            key=lambda chain: chain[0],
        )
        chains[stage.name] = (needed[stage.name].seconds + rest[0], (stage.name, *rest[1]))
    return chains


def _share(want: Resources, node: NodeShape) -> float:
    """The part of a node that a stage keeps others from."""
    return max(want.cpus / node.cpus, want.memory / node.memory, want.gpus / node.gpus if node.gpus else 0.0)


def _fits(asked: tuple[int, int, int], room: tuple[int, int, int]) -> bool:
    return all(want <= there for want, there in zip(asked, room, strict=True))


def _less(room: tuple[int, int, int], asked: tuple[int, int, int]) -> tuple[int, int, int]:
    return (room[0] - asked[0], room[1] - asked[1], room[2] - asked[2])
