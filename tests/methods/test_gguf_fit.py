"""Fitted GGUF files of the tiny chat model: made once, planned, judged, and compared with llama.cpp's own tools."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import making
import pytest

from quantool import pipeline
from quantool.config.schema import Validation
from quantool.errors import ConfigError
from quantool.formats.gguf_header import read_header
from quantool.formats.tensor_types import name_of, read_recipe, write_recipe
from quantool.methods import gguf
from quantool.methods._llama_cpp import dry_run
from quantool.methods._llama_cpp.fit import costs
from quantool.methods._llama_cpp.fit.costs import importance, read_costs
from quantool.methods._llama_cpp.fit.live_model import NO_REUSE, live_model
from quantool.methods._llama_cpp.fit.outline import recipe_types
from quantool.methods._llama_cpp.fit.targets import FitTarget
from quantool.methods._llama_cpp.fit.yardstick import whole_windows, yardstick
from quantool.plan.depends import depends_of
from quantool.plugins.contract import Case, Job
from quantool.plugins.find import find_method
from quantool.records import Artifact, Gates, Plan, Verdict
from quantool.runtime import process
from quantool.runtime.worker import Report
from quantool.runtime.workspace import Workspace
from quantool.validation.integrity import judge as integrity
from quantool.validation.ledger import judge as ledger

pytestmark = pytest.mark.e2e
BUDGET = 3_300_000
KLD = 0.01
TEXT: dict[str, Any] = {
    "dataset_path": making.CALIBRATION,
    "calibration_config": {"max_tokens": 6 * 512},
}


@pytest.fixture(scope="module", autouse=True)
def _cache() -> Iterator[None]:
    with making.own_cache():
        yield


def config(output: Path, fit: list[dict[str, Any]], **options: Any) -> Any:
    keys = TEXT | options.pop("keys", {})
    chosen = {"imatrix": True, "fit": fit} | options
    return making.config(making.TINY, output, "Q4_K_M", quantization_config=chosen, **keys)


@making.shared
def fitted() -> tuple[Plan, list[Artifact]]:
    """Q4_K_M, a file of at most ``BUDGET`` bytes, and the smallest of a mean KL divergence of ``KLD``."""
    return making.make(config(making.room() / "fitted", [{"size": f"{BUDGET}B"}, {"kld": KLD}]))


def path_of(artifact: Artifact) -> Path:
    return artifact.folder / artifact.files[0].name


def case_of(plan: Plan, artifact: Artifact, **changed: Any) -> Case:
    (output,) = [one for one in plan.outputs if one.id == artifact.output]
    root = artifact.folder.parent
    details = artifact.details | changed
    return Case(
        path_of(artifact), "llama.cpp", artifact.output, plan.source, config(root, []), Gates(), Workspace(root),
        output=output, details=details,
    )  # fmt: skip


def test_the_size_is_just_under_the_budget() -> None:
    _, (_, sized, _) = fitted()
    assert 0.995 * BUDGET <= path_of(sized).stat().st_size <= BUDGET
    assert sized.bits_per_weight == pytest.approx(8 * BUDGET / 5_244_000, rel=0.1)


def test_the_recipe_lies_beside_the_file_and_is_what_it_has() -> None:
    plan, (_, sized, _) = fitted()
    recipe = read_recipe(sized.folder / f"{path_of(sized).stem}.tensor-types.txt")
    stored = {one.name: one.type for one in read_header(path_of(sized)).tensors if one.type != "f32"}
    assert {name_of(entry): kind for entry, kind in recipe.items()} == stored == sized.details["recipe"]
    assert len(set(stored.values())) > 2
    found = [
        *integrity.judge(case_of(plan, sized), making.QUIET),
        *ledger.judge(case_of(plan, sized), making.QUIET),
    ]
    assert [one for one in found if one.verdict.fails] == []


def test_a_type_that_the_recipe_does_not_give_is_found() -> None:
    plan, (_, sized, _) = fitted()
    given = dict(sized.details["recipe"])  # type: ignore[arg-type]
    given["blk.0.attn_q.weight"] = "q2_k"
    case = case_of(plan, sized, recipe=given)
    for check, metric in ((integrity, "tensor_types"), (ledger, "tensors")):
        (found,) = [one for one in check.judge(case, making.QUIET) if one.metric == metric]
        assert found.verdict is Verdict.REGRESSION
        assert "blk.0.attn_q.weight" in found.detail


def test_a_fitted_file_that_is_given_is_judged_by_the_recipe_beside_it(tmp_path: Path) -> None:
    plan, (_, sized, _) = fitted()
    given = replace(case_of(plan, sized), output=None, details={}, name=path_of(sized).name)
    found = {one.metric: one for one in integrity.judge(given, making.QUIET)}
    assert found["file_type"].verdict is found["tensor_types"].verdict is Verdict.PASS
    alone = tmp_path / path_of(sized).name
    alone.hardlink_to(path_of(sized))
    found = {one.metric: one for one in integrity.judge(replace(given, artifact=alone), making.QUIET)}
    assert found["file_type"].verdict is Verdict.SKIPPED
    assert found["hub_label"].verdict is not Verdict.REGRESSION


def divergences(request: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Worker: the divergence of each of ``files`` types on the text held apart."""
    import numpy as np

    ids = whole_windows(np.load(request["ids"]))
    with (
        live_model(Path(request["base"]), importance(request["imatrix"])) as model,
        yardstick(model, ids, Path(request["folder"]), whole=True) as judged,
    ):
        found: dict[str, Any] = {"unchanged": judged.divergence()}
        for name in request["files"]:
            header = read_header(Path(name))
            types = {
                one.name: one.type
                for one in header.tensors
                if one.name in model.pointers and one.type != "f32"
            }
            model.apply(types)
            own = {one.name: one for one in header.tensors}
            same = [
                bool((model.quantized(one, types[one]) == header.read_data(own[one])).all()) for one in types
            ]
            found[name] = {"divergence": judged.divergence(), "same": all(same), "count": len(same)}
        model.apply({})
        found["restored"] = judged.divergence()
    return found


