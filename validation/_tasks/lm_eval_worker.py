"""Tasks of EleutherAI's lm-eval: the workers that look for their names and that run them on a model."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantool.errors import ConfigError, nearest
from quantool.runtime.worker import Report, preloaded
from quantool.validation._cache.questions import load_engine
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.hf_tokenizer import load_tokenizer
from quantool.validation._tasks.lm_eval_adapter import adapted

DRAWS = 200
"""Bootstrap samples of a metric that is no mean over documents (F1 of a class, BLEU, perplexity)."""


JUDGED = re.compile(r"(?<![a-z])judged?(?![a-z])", re.IGNORECASE)
"""A task or metric for which a model is asked over the network (``pisa_en_llm_judged``); not ``causal_judgement``."""


@dataclass(frozen=True)
class Series:
    """One metric of a task or group, document by document.

    ``values`` has the grade of each of ``documents`` where the metric is their mean. Of any other metric ``draws`` has what
    it is on resampled documents; the draws of two models on the same documents are paired.
    """

    metric: str
    documents: list[str]
    values: list[float]
    draws: list[float]
    value: float
    higher: bool | None
    """Whether larger is better; None when the task does not say."""
    parts: dict[str, float]
    """Value by task, of a group."""


def look_up_tasks(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: look for ``tasks`` in lm-eval and in the folder ``include_path``; ConfigError naming the nearest of those missing."""
    _manager(request["tasks"], request["include_path"])
    report(1, 1)
    return {}


