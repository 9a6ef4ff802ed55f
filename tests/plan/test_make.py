import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import making
import pytest

from quantool import pipeline
from quantool.config.load import load
from quantool.config.schema import Config, Quantization
from quantool.errors import ConfigError, DependencyError
from quantool.plan import collisions, disk, make
from quantool.plugins import find
from quantool.plugins.contract import Outline
from quantool.plugins.find import find_method
from quantool.records import Gates, MachineState, Plan, PlannedFile, StagePlan
from quantool.runtime import arithmetic, versions
from quantool.runtime import machine as here
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace
from tests.checkpoint import write_checkpoint

QUIET = Progress(quiet=True)
Usage = namedtuple("Usage", "total used free")  # noqa: PYI024

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def planned(model: Path, **keys: Any) -> Plan:
    return planned_here(model, **keys)[0]


def planned_here(model: Path, **keys: Any) -> tuple[Plan, MachineState]:
    wanted = {
        "method": "fake",
        "quant_level": ["Q8_0", "Q4_K_M"],
        "output_path": model.parent / "out",
        **keys,
    }
    wanted["validation"] = {"checks": ["fakecheck"]} | wanted.get("validation", {})
    if "quantizations" in wanted:
        del wanted["method"], wanted["quant_level"]
    return pipeline.plan_here(Config.model_validate({"model_id": str(model), **wanted}), QUIET)


def entry(level: str, **keys: Any) -> dict[str, Any]:
    return {"method": "fake", "quant_level": level, **keys}


def test_a_plan_writes_nothing(model: Path) -> None:
    planned(model)
    assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


def test_every_level_is_an_output(model: Path) -> None:
    made = planned(model, quantization_config={"bytes": 100}, seed=7)
    assert [(o.id, o.repo, o.files[0].name) for o in made.outputs] == [
        ("fake/Q8_0", "model-FAKE", "model-Q8_0.gguf"),
        ("fake/Q4_K_M", "model-FAKE", "model-Q4_K_M.gguf"),
    ]
    assert made.outputs[0].options == {
        "divergence": 0.0001, "only": None, "stem": "model", "bytes": 100, "file": None, "ending": "",
    }  # fmt: skip
    assert made.seed == 7
    assert made.config["quantization_config"] == {"bytes": 100}


def test_stages_and_the_disk_that_they_need(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(10**12, 0, 12345))
    made, machine = planned_here(model, quantization_config={"bytes": 100})
    assert [(stage.name, stage.writes) for stage in made.stages] == [
        ("download", 0), ("scan", 0), ("fake/Q8_0", 100), ("fake/Q4_K_M", 100), ("judge", 0),
    ]  # fmt: skip
    assert set(machine.seconds) == {stage.name for stage in made.stages}
    known = machine.model_copy(update={"seconds": {}, "ram": 0, "engines": {}})
    assert known == MachineState(free_disk=12345, peak_disk=200, done=("download",))


def test_what_judging_writes_is_counted_until_it_is_there(tmp_path: Path) -> None:
    """T13: the hidden states of the reference, one row of 2 bytes a number for each of 7 of 16 positions."""
    settings = {
        "corpora": [{"name": "a", "dataset": "python-docs"}, {"name": "b", "dataset": "python-docs"}],
        "context": 16, "max_tokens": 165, "checks": ["perplexity"],
    }  # fmt: skip
    model = shutil.copytree(making.TINY, tmp_path / "model")
    made, machine = planned_here(model, validation=settings)
    width = made.source.facts.hidden * (4 if made.source.facts.dtype == "F32" else 2)
    assert made.stages[-1].name == "judge"
    assert made.stages[-1].writes == 2 * 10 * 7 * width
    assert machine.peak_disk == made.stages[-1].writes + 2 * 64
    kept = model.parent / "out" / ".quantool" / "work" / "reference"
    kept.mkdir(parents=True)
    (kept / "a.hidden.npy").write_bytes(bytes(10 * 7 * width))
    assert planned_here(model, validation=settings)[1].peak_disk == 10 * 7 * width + 2 * 64