def test_the_model_in_memory_is_the_file_and_comes_back(tmp_path: Path) -> None:
    """What is measured has the bytes that llama-quantize writes; ours is the better file for its size."""
    _, (stock, sized, close) = fitted()
    work = stock.folder.parent / ".quantool" / "work"
    request = {
        "base": str(work / "base-f16" / "base.gguf"),
        "imatrix": str(stock.folder / stock.shared[0].name),
        "ids": str(work / "imatrix-ids.npy"),
        "folder": str(tmp_path),
        "files": [str(path_of(one)) for one in (stock, sized, close)],
    }
    found = process.call(divergences, request, log=tmp_path / "log", variables=NO_REUSE)
    assert found["unchanged"] == found["restored"] == 0.0
    for one in (stock, sized, close):
        assert found[str(path_of(one))]["same"]
        assert found[str(path_of(one))]["count"] == 30
    assert found[str(path_of(sized))]["divergence"] == pytest.approx(sized.details["measured"])
    assert found[str(path_of(close))]["divergence"] == pytest.approx(close.details["measured"])
    assert found[str(path_of(close))]["divergence"] < float(close.details["bound"]) <= KLD  # type: ignore[arg-type]
    assert float(close.details["bound"]) >= 0.9 * KLD  # type: ignore[arg-type]
    assert sized.bytes() <= stock.bytes()
    assert found[str(path_of(sized))]["divergence"] < 0.9 * found[str(path_of(stock))]["divergence"]


def test_a_search_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    _, (stock, *_) = fitted()
    work = stock.folder.parent / ".quantool" / "work"
    (kept,) = (work / "fit").glob("costs-*.jsonl")
    lines = kept.read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path / "costs.jsonl"
    path.write_text(
        "".join(lines[:-4]) + lines[-4][:30], encoding="utf-8"
    )  # one matrix and a third of another's
    whole = read_costs(kept)
    request = {
        "base": str(work / "base-f16" / "base.gguf"),
        "imatrix": str(stock.folder / stock.shared[0].name),
        "ids": str(work / "imatrix-ids.npy"),
        "folder": str(tmp_path),
        "costs": str(path),
        "tensors": {name: [*cost.error] for name, cost in whole.items()},
    }
    result = process.call(costs.measure, request, log=tmp_path / "log", variables=NO_REUSE)
    assert result["measured"] == 2
    assert read_costs(path) == whole