@preloaded("transformers")
def fetch_tasks(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: bring the documents of ``tasks`` into the cache of ``datasets``."""
    if request["cache_dir"]:
        os.environ["HF_DATASETS_CACHE"] = request["cache_dir"]  # read when datasets is imported
    _loaded(request)
    report(1, 1)
    return {}


@preloaded("transformers")
def ask(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: let a model do ``tasks``.

    Result: ``failure``, or empty; ``series`` by name of task or group (each the fields of a ``Series``); ``notes`` on what
    was done otherwise than a task says; ``documents``, a fingerprint of all documents and prompts.
    """
    if request["cache_dir"]:
        os.environ["HF_DATASETS_CACHE"] = request["cache_dir"]  # read when datasets is imported
    from lm_eval.evaluator import evaluate

    _seed()
    leaves, notes = _loaded(request)
    tasks = {task.task_name: task for found in leaves.values() for task in found}
    tokenizer = load_tokenizer(request["tokenizer"], trust_remote_code=request["trust_remote_code"])

    engine = partial(load_engine, request)
    model = adapted(tokenizer, engine, request["context"], report, chat=request["chat"])
    try:
        found = evaluate(
            model,
            {"tasks": tasks, "groups": {}},
            limit=request["limit"],
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=request["chat"],
            fewshot_as_multiturn=request["multiturn"],
        )
    except Unsound as outcome:
        return {"failure": str(outcome)}
    except ConfigError as error:  # an id that the model does not have
        return {"failure": error.message}
    samples = found["samples"]
    series = {
        name: [asdict(entry) for entry in _series(of_name, samples)] for name, of_name in leaves.items()
    }
    counted = [f"{count} {what}" for what, count in model.notes.items() if count]
    return {"failure": "", "series": series, "notes": notes + counted, "documents": _fingerprint(samples)}


def _seed() -> None:
    """Seed what tasks draw from as lm-eval's command line does, so that their examples are those of published figures."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002 - what the tasks use


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """The index of tasks that has all ``names``; of the folder alone where that is enough, for lm-eval's own takes a while."""
    from lm_eval.tasks import TaskManager

    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(_is_whole(own.task_index, name) for name in names):
            return own
    manager = TaskManager(include_path=include_path)
    missing = [name for name in names if name not in manager.all_tasks]
    if missing:
        likest = [f"{name!r} ({nearest(name, manager.all_tasks) or 'none is like it'})" for name in missing]
        raise ConfigError(
            f"validation.lm_eval.tasks: lm-eval has no task or group {', '.join(likest)}",
            hint=_unreadable(include_path)
            or "`lm-eval ls tasks` lists them; tasks of your own need validation.lm_eval.include_path",
        )
    return manager


def _is_whole(index: Mapping[str, Any], name: str | None) -> bool:
    """Whether the index has the task, or the group with all its members; a tag may have more elsewhere."""
    entry = index.get(name or "")
    if entry is None or entry.kind.name == "TAG":
        return False
    if entry.kind.name != "GROUP":
        return True
    members = entry.cfg.get("task") or []
    named = [
        entry if isinstance(entry, str) else entry.get("task") or entry.get("group") for entry in members
    ]
    return isinstance(members, list) and all(_is_whole(index, name) for name in named)


def _unreadable(include_path: str | None) -> str:
    """The task files of the folder that do not load: the index leaves them out without a word."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    unread = []
    for path in sorted(Path(include_path).rglob("*.yaml")) if include_path else []:
        try:
            load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, ValueError, OSError) as error:
            unread.append(f"{path} cannot be read: {' '.join(str(error).split())}")
    return "\n".join(unread)


def _loaded(request: dict[str, Any]) -> tuple[dict[str, list[Any]], list[str]]:
    """The tasks behind each name that was asked for, with their documents; and what to know about them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    manager = _manager(request["tasks"], request["include_path"])
    leaves: dict[str, list[Any]] = {}
    seen: dict[str, Any] = {}
    notes = []
    for name in request["tasks"]:
        loaded = manager.load([name])["tasks"].values()
        leaves[name] = [seen.setdefault(task.task_name, task) for task in loaded]
    for name, task in seen.items():
        refuse_judged(task, name)
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            why = (
                "runs code that a model wrote"
                if getattr(task, "UNSAFE_CODE", False)
                else "shows pictures or sound"
            )
            raise ConfigError(f"validation.lm_eval.tasks: {name} {why}, which quantool does not do")
        own, shots = task.get_config("num_fewshot"), request["num_fewshot"]
        if shots is not None and own == 0 and shots:
            notes.append(
                f"{name} says that it has no examples before a question, so num_fewshot {shots} is not used"
            )
            shots = 0
        task.set_config(key="num_fewshot", value=shots if shots is not None else own or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return leaves, notes


def refuse_judged(task: Any, name: str) -> None:
    """ConfigError for a task whose answers another model grades."""
    if any(JUDGED.search(word) for word in (name, *task.aggregation())):
        raise ConfigError(
            f"validation.lm_eval.tasks: {name} is not supported: another model judges its answers, so its figure depends "
            "on that one and cannot be compared",
            hint="take the form of the task that is graded by rule, where there is one",
        )


def _fingerprint(samples: Mapping[str, list[dict[str, Any]]]) -> str:
    """A fingerprint of the documents, prompts and right answers of all tasks."""
    lines = [
        f"{name} {sample['doc_id']} {sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}"
        for name, found in samples.items()
        for sample in found
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _series(tasks: Sequence[Any], samples: Mapping[str, list[dict[str, Any]]]) -> Iterator[Series]:
    """Every metric of a task; of a group each metric of its tasks over the documents of all that have it."""
    from lm_eval.api.metrics import mean

    by_metric: dict[str, list[tuple[Any, str, dict[str, Any]]]] = defaultdict(list)
    for task in tasks:
        raw: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
        for sample in samples[task.task_name]:
            for metric in sample["metrics"]:
                raw[metric, sample["filter"]][f"{task.task_name}/{sample['doc_id']}"] = sample[metric]
        for (metric, filtered), values in raw.items():
            by_metric[metric if filtered == "none" else f"{metric} ({filtered})"].append(
                (task, metric, values)
            )
    for label, found in by_metric.items():
        task, metric, values = found[0]
        higher = task.higher_is_better().get(metric)
        means = [task.aggregation().get(name, mean) is mean for task, name, _ in found]
        if all(means):
            together = {
                document: float(grade) for _, _, grades in found for document, grade in grades.items()
            }
            parts = {
                task.task_name: sum(map(float, grades.values())) / len(grades) for task, _, grades in found
            }
            value = sum(together.values()) / len(together)
            kept = parts if len(parts) > 1 else {}
            yield Series(label, list(together), list(together.values()), [], value, higher, kept)
            continue
        for task, name, grades in found:  # BLEU of one task and BLEU of another are no BLEU together
            own = label if len(found) == 1 else f"{label} of {task.task_name}"
            draws, value = _drawn(task.aggregation()[name], list(grades.values()))
            yield Series(own, list(grades), [], draws, value, higher, {})


def _drawn(aggregate: Any, grades: Sequence[Any]) -> tuple[list[float], float]:
    """A metric on ``DRAWS`` samples of the documents with replacement, the same for every model; and on all of them."""
    dice = random.Random(len(grades))  # noqa: S311
    draws = [float(aggregate(dice.choices(grades, k=len(grades)))) for _ in range(DRAWS)]
    return draws, float(aggregate(list(grades)))