@pytest.mark.parametrize(
    ("bounded", "done", "needed"), [(False, 0, 1630), (True, 0, 1330), (True, 1, 1330), (True, 2, 1010)]
)
def test_levels_that_are_deleted_one_by_one_need_the_largest_alone(
    model: Path, bounded: bool, done: int, needed: int
) -> None:
    """A base of 1000 bytes stays, and so do small files."""
    first = planned(model).outputs[0]
    sizes = ({"a.gguf": 300}, {"config.json": 20, "model.safetensors": 300}, {"config.json": 10})
    outputs = [
        first.model_copy(
            update={
                "id": f"x/{number}",
                "files": tuple(PlannedFile(name=name, bytes=size) for name, size in files.items()),
                "done": number < done,
            }
        )
        for number, files in enumerate(sizes)
    ]
    stages = [StagePlan(name="base", writes=1000, peak_ram=1, done=False)]
    stages += [
        StagePlan(name=o.id, writes=sum(f.bytes for f in o.files), peak_ram=1, done=o.done) for o in outputs
    ]
    assert disk.peak_disk(stages, outputs, bounded=bounded) == needed


def test_what_is_done_needs_no_more_disk(model: Path) -> None:
    source = planned(model).source
    stages = [
        StagePlan(name=name, writes=100, peak_ram=1, done=done) for name, done in (("a", True), ("b", False))
    ]
    outline = Outline((), tuple(stages))
    found = disk.stages(source, [outline, outline], (), downloads=5)
    assert [stage.name for stage in found] == ["download", "scan", "a", "b", "judge"]
    assert [stage.done for stage in found] == [False, False, True, False, False]


def test_judging_needs_two_layers_where_a_model_does_not_fit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = planned(model).source
    files = tuple(
        file.model_copy(update={"bytes": 2_000_000}) if file.name.endswith(".safetensors") else file
        for file in small.files
    )
    facts = small.facts.model_copy(
        update={
            "parameters": 1_000_000,
            "vocabulary": 1000,
            "hidden": 50,
            "layers": 10,
            "tied_embeddings": False,
        }
    )
    source = small.model_copy(update={"files": files, "facts": facts})
    weights = sum(file.bytes for file in files if file.name.endswith(".safetensors"))
    per_parameter = weights // 1_000_000
    assert disk.two_layers(source) == (100_000 + 2 * 90_000) * per_parameter
    beside = disk.LIBRARIES + 4 * 1000 * disk.LOGITS_ROWS

    def peaks() -> list[int]:
        made = [disk.stages(source, (), (), 0, holds_model=whole)[-1].peak_ram for whole in (True, False)]
        return [peak - beside for peak in made]

    monkeypatch.setattr(arithmetic, "native", lambda: ("bfloat16",))
    monkeypatch.setattr(here, "total_ram", lambda: 10 * weights)
    assert peaks() == [weights, weights]  # it fits, so it is judged whole
    monkeypatch.setattr(here, "total_ram", lambda: weights)
    assert peaks() == [weights, disk.two_layers(source)]
    monkeypatch.setattr(arithmetic, "native", lambda: ())
    assert peaks() == [2 * weights, 2 * disk.two_layers(source)]  # computed in float32


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({"checks": ["perplexity", "tokenizer", "overlap"]}, False),
        ({"checks": ["perplexity", "behaviour"]}, True),
        ({"checks": ["needle", "lm_eval"]}, False),
        ({"checks": ["needle"], "needle": {}}, True),
    ],
)
def test_a_check_that_holds_the_model_says_so(model: Path, settings: dict[str, Any], holds: bool) -> None:
    wanted = {"model_id": str(model), "method": "fake", "quant_level": ["Q8_0"], "validation": settings}
    assert bool(disk.holding(Config.model_validate(wanted), planned(model).source)) == holds