def test_a_second_run_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, artifacts = fitted()
    monkeypatch.setattr(process, "call", lambda *args, **_: pytest.fail(f"{args[0]} was called"))
    wanted = config(making.room() / "fitted", [{"size": f"{BUDGET}B"}, {"kld": KLD}])
    _, again = making.make(wanted)
    assert [one.files for one in again] == [one.files for one in artifacts]


def test_files_that_are_there_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = fitted()
    monkeypatch.setattr(gguf, "need_disk", lambda *_: pytest.fail("nothing is to be written"))
    wanted = config(making.room() / "fitted", [{"size": f"{BUDGET}B"}, {"kld": KLD}])
    jobs = [
        Job(wanted, plan, output, Workspace(making.room() / "fitted"), depends_of(find_method("gguf")))
        for output in plan.outputs
    ]
    options = gguf.Options.model_validate(plan.outputs[0].options)
    assert gguf.at_once(jobs, options, making.QUIET) == 1


def test_a_recipe_makes_the_same_file_again(tmp_path: Path) -> None:
    _, (_, sized, _) = fitted()
    recipe = sized.folder / f"{path_of(sized).stem}.tensor-types.txt"
    matrix = sized.folder / sized.shared[0].name
    wanted = config(tmp_path, [{"recipe": str(recipe)}], imatrix=str(matrix))
    plan, (again,) = making.make(wanted.model_copy(update={"quant_level": None}))
    assert plan.outputs[0].files[0].bytes == path_of(again).stat().st_size
    assert [one.sha256 for one in again.files] == [one.sha256 for one in sized.files]


@pytest.mark.upstream
def test_llama_quantize_makes_the_same_file_of_the_recipe(tmp_path: Path) -> None:
    _, (_, sized, _) = fitted()
    base = next((sized.folder.parent / ".quantool" / "work").glob("base-*/base.gguf"))
    matrix = sized.folder / sized.shared[0].name
    recipe = sized.folder / f"{path_of(sized).stem}.tensor-types.txt"
    level = sized.level.removesuffix("_FIT")
    options = ("--imatrix", str(matrix), "--tensor-type-file", str(recipe))
    theirs = read_header(making.upstream_quantize(base, tmp_path / "theirs.gguf", level, *options))
    ours = read_header(path_of(sized))
    assert [(one.name, one.type, digest(theirs, one)) for one in theirs.tensors] == [
        (one.name, one.type, digest(ours, one)) for one in ours.tensors
    ]
    differing = {key for key in {*ours.spans} | {*theirs.spans} if ours.value(key) != theirs.value(key)}
    assert differing == {"quantize.imatrix.file"}  # theirs is the path as given


def digest(header: Any, tensor: Any) -> str:
    return hashlib.sha256(header.read_data(tensor).tobytes()).hexdigest()


def plan(fit: list[dict[str, Any]], **options: Any) -> Plan:
    return pipeline.plan(config(making.room() / "never-written", fit, **options), making.QUIET)


def test_the_plan_names_files_by_the_nearest_level_and_says_what_a_search_takes() -> None:
    made = plan(
        [
            {"size": "3.4MB"},
            {"size": "3.41MB"},
            {"bpw": 5.0},
            {"vram": "18MiB", "context": 512},
            {"kld": 0.05},
        ]
    )
    assert [one.level for one in made.outputs[:3]] == ["Q4_K_M", "Q4_K_S_FIT", "Q4_K_S_FITB"]
    assert len({one.level for one in made.outputs}) == 6
    assert 8_000_000 > made.outputs[4].files[0].bytes > 7_000_000
    assert [one.files[0].bytes for one in made.outputs[1:3]] == [3_400_000, 3_410_000]
    assert made.outputs[5].gates.max_mean_kld == 0.05
    assert [one for one in made.warnings if "kld: 0.05: kept by the upper 95% bound" in one]
    (stage,) = [one for one in made.stages if one.name == "fit-costs"]
    assert stage.operations > 0


