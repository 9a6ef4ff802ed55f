"""The graph of a run: what waits for what, what is left to do, what it asks a scheduler for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from quantool.cluster.graph import Kind, RunStage, graph_of, waiting
from quantool.cluster.resources import NodeShape, Resources, require_time, resources_of
from quantool.cluster.simulate import simulate
from quantool.config.load import load
from quantool.config.schema import Config
from quantool.errors import ConfigError
from quantool.pipeline import plan
from quantool.plugins import find
from quantool.records import OutputPlan, Plan, StagePlan
from quantool.runtime.progress import Progress

pytestmark = pytest.mark.usefixtures("plugin")
GIB = 1 << 30
NODE = NodeShape(80, 512 * GIB, 4)


@pytest.fixture
def planned(config_file: Callable[..., Path]) -> tuple[Config, Plan]:
    config = load(config_file(), (), find).config
    return config, plan(config, Progress(quiet=True))


def with_outputs(made: Plan, *outputs: dict[str, object]) -> Plan:
    """The plan with these outputs: the first one of it, changed."""
    drawn = tuple(made.outputs[0].model_copy(update=output) for output in outputs)
    others = [part for part in made.stages if not part.name.startswith("fake/")]
    own = [StagePlan(name=output.id, writes=64, peak_ram=1 << 20) for output in drawn]
    return made.model_copy(update={"outputs": drawn, "stages": (*others, *own)})


def after(stages: Iterable[RunStage]) -> dict[str, tuple[str, ...]]:
    return {stage.name: stage.after for stage in stages}


def test_outputs_are_made_side_by_side_and_packed_by_folder(planned: tuple[Config, Plan]) -> None:
    config, made = planned
    assert after(graph_of(made, config)) == {
        "source": (),
        "make fake/Q8_0": ("source",),
        "make fake/Q4_K_M": ("source",),
        "judge fake/Q8_0": ("make fake/Q8_0",),
        "judge fake/Q4_K_M": ("make fake/Q4_K_M",),
        "pack model-FAKE": ("judge fake/Q8_0", "judge fake/Q4_K_M"),
    }


GGUF = {"method": "gguf", "needs": ("base", "imatrix"), "repo": "G"}
MIXED: tuple[dict[str, object], ...] = (
    {**GGUF, "id": "gguf/Q8_0"},
    {**GGUF, "id": "gguf/Q4_K_M"},
    {"method": "fp16", "id": "fp16/F16", "needs": ("base",), "repo": "G"},
    {"method": "fp8", "id": "fp8/FP8_DYNAMIC", "engine": "transformers", "repo": "F"},
)


@pytest.fixture
def mixed(planned: tuple[Config, Plan]) -> tuple[Config, Plan]:
    config, made = planned
    checks = config.validation.model_copy(update={"checks": ("perplexity", "integrity")})
    return config.model_copy(update={"validation": checks}), with_outputs(made, *MIXED)


def test_what_several_outputs_need_is_made_once_before_them(mixed: tuple[Config, Plan]) -> None:
    config, made = mixed
    waits = after(graph_of(made, config))
    assert waits["share gguf"] == ("source",)
    assert waits["make gguf/Q4_K_M"] == ("share gguf",)
    assert waits["make fp16/F16"] == ("share gguf",)  # the base is theirs as well
    assert waits["make fp8/FP8_DYNAMIC"] == ("source",)
    assert waits["reference"] == ("source",)
    assert waits["base gguf"] == ("reference", "make gguf/Q8_0")
    assert waits["judge gguf/Q4_K_M"] == ("make gguf/Q4_K_M", "reference", "base gguf")
    assert waits["judge fp8/FP8_DYNAMIC"] == ("make fp8/FP8_DYNAMIC", "reference")
    assert waits["pack G"] == ("judge gguf/Q8_0", "judge gguf/Q4_K_M", "judge fp16/F16")
    assert waits["pack F"] == ("judge fp8/FP8_DYNAMIC",)


def test_stages_stand_behind_those_that_they_wait_for(mixed: tuple[Config, Plan]) -> None:
    config, made = mixed
    # fp16 first: it makes the base itself where gguf has one level alone
    turned = with_outputs(made, MIXED[0], MIXED[2])
    for drawn in (made, turned):
        seen: set[str] = set()
        for stage in graph_of(drawn, config):
            assert {*stage.after} <= seen, stage
            seen.add(stage.name)
    waits = after(graph_of(turned, config))
    assert "share gguf" not in waits
    assert waits["make fp16/F16"] == ("make gguf/Q8_0",)


def test_what_nobody_needs_any_more_is_not_sent(mixed: tuple[Config, Plan]) -> None:
    config, made = mixed
    graph = graph_of(made, config)
    every = {stage.name for stage in graph}
    assert [stage.name for stage in waiting(graph, ())] == [stage.name for stage in graph]
    assert (
        waiting(graph, {name for name in every if not name.startswith(("share", "reference", "base"))}) == ()
    )
    left = every - {"judge fp8/FP8_DYNAMIC", "pack F", "share gguf", "reference", "base gguf"}
    assert [stage.name for stage in waiting(graph, left)] == ["reference", "judge fp8/FP8_DYNAMIC", "pack F"]


def test_what_computes_gets_a_node_and_the_rest_a_part(mixed: tuple[Config, Plan]) -> None:
    config, made = mixed
    needed = resources_of(graph_of(made, config), made, config, NODE)
    shape = {name: (each.cpus, each.gpus) for name, each in needed.items()}
    assert shape["source"] == shape["pack G"] == (8, 0)
    assert shape["reference"] == shape["judge fp8/FP8_DYNAMIC"] == (80, 4)
    assert shape["judge gguf/Q8_0"] == (80, 0)  # llama.cpp computes on the CPU unless device says cuda
    assert shape["make gguf/Q8_0"] == (16, 0)
    on_gpus = config.model_copy(update={"device": "cuda"})
    needed = resources_of(graph_of(made, on_gpus), made, on_gpus, NODE)
    assert needed["judge gguf/Q8_0"].gpus == 4
    on_cpu = config.model_copy(update={"device": "cpu"})
    assert {each.gpus for each in resources_of(graph_of(made, on_cpu), made, on_cpu, NODE).values()} == {0}


def test_memory_and_time_that_are_not_there_are_refused(mixed: tuple[Config, Plan]) -> None:
    config, made = mixed
    graph = graph_of(made, config)
    with pytest.raises(ConfigError, match=r"needs .* of memory, a node has 2\.1 GB"):
        resources_of(graph, made, config, NodeShape(8, 2 * GIB, 0))
    long = {"source": Resources(8, GIB, 0, 100), "reference": Resources(8, GIB, 0, 7300)}
    require_time(long, None, "cluster.slurm.time")
    require_time(long, 122, "cluster.slurm.time")
    with pytest.raises(
        ConfigError, match=r"reference is expected to take 2 h 2 min, longer than .* \(2 h 0 min\)"
    ):
        require_time(long, 120, "cluster.slurm.time")


def stage(name: str, *before: str) -> RunStage:
    return RunStage(name, Kind.MAKE, (name,), before)


def test_a_simulated_cluster_is_as_quick_as_its_longest_chain() -> None:
    stages = (
        stage("a"),
        *(stage(f"b{number}", "a") for number in range(4)),
        stage("c", "b0", "b1", "b2", "b3"),
    )
    needed = {each.name: Resources(4, GIB, 0, 10.0) for each in stages}
    small = NodeShape(4, 8 * GIB, 0)
    assert simulate(stages, needed, small, 1).seconds == 60
    assert simulate(stages, needed, small, 2).seconds == 40
    four = simulate(stages, needed, small, 4)
    assert (four.seconds, four.chain) == (30, ("a", "b0", "c"))
    assert four.efficiency == 1
    assert simulate(stages, needed, NodeShape(8, 8 * GIB, 0), 1).seconds == 40  # two fit on one node
    assert simulate(stages, needed, NodeShape(16, 2 * GIB, 0), 1).seconds == 40  # memory for two


def test_one_output(mixed: tuple[Config, Plan]) -> None:
    config, made = mixed
    one: OutputPlan = with_outputs(made, MIXED[3]).outputs[0]
    names = [each.name for each in graph_of(made.model_copy(update={"outputs": (one,)}), config)]
    assert names == ["source", "reference", "make fp8/FP8_DYNAMIC", "judge fp8/FP8_DYNAMIC", "pack F"]
