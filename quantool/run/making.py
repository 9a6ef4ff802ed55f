"""Making: every output of a plan by its method, side by side where processors and memory allow that."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence

from quantool.cluster.graph import entry_of
from quantool.cluster.marks import marked_in_run
from quantool.config.schema import Config
from quantool.plan import effort
from quantool.plan.depends import depends_of
from quantool.plugins import find
from quantool.plugins.contract import Job
from quantool.records import Artifact, OutputPlan, Plan
from quantool.run import judging
from quantool.runtime import gpus, machine
from quantool.runtime.gpus import devices
from quantool.runtime.parallel import in_threads
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace, link_file, write_text

CORES = 8
"""Fewer are busy with what llama.cpp does, so that nothing else gets done beside it."""
HELD = 4
"""Whole models that a GPU holds at most while both lanes are judged: the reference, an artifact unpacked, a GGUF and its base."""
GPU_SHARE = 0.8
"""Of a GPU's memory, what they may take; activations and caches need the rest."""


def lanes_of(config: Config, plan: Plan) -> list[list[OutputPlan]]:
    """The outputs in lanes that are made and judged at the same time: those of torch on a GPU, those of llama.cpp beside them.

    llama.cpp converts and quantizes on the processors, where calibration on a GPU needs one. There is one lane without a
    GPU, with few processors, or with less memory than both need together.
    """
    of_processors = [output for output in plan.outputs if output.engine == "llama.cpp"]
    of_gpu = [output for output in plan.outputs if output.engine != "llama.cpp"]
    together = [of_processors, of_gpu]
    peak = sum(max((output.peak_ram for output in lane), default=0) for lane in together)
    if not all(together) or machine.cores() < CORES or peak > machine.free_ram() or not _holds(config, plan):
        return [[*plan.outputs]]
    return together


def _holds(config: Config, plan: Plan) -> bool:
    """Whether every GPU of the run has the memory for all that both lanes ever hold."""
    if devices(config.device).kind == "cpu":
        return False
    weights = sum(file.bytes for file in plan.source.files if file.name.endswith(".safetensors"))
    return HELD * weights <= GPU_SHARE * min(gpus.memory(), default=0)


def make_all(
    config: Config, plan: Plan, outputs: Sequence[OutputPlan], workspace: Workspace, progress: Progress
) -> list[Artifact]:
    """The artifacts of ``outputs``, in their order."""
    artifacts: list[Artifact] = []
    for _, group in itertools.groupby(outputs, entry_of):
        alike = list(group)
        lanes = _lanes(config, plan, alike, workspace, progress)
        if lanes > 1:
            artifacts += _side_by_side(config, plan, alike, workspace, progress, lanes)
        else:
            artifacts += [make_one(config, plan, output, workspace, progress) for output in alike]
    return artifacts


def share(
    config: Config, plan: Plan, outputs: Sequence[OutputPlan], workspace: Workspace, progress: Progress
) -> None:
    """Make what the outputs of one entry are made from."""
    _lanes(config, plan, outputs, workspace, progress)


def _lanes(
    config: Config, plan: Plan, outputs: Sequence[OutputPlan], workspace: Workspace, progress: Progress
) -> int:
    """How many outputs may be made at once; asking the method makes what they share."""
    method = find.find_method(outputs[0].method)
    if method.at_once is None or len(outputs) == 1:
        return 1
    jobs = [Job(config, plan, output, workspace, depends_of(method)) for output in outputs]
    with progress.within(effort.make_step(outputs[0])):
        wanted = method.at_once(jobs, method.options.model_validate(outputs[0].options), progress)
    return min(wanted, len(outputs))


def _side_by_side(
    config: Config,
    plan: Plan,
    outputs: Sequence[OutputPlan],
    workspace: Workspace,
    progress: Progress,
    lanes: int,
) -> list[Artifact]:
    """Make outputs in threads, each beginning with the next when it is done with one; an error ends its thread alone."""
    waiting = deque(outputs)
    made: dict[str, Artifact] = {}

    def lane() -> None:
        while waiting:
            try:
                output = waiting.popleft()
            except IndexError:  # another was quicker
                return
            made[output.id] = make_one(config, plan, output, workspace, progress)

    started = time.monotonic()
    with progress.together([effort.make_step(output) for output in outputs]):
        try:
            in_threads([lane] * lanes)
        finally:
            waiting.clear()
    took = sum(workspace.seconds.get(output.id, 0.0) for output in outputs)
    for output in outputs:  # each one's part of the time, as if it had been made alone
        if output.id in workspace.seconds:
            workspace.seconds[output.id] *= (time.monotonic() - started) / took
    return [made[output.id] for output in outputs]


def make_one(
    config: Config, plan: Plan, output: OutputPlan, workspace: Workspace, progress: Progress
) -> Artifact:
    """Let the method make one output."""
    method = find.find_method(output.method)
    options = method.options.model_validate(output.options)
    job = Job(config, plan, output, workspace, depends_of(method))
    name = effort.make_step(output)
    with marked_in_run(workspace, name), progress.step(name), workspace.timed(output.id):
        artifact = method.quantize(job, options, progress)
    if artifact.folder.name != output.repo:  # recalled; it was made for another repository
        for file in (*artifact.files, *artifact.shared):
            earlier = workspace.root / artifact.folder.name / file.name
            if earlier.is_file():
                link_file(earlier, job.folder / file.name)
    artifact = artifact.model_copy(update={"folder": job.folder})  # the output folder may have been moved
    write_text(judging.record_path(workspace, "artifact", output.id), artifact.model_dump_json(indent=1))
    return artifact