@pytest.mark.parametrize(
    ("entry", "message", "hint"),
    [
        ({"size": "1MB"}, "none of tiny-chat is smaller than", r"size: [\d.]+KB|size: [\d.]+MB"),
        ({"bpw": 2.0}, "smaller than", "bpw: 2."),
        ({"size": "1GB"}, "larger than", "size:"),
        ({"vram": "1MiB"}, "leaves 0 bytes", "vram:"),
        ({"kld": 0.0001}, "lower than what arithmetic", "kld: 0.001"),
    ],
)
def test_what_no_file_reaches_is_refused_with_the_nearest(
    entry: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        plan([entry])
    assert re.search(hint, refused.value.hint)


def test_the_nearest_that_a_refusal_names_is_planned() -> None:
    for entry in ({"size": "1MB"}, {"bpw": 2.0}, {"vram": "1MiB"}, {"size": "1GB"}):
        with pytest.raises(ConfigError) as refused:
            plan([entry])
        key, _, value = refused.value.hint.rpartition("met: ")[2].partition(": ")
        assert len(plan([{key: float(value) if key == "bpw" else value}]).outputs) == 2


@pytest.mark.parametrize("goal", ["size", "kld", "recipe"])
def test_a_file_that_would_have_to_be_split_is_refused(tmp_path: Path, goal: str) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(write_recipe({"blk.0.ffn_up.weight": "q4_k"}), encoding="utf-8")
    entry = {"size": "3.3MB", "kld": 0.05, "recipe": str(recipe)}[goal]
    with pytest.raises(ConfigError, match=r"more than one file may have \(1,000,000 bytes, max_shard_size\)"):
        plan([{goal: entry}], max_shard_size="1M")


def test_texts_that_a_search_cannot_use_are_refused(tmp_path: Path) -> None:
    same = {
        "keys": {
            "validation": Validation.model_validate(
                {"corpora": [{"name": "own", "path": str(making.CALIBRATION)}]}
            )
        }
    }
    with pytest.raises(ConfigError, match="is the held-out text 'own' as well"):
        plan([{"bpw": 5}], **same)
    with pytest.raises(ConfigError, match="names none"):
        plan([{"bpw": 5}], imatrix=False, keys={"dataset_path": None})
    short = tmp_path / "short.txt"
    short.write_text(making.CALIBRATION.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    with pytest.raises(ConfigError, match="a search needs 4"):
        plan([{"bpw": 5}], keys={"dataset_path": short})


def test_a_model_without_predictions_is_refused() -> None:
    wanted = making.config(
        making.MODELS / "tiny-embedding", making.room() / "never-written", "Q8_0",
        quantization_config={"pre_tokenizer": None, "fit": [{"bpw": 5}]}, **TEXT,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="model for embedding"):
        pipeline.plan(wanted, making.QUIET)


@pytest.mark.parametrize(
    ("types", "message", "hint"),
    [
        ({"blk.0.ffn_up.weight": "q4_x"}, "unknown ggml type 'q4_x'", "q4_"),
        ({"blk.9.ffn_up.weight": "q4_k"}, "matches no tensor", "other layers"),
    ],
)
def test_a_recipe_of_another_model_is_refused(
    tmp_path: Path, types: dict[str, str], message: str, hint: str
) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(write_recipe(types), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as refused:
        plan([{"recipe": str(recipe)}])
    assert hint in refused.value.hint


def test_a_type_that_a_width_forbids_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(write_recipe({"blk.0.ffn_up.weight": "q5_k"}), encoding="utf-8")
    narrow = dry_run.ConvertedTensor((64, 96), "f16", 2 * 64 * 96, 0)
    rehearsal = dry_run.Rehearsal(tmp_path, (0,), {}, {"blk.0.ffn_up.weight": narrow}, {})
    with pytest.raises(
        ConfigError, match=r"cannot be q5_k: its rows of 96 weights are no multiple of 256"
    ) as refused:
        recipe_types(FitTarget(recipe=recipe), rehearsal)
    assert refused.value.hint.endswith("q5_0")


def test_the_record_says_how_types_were_found() -> None:
    _, (_, sized, _) = fitted()
    assert sized.details["fit"] == f"size: {BUDGET}B"
    rounds: Any = sized.details["rounds"]
    assert sized.details["measured"] == min(one["measured"] for one in rounds)
    assert all(one["bytes"] < BUDGET for one in rounds)
