"""Making: every output of a plan by its method, those of one entry side by side where the method says that they fit."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence

from quantool import judging
from quantool.cluster.graph import entry_of
from quantool.cluster.marks import marked_in_run
from quantool.config.schema import Config
from quantool.plan import effort
from quantool.plan.depends import depends_of
from quantool.plugins import find
from quantool.plugins.contract import Job
from quantool.records import Artifact, OutputPlan, Plan
from quantool.runtime.parallel import in_threads
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace, link_file, write_text


def make_all(config: Config, plan: Plan, workspace: Workspace, progress: Progress) -> list[Artifact]:
    """The artifacts of all outputs, in the plan's order."""
    artifacts: list[Artifact] = []
    for _, group in itertools.groupby(plan.outputs, entry_of):
        outputs = list(group)
        lanes = _lanes(config, plan, outputs, workspace, progress)
        if lanes > 1:
            artifacts += _side_by_side(config, plan, outputs, workspace, progress, lanes)
        else:
            artifacts += [make_one(config, plan, output, workspace, progress) for output in outputs]
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
