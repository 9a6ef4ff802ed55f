import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import quantool as package
from quantool.records import MachineState, Plan, Report
from tests.conftest import Ended, dies, wait_for

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "transformers",
    "llama_cpp",
    "datasets",
    "pydantic",
    "huggingface_hub",
    "numpy",
    "yaml",
    "rich",
}
SECRET = "hf_secretsecretsecret"  # noqa: S105

Write = Callable[..., Path]
Command = Callable[..., Ended]
Begin = Callable[..., subprocess.Popen[str]]


# --- the result goes to standard output, everything else to standard error


def test_a_run_prints_the_table_alone(quantool: Command, config_file: Write, tmp_path: Path) -> None:
    ended = quantool("run", config_file())
    assert ended.code == 0
    heads, *rows = ended.out.splitlines()
    assert heads.split()[:3] == ["file", "size", "bpw"]
    assert [row.split()[0] for row in rows] == ["model-Q8_0.gguf", "model-Q4_K_M.gguf"]
    assert "warning: this is a fake" in ended.err
    lines = ended.err.splitlines()
    assert [line.partition(" (")[0] for line in lines if line.startswith("[")] == [
        "[4/9] make fake/Q8_0", "[5/9] make fake/Q4_K_M", "[6/9] compare with the reference", "[7/9] judge fake/Q8_0",
        "[8/9] judge fake/Q4_K_M", "[9/9] pack",
    ]  # fmt: skip
    assert lines[:3] == [f"read {tmp_path / 'model'}", "work out files, sizes and memory", "scan weights"]
    assert all(" so far, about " in line for line in lines if line.startswith("["))
    assert f"folder: {tmp_path / 'out' / 'model-FAKE'}" in ended.err


def test_a_configuration_alone_is_run(quantool: Command, config_file: Write) -> None:
    path = config_file()
    long = quantool("run", path)
    assert quantool(path).out == long.out
    assert quantool("--quiet", path, "--set", "seed=3").out == long.out
    assert quantool("--set", "seed=3", path).out == long.out


def test_a_run_as_json(quantool: Command, config_file: Write) -> None:
    ended = quantool("run", config_file(), "--json")
    made = json.loads(ended.out)
    assert Plan.model_validate(made["plan"]).outputs[0].id == "fake/Q8_0"
    assert [report.pop("verdict") for report in made["reports"]] == ["PASS", "PASS"]
    assert Report.model_validate(made["reports"][0]).artifact.level == "Q8_0"


def test_quiet_leaves_warnings_and_the_result(quantool: Command, config_file: Write) -> None:
    loud = quantool("run", config_file())
    quiet = quantool("run", config_file(), "--quiet")
    assert quiet.out == loud.out
    assert [line for line in quiet.err.splitlines() if not line.startswith("warning: ")] == []


def test_a_plan(quantool: Command, config_file: Write, tmp_path: Path) -> None:
    ended = quantool("plan", config_file(bytes=123456), "--json")
    record = json.loads(ended.out)
    machine = MachineState.model_validate(record.pop("machine"))
    assert (ended.code, machine.peak_disk, machine.done) == (0, 2 * 123456, ("download",))
    made = Plan.model_validate(record)
    assert not {"free_disk", "done"} & (
        record.keys() | record["outputs"][0].keys() | record["stages"][0].keys()
    )
    assert made.outputs[0].files[0].bytes == 123456
    text = quantool("plan", config_file(bytes=123456)).out
    assert "model-FAKE/model-Q8_0.gguf" in text
    assert "123,456" in text
    assert not (tmp_path / "out").exists()


def test_overrides(quantool: Command, config_file: Write) -> None:
    words = ("--set", "seed=9", "--set", "quantization_config.stem=other", "--set", "quant_level=q8_0")
    record = json.loads(quantool("plan", config_file(), "--json", *words).out)
    made = Plan.model_validate({name: value for name, value in record.items() if name != "machine"})
    assert made.seed == 9
    assert [file.name for output in made.outputs for file in output.files] == ["other-Q8_0.gguf"]


def test_the_summary_of_a_github_job(
    quantool: Command, config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    quantool("run", config_file(only="Q8_0", divergence=0.5))
    text = (tmp_path / "summary.md").read_text()
    assert "| model-Q4_K_M.gguf |" in text
    assert "- Q8_0: REGRESSION in fakecheck: mean_kld 0.5 on text, limit 0.004" in text


def test_a_step_summary_that_cannot_be_written_does_not_keep_the_result(
    quantool: Command, config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "nowhere" / "summary.md"))
    ended = quantool("run", config_file())
    assert ended.code == 0
    assert "model-Q4_K_M.gguf" in ended.out
    assert "warning: the table is not in $GITHUB_STEP_SUMMARY: No such file or directory" in ended.err