def test_free_disk_is_that_of_the_nearest_folder_there_is(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(2, 1, 1)

    monkeypatch.setattr("shutil.disk_usage", usage)
    planned(model, output_path=model.parent / "deep" / "deeper")
    assert asked == [model.parent]


@pytest.mark.parametrize(("needed", "free", "fits"), [(10, 10, True), (11, 10, False)])
def test_a_disk_that_is_too_small_is_refused(model: Path, needed: int, free: int, fits: bool) -> None:
    made = MachineState(peak_disk=needed * 10**6, free_disk=free * 10**6)
    if fits:
        disk.check_disk(made, model)
        return
    with pytest.raises(
        DependencyError, match=f"the run writes 11.0 MB, 10.0 MB are free in {model}"
    ) as caught:
        disk.check_disk(made, model)
    assert "output_path" in caught.value.hint


def test_memory_that_is_too_small_is_refused_with_the_setting(model: Path) -> None:
    made = planned(model)
    steps = [
        stage.model_copy(update={"peak_ram": 10**9 * (3 if stage.name == "judge" else 1)})
        for stage in made.stages
    ]
    made = made.model_copy(update={"stages": tuple(steps)})
    wanted = {"model_id": str(model), "method": "fake", "quant_level": ["Q8_0"]}
    checks = {"validation": {"checks": ["perplexity", "behaviour"]}}
    config = Config.model_validate(wanted | checks)
    small = MachineState(peak_disk=0, free_disk=0, ram=2 * 10**9)
    with pytest.raises(
        DependencyError, match=r"judge needs 3\.0 GB of memory, this machine has 2\.0 GB"
    ) as caught:
        disk.check_ram(made, small, config)
    assert "leave behaviour out of validation.checks" in caught.value.hint
    disk.check_ram(made, small.model_copy(update={"done": ("judge",)}), config)
    disk.check_ram(made, small.model_copy(update={"ram": 3 * 10**9}), config)


def test_calibration_that_is_too_large_names_its_settings(model: Path) -> None:
    made = planned(model)
    output = made.outputs[0].model_copy(update={"engine": "transformers", "operations": 1e15})
    steps = [
        stage.model_copy(update={"peak_ram": 9 * 10**9 if stage.name == output.id else 1})
        for stage in made.stages
    ]
    made = made.model_copy(update={"stages": tuple(steps), "outputs": (output, made.outputs[1])})
    config = Config.model_validate({"model_id": str(model), "method": "fake", "quant_level": ["Q8_0"]})
    with pytest.raises(DependencyError, match=r"fake/Q8_0 needs 9\.0 GB") as caught:
        disk.check_ram(made, MachineState(peak_disk=0, free_disk=0, ram=10**9), config)
    assert "sample_size" in caught.value.hint


def test_outputs_that_would_overwrite_each_other_are_refused(model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"fake/Q8_0 and fake/Q4_K_M would both write model-FAKE/x\.gguf"
    ) as caught:
        planned(model, quantization_config={"file": "x.gguf"})
    assert "repo_id" in caught.value.hint


@pytest.mark.parametrize(
    "keys",
    [
        {"output_path": "model"},
        {"output_path": "link"},
        {"output_path": ".", "repo_id": "org/model"},
        {"output_path": "..", "repo_id": "org/PARENT"},
    ],
)
def test_a_run_never_writes_into_the_checkpoint(model: Path, keys: dict[str, str]) -> None:
    parent = model.parent
    (parent / "link").symlink_to(model)
    wanted = {**keys, "output_path": parent / keys["output_path"]}
    if "repo_id" in keys:
        wanted["repo_id"] = keys["repo_id"].replace("PARENT", parent.name)
    with pytest.raises(ConfigError, match="is where the checkpoint is read from"):
        planned(model, **wanted)


@pytest.mark.parametrize("name", ["logs", "records", "plots", "plan.json", "report.json"])
def test_nor_over_its_own_records(model: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} cannot be the name of a repository"):
        planned(model, repo_id=f"org/{name}")


def test_nor_into_where_links_of_the_checkpoint_lead(model: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in model.iterdir():
        (linked / file.name).symlink_to(file)
    with pytest.raises(ConfigError, match="is where the checkpoint is read from"):
        planned(linked, output_path=model)


def test_the_checkpoint_may_lie_in_the_output_folder(model: Path) -> None:
    assert planned(model, output_path=model.parent).outputs


@pytest.mark.parametrize(
    "keys",
    [
        {"dataset_path": "TEXT"},
        {"eval_dataset": "TEXT"},
        {"validation": {"corpora": [{"name": "x", "path": "TEXT"}]}},
        {"validation": {"conversations": "TEXT"}},
    ],
)
def test_texts_that_are_not_there_are_found_before_anything_is_made(
    model: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    missing = tmp_path / "nowhere.jsonl"
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.jsonl"):
        planned(model, **json.loads(json.dumps(keys).replace("TEXT", str(missing))))
    assert not (model.parent / "out").exists()


def test_text_that_cannot_be_read_is_found_before_anything_is_made(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "good"}\n{"text": bad}\n')
    with pytest.raises(ConfigError, match=r"text.jsonl, line 2 is not JSON"):
        planned(model, validation={"corpora": [{"name": "x", "path": str(text)}]})


def test_windows_longer_than_the_model_reads_are_found_before_anything_is_made(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation\.context is 99999, but model reads no more than"):
        planned(model, validation={"context": 99999, "max_tokens": 99999})


def test_the_same_name_in_two_repositories_is_no_collision(model: Path) -> None:
    first, second = planned(model).outputs
    collisions.refuse_collisions([first, second.model_copy(update={"repo": "other", "files": first.files})])
    with pytest.raises(ConfigError, match="both write"):
        collisions.refuse_collisions([first, second.model_copy(update={"files": first.files})])


def test_gates_are_those_of_the_level_under_those_of_the_configuration(model: Path) -> None:
    made = planned(model, validation={"gates": {"Q8_0": {"max_mean_kld": 1.5}}})
    first, second = (output.gates for output in made.outputs)
    assert first.max_mean_kld == 1.5
    assert first.min_same_top_p == 0.97
    assert second.max_mean_kld == 0.055


def test_small_models_get_a_word_about_the_gates(model: Path) -> None:
    told = planned(model).warnings
    assert told[0] == "this is a fake"
    assert "the default gates hold for models of 1.0 B parameters and more; this one has 584" in told[1]
    assert planned(model, validation={"gates": {"*": {"max_mean_kld": 1.5}}}).warnings == ("this is a fake",)


def test_each_warning_stands_once(model: Path) -> None:
    made = planned(model, quantizations=[entry("Q8_0"), entry("Q4_K_M")])
    assert made.warnings.count("this is a fake") == 1


def test_repositories(model: Path) -> None:
    made = planned(model, repo_id="o/all", quantizations=[entry("Q8_0", repo_id="o/own"), entry("Q4_K_M")])
    assert [output.repo_id for output in made.outputs] == ["o/own", "o/all"]


def test_nulls_stand_for_defaults_of_options() -> None:
    method = find_method("fake")
    options = make.options_of(
        Quantization(method="fake", quantization_config={"bytes": None, "stem": "x"}), method
    )
    assert (options.model_dump()["bytes"], options.model_dump()["stem"]) == (64, "x")


def test_versions_of_what_takes_part() -> None:
    from importlib.metadata import version

    found = versions.versions()
    assert found["transformers"] == version("transformers")
    assert next(iter(found)) == "quantool"
    assert "llama.cpp" in found


def test_versions_without_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_PATH", raising=False)
    assert versions.versions()["llama.cpp"] == "not installed"


def test_a_plan_survives_json(model: Path) -> None:
    made = planned(model, validation={"gates": {"*": {"max_mean_kld": None}}})
    again = Plan.model_validate_json(made.model_dump_json())
    assert again == made
    assert again.outputs[0].gates == Gates(max_ln_ppl_ratio=0.002, max_mean_kld=None, min_same_top_p=0.97)


def test_the_configuration_in_a_plan_is_what_was_written(
    model: Path, config_file: Callable[..., Path]
) -> None:
    path = config_file(bytes=5)
    config = load(path, ["seed=9"], find).config
    made = make.make_plan(config, planned(model).source, Workspace(config.output_path))
    assert made.config == json.loads(path.read_text()) | {"seed": 9}


def test_two_repositories_do_not_share_a_folder(model: Path) -> None:
    found = planned(model).outputs
    owners = zip(found, ("one/x", "two/x"), strict=True)
    first, second = (one.model_copy(update={"repo": "x", "repo_id": owner}) for one, owner in owners)
    with pytest.raises(ConfigError, match="one/x and two/x would share the folder x"):
        collisions.refuse_collisions([first, second])


def test_a_checkpoint_has_its_folder_for_itself(model: Path) -> None:
    """T2: GGUF and FP8 under one repo_id; two checkpoints whose shards are named differently."""
    first = planned(model).outputs[0]
    names = (("x-Q8_0.gguf",), ("model.safetensors",), ("model-00001-of-00001.safetensors",))
    engines = ("llama.cpp", "transformers", "transformers")
    gguf, one, two = (
        first.model_copy(
            update={
                "id": f"x/{number}",
                "engine": engine,
                "files": tuple(PlannedFile(name=name, bytes=1) for name in files),
            }
        )
        for number, (files, engine) in enumerate(zip(names, engines, strict=True))
    )
    for outputs, ids in (((gguf, one), ("x/1", "x/0")), ((one, two), ("x/1", "x/2"))):
        with pytest.raises(ConfigError, match=f"{ids[0]} is a checkpoint that needs the folder .* {ids[1]}"):
            collisions.refuse_collisions(outputs)
    collisions.refuse_collisions((gguf, one.model_copy(update={"repo": "other"})))


def test_languages_that_no_text_covers_are_named(model: Path) -> None:
    (model / "README.md").write_text("---\nlanguage: [en, ca, eu]\n---\n")
    assert any(
        "the model's card names ca and eu" in note or "ca, eu" in note for note in planned(model).warnings
    )
    (model / "text.txt").write_text("Bon dia a tothom.\n" * 40)
    own = {"corpora": [{"name": "ca", "path": str(model / "text.txt")}]}
    assert not any("held-out text" in note for note in planned(model, validation=own).warnings)