def test_a_plan_fits_the_terminal(
    quantool: Command, config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(stem="a-name-that-is-longer-than-a-terminal-has-room-for")
    whole = quantool("plan", path).out
    monkeypatch.setenv("COLUMNS", "80")
    narrow = quantool("plan", path).out
    assert "…" in narrow
    assert "…" not in whole
    lengths = [
        max(len(line) for line in text[text.index("output ") :].splitlines()) for text in (narrow, whole)
    ]
    assert lengths[0] <= 80 < lengths[1]


def test_a_plan_says_what_it_does(quantool: Command, config_file: Write, tmp_path: Path) -> None:
    ended = quantool("plan", config_file())
    assert ended.err.splitlines()[:2] == [
        f"read the headers of {tmp_path / 'model'}", "work out files, sizes and memory",
    ]  # fmt: skip
    assert all(
        line.startswith("warning: ") for line in quantool("plan", config_file(), "--quiet").err.splitlines()
    )


def test_a_warning_of_the_plan_is_shown_once_for_an_output_folder(
    quantool: Command, config_file: Write, tmp_path: Path
) -> None:
    path = config_file()
    assert "warning: this is a fake" in quantool("run", path).err
    assert "this is a fake" not in quantool("run", path).err
    assert (
        "warning: this is a fake" in quantool("run", path, "--set", f"output_path={tmp_path / 'other'}").err
    )
    (tmp_path / "out" / "plan.json").write_text('{"warnings": 3}')
    assert "warning: this is a fake" in quantool("run", path).err


def test_the_table_fits_columns(
    quantool: Command, config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file()
    assert "SHA-256" in quantool("run", path).out
    for width in (160, 120, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        out = quantool("run", path).out
        assert max(map(len, out.splitlines())) <= width
    assert "SHA-256" not in out


def test_one_method(quantool: Command, plugin: Path) -> None:
    ended = quantool("methods", "fake")
    assert ended.out.splitlines()[:4] == ["fake", "  Q8_0    eight bits", "  Q4_K_M  four bits", "options"]
    assert "  divergence  What the check will measure." in ended.out
    assert list(json.loads(quantool("methods", "fake", "--json").out)) == ["fake"]
    wrong = quantool("methods", "fakee")
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean fake?" in wrong.err


def test_methods(quantool: Command, plugin: Path) -> None:
    text = quantool("methods").out
    assert (
        "fake\n  Q8_0    eight bits\n  Q4_K_M  four bits\n  options: divergence, only, stem, bytes, file"
        in text
    )
    assert "wrong: <function levels" in text
    listed = json.loads(quantool("methods", "--json").out)
    assert listed["fake"]["levels"] == {"Q8_0": "eight bits", "Q4_K_M": "four bits"}
    assert listed["fake"]["options"]["stem"] == "Start of the file names."
    assert "Q4_K_M" in listed["gguf"]["levels"]
    assert "missing" in listed["wrong"]


def test_version(quantool: Command) -> None:
    assert quantool("--version") == Ended(0, f"{package.__version__}\n", "")


def test_doctor(quantool: Command) -> None:
    found = json.loads(quantool("doctor", "--json").out)
    lines = quantool("doctor").out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(found)


# --- the schema


def accepts(schema: dict[str, Any], value: Any, whole: dict[str, Any]) -> bool:
    """As much of JSON schema as ours uses."""
    if "$ref" in schema:
        return accepts(whole["$defs"][schema["$ref"].rpartition("/")[2]], value, whole)
    if "anyOf" in schema:
        return any(accepts(entry, value, whole) for entry in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds: dict[str, tuple[type, ...]] = {
        "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
        "integer": (int,), "number": (int, float),
    }  # fmt: skip
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        if not set(schema.get("required", ())) <= set(value):
            return False
        places = [(known.get(key, more), item) for key, item in value.items()]
        return all(
            accepts(place, item, whole) if isinstance(place, dict) else place for place, item in places
        )
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), item, whole) for item in value)
    return True


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_the_schema_accepts_what_is_right_and_nothing_else(quantool: Command, name: str) -> None:
    import yaml

    schema = json.loads(quantool("schema").out)
    config = yaml.safe_load((ROOT / "configs" / name).read_text())
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert accepts(schema, config, schema)
    assert not accepts(schema, {**config, "modle_id": "x"}, schema)
    assert not accepts(schema, {**config, "seed": "x"}, schema)
    assert not accepts(schema, {**config, "validation": {"contxt": 512}}, schema)
    assert not accepts(schema, {key: value for key, value in config.items() if key != "model_id"}, schema)


def test_every_key_of_the_schema_is_described(quantool: Command) -> None:
    schema = json.loads(quantool("schema").out)
    sections = [schema, *schema["$defs"].values()]
    entries = [entry for section in sections for entry in section.get("properties", {}).items()]
    resolved = {
        key: schema["$defs"][entry["$ref"].rpartition("/")[2]] if "$ref" in entry else entry
        for key, entry in entries
    }
    assert len(resolved) > 40
    assert [key for key, entry in resolved.items() if not entry.get("description")] == []


# --- every way to end


def test_2_a_configuration_that_is_wrong(quantool: Command, config_file: Write) -> None:
    path = config_file()
    path.write_text(path.read_text().replace('"seed"', '"sead"').replace("Q4_K_M", "Q4_K_X"))
    ended = quantool("run", path, "--set", "methdo=fake")
    assert (ended.code, ended.out) == (2, "")
    assert 'unknown key (value "fake"); did you mean method?' in ended.err
    assert "--set methdo: " in ended.err
    assert f"error: {path}:1:" in ended.err
    assert "did you mean Q4_K_M?" in ended.err
    assert "hint: `quantool schema`" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("words", [["run", "nowhere.yaml"], ["nowhere.yaml"], ["plan", "nowhere.yaml"]])
def test_2_a_configuration_that_is_not_there(quantool: Command, words: list[str]) -> None:
    ended = quantool(*words)
    assert (ended.code, ended.out) == (2, "")
    assert "nowhere.yaml" in ended.err


def test_2_a_command_that_is_misspelled(quantool: Command) -> None:
    ended = quantool("methds")
    assert (ended.code, ended.out) == (2, "")
    assert "did you mean methods?" in ended.err


def test_2_a_checkpoint_that_is_not_there(quantool: Command, config_file: Write) -> None:
    ended = quantool("run", config_file(), "--set", "model_id=./nowhere")
    assert (ended.code, ended.out) == (2, "")
    assert "error: ./nowhere does not exist" in ended.err


@pytest.mark.parametrize("words", [["run"], ["run", "x.yaml", "--nonsense"], ["validate", "x.gguf"]])
def test_2_words_that_make_no_command(quantool: Command, words: list[str]) -> None:
    ended = quantool(*words)
    assert (ended.code, ended.out) == (2, "")


def test_3_a_folder_in_use(quantool: Command, config_file: Write, begin: Begin, tmp_path: Path) -> None:
    path = config_file(ending="wait")
    other = begin("run", path)
    wait_for(tmp_path / "out" / "pid.txt")
    ended = quantool("run", path)
    assert (ended.code, ended.out) == (3, "")
    assert f"is in use by another quantool run (process {other.pid})" in ended.err


def test_3_an_output_that_cannot_be_written(quantool: Command, config_file: Write, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    ended = quantool("run", config_file())
    assert (ended.code, ended.out) == (3, "")
    assert f"error: cannot write to {tmp_path / 'out'}" in ended.err


def test_4_a_method_that_fails(quantool: Command, config_file: Write, tmp_path: Path) -> None:
    ended = quantool("run", config_file(ending="bug"))
    assert (ended.code, ended.out) == (4, "")
    assert "error: quantool_fake:bug ended with exit code 1 without a result" in ended.err
    assert f"hint: last lines of {tmp_path / 'out' / 'logs' / 'fake.log'}:" in ended.err
    assert "  ValueError: seven is not eight" in ended.err


def test_5_a_gate_that_is_not_met(quantool: Command, config_file: Write, tmp_path: Path) -> None:
    ended = quantool("run", config_file(only="Q8_0", divergence=0.5))
    assert ended.code == 5
    assert [line.split()[-2] for line in ended.out.splitlines()[1:]] == ["REGRESSION", "PASS"]
    assert "Q8_0: REGRESSION in fakecheck: mean_kld 0.5 on text, limit 0.004\n" in ended.err
    assert "error: 1 of 2 artifacts did not pass" in ended.err
    record = json.loads((tmp_path / "out" / "records" / "fake-Q8_0.report.json").read_text())
    assert record["findings"][0]["measured"] == 0.5
    again = quantool("run", config_file(only="Q8_0", divergence=0.5), "--json")
    assert again.code == 5
    assert [report["verdict"] for report in json.loads(again.out)["reports"]] == ["REGRESSION", "PASS"]


def test_6_is_left_to_the_hub(quantool: Command, config_file: Write) -> None:
    ended = quantool("run", config_file(ending="refuse"))
    assert (ended.code, ended.out) == (6, "")
    assert "error: the Hub is closed\nhint: come back tomorrow\n" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_130_an_interruption(
    config_file: Write, begin: Begin, tmp_path: Path, number: signal.Signals, quantool: Command
) -> None:
    run = begin("run", config_file(ending="wait"))
    worker = int(wait_for(tmp_path / "out" / "pid.txt"))
    run.send_signal(number)
    started = time.monotonic()
    out, err = run.communicate(timeout=10)
    assert time.monotonic() - started < 1
    assert (run.returncode, out) == (130, "")
    assert "interrupted; finished stages are kept" in err
    assert "Traceback" not in err
    assert dies(worker)
    assert [path.name for path in (tmp_path / "out").rglob("*.part")] == []
    assert quantool("run", config_file()).code == 0, "the same command goes on"


def test_a_killed_run_leaves_no_worker_and_no_half_file(
    config_file: Write, begin: Begin, tmp_path: Path, quantool: Command
) -> None:
    run = begin("run", config_file(ending="wait"))
    worker = int(wait_for(tmp_path / "out" / "pid.txt"))
    run.kill()
    assert dies(worker)
    left = {path.name for path in (tmp_path / "out" / "model-FAKE").iterdir()}
    assert left == {".model-Q8_0.gguf.part"}
    assert quantool("run", config_file()).code == 0
    assert not (tmp_path / "out" / "model-FAKE" / ".model-Q8_0.gguf.part").exists()


# --- judging what exists


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """``pipeline.validate`` answers with a report that passes; what it was asked is remembered."""
    asked: list[Any] = []

    def validate(artifacts: Any, engine: str, config: Any, limits: Any, *_: Any) -> tuple[Report, ...]:
        reports = []
        for artifact, gates in zip(artifacts, limits, strict=True):
            asked.append((artifact, engine, config, gates))
            made = {"check": "c", "metric": "m", "verdict": "PASS"}
            told = {"artifact": artifact, "reference": "r", "findings": [made], "seconds": 0}
            reports.append(Report.model_validate(told))
        return tuple(reports)

    monkeypatch.setattr("quantool.pipeline.validate", validate)
    headers = "quantool.given_artifacts.read_shards"
    monkeypatch.setattr(headers, lambda path: [SimpleNamespace(path=path, tensors=())])
    monkeypatch.setattr("quantool.given_artifacts._bits_per_weight", lambda *_: 8.0)
    (tmp_path / "a-Q8_0.gguf").write_text("0.5")
    return asked


def test_validate_hands_on_what_it_is_given(
    quantool: Command, theirs: list[Any], config_file: Write, tmp_path: Path
) -> None:
    words = (
        "--config",
        config_file(),
        "--set",
        "validation.gates.Q8_0.max_mean_kld=0.5",
        "--output",
        tmp_path / "v",
    )
    ended = quantool("validate", tmp_path / "a-Q8_0.gguf", "--reference", "org/model", "--json", *words)
    assert (ended.code, json.loads(ended.out)["verdict"]) == (0, "PASS")
    ((artifact, engine, config, gates),) = theirs
    assert (artifact.level, engine, gates.max_mean_kld) == ("Q8_0", "llama.cpp", 0.5)
    assert (config.model_id, config.output_path) == ("org/model", tmp_path / "v")
    assert config.validation.checks == ("fakecheck",)


def test_validate_without_a_configuration(quantool: Command, theirs: list[Any], tmp_path: Path) -> None:
    ended = quantool("validate", tmp_path / "a-Q8_0.gguf", "--reference", "org/model", "--level", "Q4_0")
    assert ended.code == 0
    ((artifact, _, config, gates),) = theirs
    assert artifact.level == "Q4_0"
    assert gates.max_mean_kld == 0.123
    assert config.output_path == Path("validation-output")


def test_validate_takes_all_files_of_a_folder_with_the_gates_of_each(
    quantool: Command, theirs: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "a-Q4_K_M.gguf").write_text("0.5")
    (tmp_path / "a-imatrix.gguf").write_text("0.5")
    ended = quantool("validate", tmp_path, "--reference", "org/model", "--json")
    assert [report["artifact"]["level"] for report in json.loads(ended.out)] == ["Q4_K_M", "Q8_0"]
    assert [(artifact.level, gates.max_mean_kld) for artifact, _, _, gates in theirs] == [
        ("Q4_K_M", 0.055),
        ("Q8_0", 0.004),
    ]
    ended = quantool("validate", tmp_path, "--reference", "org/model", "--level", "Q8_0")
    assert ended.code == 2
    assert "--level Q8_0 is one level, but" in ended.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.gguf", "--reference", "m"], "nothing.gguf does not exist"),
        (["a-Q8_0.gguf", "--reference", "m", "--set", "seed=1"], "add --config FILE"),
        (["a-Q8_0.gguf", "--reference", "m", "--level", "Q8_1"], "no default gates for level 'Q8_1'"),
        (["a-Q8_0.gguf", "--reference", "m", "--config", "nothing.yaml"], "nothing.yaml"),
        (["a-Q8_0.gguf"], "--reference"),
        (["--reference", "m"], "ARTIFACT"),
    ],
)
def test_arguments_of_validate_that_are_wrong(
    quantool: Command, theirs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    ended = quantool("validate", *words)
    assert (ended.code, ended.out, theirs) == (2, "", [])
    assert said in ended.err.replace("'artifact'", "ARTIFACT")


def test_validate_end_to_end(quantool: Command, config_file: Write, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    config = config_file()
    writer = GGUFWriter(tmp_path / "a-Q8_0.gguf", "llama")
    import numpy as np

    writer.add_tensor("a", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ended = quantool(
        "validate", tmp_path / "a-Q8_0.gguf", "--reference", tmp_path / "model", "--config", config,
        "--output", tmp_path / "v",
    )  # fmt: skip
    assert ended.code == 5
    assert ended.out.splitlines()[1].startswith("a-Q8_0.gguf")
    assert "Q8_0: REGRESSION in fakecheck: mean_kld 9 on text, limit 0.004\n" in ended.err
    assert f"{tmp_path / 'a-Q8_0.gguf'} did not pass" in ended.err
    assert f"\nreport: {tmp_path / 'v' / 'report.md'}\n" in ended.err
    assert "\njudge a-Q8_0.gguf\n" in ended.err


# --- streams that are not what they should be


@pytest.mark.parametrize(
    ("redirection", "code", "told"),
    [
        (">/dev/full", 3, "error: No space left on device\n"),
        ("2>&-", 0, ""),
        (">&-", 0, ""),
    ],
)
def test_streams_that_cannot_be_written(redirection: str, code: int, told: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m quantool schema {redirection}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, told)


def test_a_warning_needs_no_standard_error(config_file: Write) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m quantool plan {shlex.quote(str(config_file()))} 2>&-"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert ended.stdout.startswith("source ")


# --- the toolchain


def test_toolchain_install(quantool: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ended = quantool("toolchain", "install", "--sdist", tmp_path / "nothing.tar.gz")
    assert (ended.code, ended.out) == (3, "")
    assert "nothing.tar.gz does not exist" in ended.err


# --- no secrets, no heavy imports


def test_no_token_reaches_an_output_or_a_file(
    config_file: Write, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    fine = config_file().rename(tmp_path / "fine.yaml")
    failing = config_file(ending="bug")
    token = ("--set", f"use_auth_token={SECRET}")
    commands = [
        ("doctor",),
        ("run", failing, *token),
        ("run", fine, *token, "--json"),
        ("plan", fine, *token),
    ]
    ended = [begin(*words).communicate(timeout=30) for words in commands]
    assert "present (HF_TOKEN)" in ended[0][0]
    assert "exit code 1" in ended[1][1]
    assert all(SECRET not in text for both in ended for text in both)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


def modules_after(*words: str) -> set[str]:
    code = (
        "import sys, quantool.cli as c\n"
        f"sys.argv = ['quantool', *{words!r}]\n"
        "try: c.main()\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_help_is_quick_because_it_imports_little() -> None:
    loaded = modules_after("--help")
    assert "typer" in loaded
    assert not (HEAVY - {"rich"}) & loaded  # typer formats its help with rich


def test_a_plan_loads_no_model_library(config_file: Write) -> None:
    loaded = modules_after("plan", str(config_file()))
    assert "pydantic" in loaded
    assert not {"torch", "transformers", "llama_cpp", "llmcompressor"} & loaded


def test_the_module_is_the_command(config_file: Write) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantool", "--version"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.stdout == f"{package.__version__}\n"
