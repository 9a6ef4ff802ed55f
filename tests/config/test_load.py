import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from quantool.config.load import Loaded, load, schema
from quantool.config.schema import NO_EFFECT, Calibration, Config
from quantool.config.section import Section
from quantool.errors import ConfigError, DependencyError
from quantool.plugins import find
from quantool.plugins.contract import Method, Options
from quantool.record import Record
from quantool.records import Gates

ROOT = Path(__file__).parents[2]
Load = Callable[..., Loaded]


class GgufOptions(Options):
    llama_cpp_path: Path | None = Field(default=None, description="A checkout.")
    imatrix: bool | Path = Field(default=False, description="Compute, or a file.")
    base_type: Literal["auto", "f16"] = Field(default="auto", description="Type of the base.")
    tensor_types: dict[str, str] = Field(default={}, description="Regex to type.")
    threads: int = Field(default=0, ge=0, description="Threads.")
    shard: str = Field(default="45G", description="Size of a file.")


class LinearOptions(Options):
    targets: str = Field(default="Linear", description="Layers.")
    ignore: tuple[str, ...] = Field(default=(), description="Layers to leave.")


def _never(*_: Any) -> Any:
    raise AssertionError


def _method(name: str, options: type[Options], *levels: str) -> Method:
    return Method(name, options, lambda: dict.fromkeys(levels, ""), _never, _never)


METHODS = {
    "gguf": _method("gguf", GgufOptions, "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_S", "TQ1_0"),
    "awq": _method("awq", LinearOptions, "W4A16", "W4A16_ASYM"),
    "gptq": _method("gptq", LinearOptions, "W4A16", "W8A8"),
}


def _find(name: str) -> Method:
    if name == "fp8":
        raise DependencyError("method 'fp8' needs llmcompressor", hint="pip install 'quantool[compressed]'")
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}", hint="did you mean gguf?")
    return METHODS[name]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = ["chat_template", "perplexity"]
    monkeypatch.setattr(find, "find_method", _find)
    monkeypatch.setattr(find, "names", lambda folder: checks if folder == "checks" else sorted(METHODS))


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: None) -> Load:
    monkeypatch.chdir(tmp_path)

    def inner(text: str, *overrides: str) -> Loaded:
        Path("c.yaml").write_text(text, encoding="utf-8")
        return load(Path("c.yaml"), overrides, find)

    return inner


@pytest.fixture
def mistakes(loads: Load) -> Callable[..., list[str]]:
    def inner(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            loads(text, *overrides)
        return caught.value.message.splitlines()

    return inner


Mistakes = Callable[..., list[str]]

KNOWN = "Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_S, TQ1_0"
START = "model_id: m\nmethod: gguf\nquant_level: Q8_0\n"


def test_the_shortest(loads: Load) -> None:
    config, warnings = loads(START).config, loads(START).warnings
    (wanted,) = config.requested()
    assert (wanted.method, wanted.levels(), wanted.quantization_config, wanted.repo_id) == (
        "gguf",
        ["Q8_0"],
        {},
        None,
    )
    assert config.validation.context == 512
    assert config.output_path == Path("output")
    assert warnings == ()


def test_levels_get_the_spelling_of_their_method(loads: Load) -> None:
    config = loads("model_id: m\nmethod: gguf\nquant_level: [q4_k_m, Q8_0]\n").config
    assert config.quant_level == ["Q4_K_M", "Q8_0"]
    assert loads("model_id: m\nmethod: gguf\nquant_level: tq1_0\n").config.quant_level == "TQ1_0"


def test_gate_levels_get_the_spelling_of_their_method(loads: Load) -> None:
    gates = "validation: {gates: {q6_k: {max_mean_kld: 1}, '*': {min_same_top_p: null}}}\n"
    config = loads(START + gates).config
    assert config.validation.gates == {"Q6_K": Gates(max_mean_kld=1), "*": Gates(min_same_top_p=None)}
    assert config.validation.gates["*"].model_fields_set == {"min_same_top_p"}


def test_nulls_are_defaults(loads: Load) -> None:
    text = START + (
        "sample_size: null\nsplit: null\nvalidation:\n  max_tokens: null\n  checks: null\n"
        "  corpora: [{name: a, path: b, split: null, dataset: null}]\n"
        "quantization_config: {llama_cpp_path: null, threads: null, imatrix: null}\n"
        "calibration_config: {max_tokens: null}\n"
    )
    config = loads(text).config
    assert (config.sample_size, config.split, config.validation.max_tokens) == (512, "train", 16384)
    assert config.quantization_config == {}
    assert config.calibration_config == {}
    assert loads(START + "quantization_config: null\nvalidation: null\n").config == loads(START).config


def test_a_null_for_an_unknown_option_is_still_unknown(mistakes: Mistakes) -> None:
    assert mistakes(START + "quantization_config: {lama_cpp_path: null}\n") == [
        "c.yaml:4:23: quantization_config.lama_cpp_path: unknown key (value null); did you mean llama_cpp_path?"
    ]


def test_overrides(loads: Load) -> None:
    text = (
        "model_id: m\nquantizations: [{method: gguf, quant_level: Q8_0}, {method: awq, quant_level: W4A16}]\n"
    )
    config = loads(
        text,
        "quantizations.0.quant_level=[q6_k, Q4_K_M]",
        "validation.context=256",
        "model_id=other",
        "quantizations.1.quantization_config.ignore=[lm_head]",
    ).config
    assert config.model_id == "other"
    assert config.validation.context == 256
    assert [entry.levels() for entry in config.requested()] == [["Q6_K", "Q4_K_M"], ["W4A16"]]
    assert config.quantizations[1].quantization_config == {"ignore": ["lm_head"]}


def test_entries_share_the_repository_unless_they_name_one(loads: Load) -> None:
    config = loads(
        "model_id: m\npush_to_hub: true\nrepo_id: a/shared\nquantizations:\n"
        "  - {method: gguf, quant_level: Q8_0}\n  - {method: awq, quant_level: W4A16, repo_id: a/own}\n"
    ).config
    assert [entry.repo_id for entry in config.requested()] == ["a/shared", "a/own"]


@pytest.mark.parametrize("method", ["gguf", "awq", "gptq"])
def test_files_of_0_2_0(fakes: None, method: str) -> None:
    path = ROOT / "tests" / "data" / f"quantool-0.2.0-{method}.yaml"
    loaded = load(path, (), find)
    (wanted,) = loaded.config.requested()
    expected: dict[str, tuple[list[str], dict[str, Any], str | None]] = {
        "gguf": (["Q4_K_M", "Q3_K_S"], {}, "some-org/test_gguf"),
        "awq": (["W4A16"], {"targets": "Linear", "ignore": ["lm_head"]}, None),
        "gptq": (["W8A8"], {"targets": "Linear", "ignore": ["lm_head"]}, None),
    }
    assert (wanted.levels(), wanted.quantization_config, wanted.repo_id) == expected[method]
    assert loaded.config.sample_size == (512 if method == "gguf" else 4)
    (warning,) = loaded.warnings
    for key in (
        "metrics",
        "enable_evaluation",
        "verbose",
        "log_level",
        "save_logs",
        "log_dir",
        "use_auth_token",
    ):
        assert key in warning
    assert "report_to" not in warning  # null
    assert ("load_in_pipeline" in warning) == (method != "gguf")


def test_keys_without_effect_are_told_once_with_their_reasons(loads: Load) -> None:
    text = START + "".join(f"{key}: {{a: 1}}\n" for key in NO_EFFECT)  # whatever they hold
    (warning,) = loads(text).warnings
    for key, reason in NO_EFFECT.items():
        assert key in warning
        assert warning.count(reason) == 1


def test_every_mistake_is_told_at_once(mistakes: Mistakes) -> None:
    text = """\
method: gguf
quant_level: [q4_k_x, Q4_K_M, q4_k_m]
quantization_config: {imatrxi: true, threads: -1, base_type: f17}
validation:
  contxt: 64
  checks: [perplexty]
  corpora:
    - {name: en, path: a.txt}
    - {name: en, pth: b.txt}
  gates: {Q8_1: {max_mean_kld: 0.1}, Q8_0: {max_kld: 0.1}}
sample_size: many
Seed: 3
push_to_hub: true
"""
    assert mistakes(text, "device=gpu") == [
        "c.yaml:1:1: repo_id: missing; push_to_hub needs the name of a repository",
        "c.yaml:1:1: model_id: missing",
        'c.yaml:2:15: quant_level.0: gguf has no such level (value "q4_k_x"); did you mean Q4_K_M or Q5_K_M?',
        'c.yaml:2:31: quant_level.2: gguf is asked for this level twice (value "q4_k_m")',
        "c.yaml:3:23: quantization_config.imatrxi: unknown key (value true); did you mean imatrix?",
        "c.yaml:3:38: quantization_config.threads: must be at least 0 (value -1)",
        "c.yaml:3:51: quantization_config.base_type: must be 'auto' or 'f16' (value \"f17\"); did you mean f16?",
        "c.yaml:5:3: validation.contxt: unknown key (value 64); did you mean context?",
        'c.yaml:6:12: validation.checks.0: there is no such check (value "perplexty"); did you mean perplexity?',
        'c.yaml:9:7: validation.corpora.1: give either path or dataset (value {"name": "en", "pth": "b.txt"})',
        'c.yaml:9:8: validation.corpora.1.name: another corpus has this name (value "en")',
        'c.yaml:9:18: validation.corpora.1.pth: unknown key (value "b.txt"); did you mean path or split?',
        "c.yaml:10:11: validation.gates.Q8_1: no method of this run has such a level; did you mean Q8_0 or Q6_K?",
        "c.yaml:10:45: validation.gates.Q8_0.max_kld: unknown key (value 0.1); did you mean max_mean_kld?",
        'c.yaml:11:1: sample_size: must be a whole number (value "many")',
        "c.yaml:12:1: Seed: unknown key (value 3); did you mean seed or dataset_seed?",
        "--set device: must be 'auto', 'cpu', 'cuda' or, for the first two GPUs, 'cuda:0,1' (value \"gpu\"); did you mean cpu?",
    ]


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("model_id: 5", "1:1", "model_id: must be text (value 5); put it in quotes if it is a word"),
        ("model_id: ''", "1:1", "model_id: String should have at least 1 character"),
        ("model_id: null", "1:1", "model_id: missing"),
        ("method: 3", "2:1", "method: must be text (value 3)"),
        ("quant_level: {a: 1}", "2:1", 'quant_level: must be text or a list (value {"a": 1})'),
        ("quant_level: [Q8_0, [Q6_K]]", "2:21", 'quant_level.1: must be text (value ["Q6_K"])'),
        ("quant_level: []", "2:1", "quant_level: missing; the levels of gguf are Q8_0, Q6_K,"),
        ("quant_level: null", "2:1", "quant_level: missing; the levels of gguf are Q8_0, Q6_K,"),
        ("quant_level: zzz", "2:1", 'quant_level: gguf has no such level (value "zzz"); known: Q8_0, Q6_K,'),
        *(
            (f"repo_id: {name}", "2:1", "repo_id: must match ")
            for name in ("org/..", "..", "org/.quantool", "/tmp", "a/b/c", "org/näme", '"a/b c"')
        ),
        (
            "quantizations: [{method: gguf, quant_level: Q8_0, repo_id: a/..}]\nmethod: null\nquant_level: null",
            "2:51",
            "quantizations.0.repo_id: must match ",
        ),
        ("method: ggfu", "2:1", "method: unknown method 'ggfu'; did you mean gguf?"),
        ("quantization_config: [a]", "2:1", 'quantization_config: must be a mapping (value ["a"])'),
        (
            "quantization_config: {imatrix: 3}",
            "2:23",
            "quantization_config.imatrix: must be true or false or",
        ),
        (
            "quantization_config: {tensor_types: {a: 3}}",
            "2:38",
            "quantization_config.tensor_types.a: must be",
        ),
        (
            "quantization_config: {sample_size: 3}",
            "2:23",
            "quantization_config.sample_size: unknown key here",
        ),
        (
            "imatrix: true",
            "2:1",
            "imatrix: unknown key here (value true); did you mean quantization_config.imatrix?",
        ),
        ("corpora: []", "2:1", "corpora: unknown key here (value []); did you mean validation.corpora?"),
        ("nonsense_of_mine: 1", "2:1", "nonsense_of_mine: unknown key (value 1)"),
        ("shuffle: 1", "2:1", "shuffle: must be true or false (value 1)"),
        ("sample_size: 0", "2:1", "sample_size: must be at least 1 (value 0)"),
        ("sample_size: 2.5", "2:1", "sample_size: must be a whole number (value 2.5)"),
        (
            "calibration_config: {max_token: 5}",
            "2:22",
            "calibration_config.max_token: unknown key (value 5); did",
        ),
        ("calibration_config: {max_tokens: 0}", "2:22", "calibration_config.max_tokens: must be at least 1"),
        ("calibration_config: 3", "2:1", "calibration_config: must be a mapping (value 3)"),
        ("dataset_id: a\ndataset_path: b", "3:1", "dataset_path: give either dataset_id or dataset_path"),
        ("push_to_hub: true", "1:1", "repo_id: missing; push_to_hub needs the name of a repository"),
        ("disk_bounded: true", "2:1", "disk_bounded: needs push_to_hub: true, each level is deleted once"),
        ("publish: {mode: push}", "2:11", "publish.mode: "),
        ("publish: {revision: ''}", "2:11", "publish.revision: "),
        (
            "publish: {tag: v1, mode: pull_request}",
            "2:11",
            "publish.tag: waits until the pull request is merged",
        ),
        (
            "publish: {collection: a/b, mode: pull_request}",
            "2:11",
            "publish.collection: waits until the pull request is merged",
        ),
        ("validation: 3", "2:1", "validation: must be a mapping (value 3)"),
        ("validation: {checks: []}", "2:14", "validation.checks: at least one is needed"),
        (
            "validation: {checks: perplexity}",
            "2:14",
            'validation.checks: must be a list (value "perplexity")',
        ),
        ("validation: {max_tokens: 100}", "2:14", "validation.max_tokens: a window of 512 tokens (context)"),
        ("validation: {context: 20000}", "2:14", "validation.context: a window of 20000 tokens (context)"),
        (
            "validation: {gates: {Q8_0: {min_same_top_p: 97}}}",
            "2:29",
            "validation.gates.Q8_0.min_same_top_p: must",
        ),
        (
            "validation: {gates: {Q8_0: {}, q8_0: {}}}",
            "2:32",
            "validation.gates.q8_0: the gates of Q8_0 stand",
        ),
        (
            "validation: {gates: {W4A16: {}}}",
            "2:22",
            "validation.gates.W4A16: no method of this run has such",
        ),
        (
            "validation: {corpora: [{name: no, path: a}]}",
            "2:25",
            "validation.corpora.0.name: must be text (value f",
        ),
        (
            "validation: {corpora: [{name: a/b, path: a}]}",
            "2:25",
            r"validation.corpora.0.name: must match ^[\w.-]+$",
        ),
        ("validation: {corpora: [{path: a}]}", "2:24", "validation.corpora.0.name: missing"),
        (
            "validation: {corpora: [{name: a, path: a, dataset: b}]}",
            "2:24",
            "validation.corpora.0: give either",
        ),
        ("validation: {corpora: [a]}", "2:24", 'validation.corpora.0: must be a mapping (value "a")'),
        (
            "quantizations: []\nmethod: null",
            "3:1",
            "method: missing; give method, or quantizations; known: awq, g",
        ),
        ("quantizations: [3]\nmethod: null\nquant_level: null", "2:17", "quantizations.0: must be a mapping"),
        ("quantizations: x\nmethod: null\nquant_level: null", "2:1", "quantizations: must be a list"),
        ("seed: 1\nseed: 2", "3:1", "seed: duplicate key"),
        ("seed: 1:30", "2:1", 'seed: must be a whole number (value "1:30")'),
        ("seed: 010", "2:1", 'seed: must be a whole number (value "010")'),
        ("seed: 0x" + "f" * 6000, "2:1", "seed: a whole number has at most 18 digits (value 0xfff"),
        (
            "quantization_config: {base_type: 1}",
            "2:23",
            "quantization_config.base_type: must be 'auto' or 'f16' (value 1)",
        ),
        (
            "quantization_config: {shard: 1}",
            "2:23",
            'quantization_config.shard: must be text such as "45G" (value 1)',
        ),
        (
            "split: on",
            "2:1",
            'split: must be text such as "train" (value true); put it in quotes if it is a word',
        ),
    ],
)
def test_each_mistake_alone(mistakes: Mistakes, text: str, place: str, what: str) -> None:
    """The keys of ``text`` take the place of those of a sound file."""
    named = {line.partition(":")[0] for line in text.splitlines()}
    first = "" if "model_id" in named else "model_id: m\n"
    rest = [line for line in START.splitlines()[1:] if line.partition(":")[0] not in named]
    (line,) = mistakes(first + "\n".join([text, *rest]))
    assert line.startswith(f"c.yaml:{place}: {what}")


@pytest.mark.parametrize(
    "text",
    [
        START.replace("gguf", "fp8"),
        "model_id: m\nquantizations: [{method: fp8, quant_level: A}, {method: fp8, quant_level: B}]\n",
    ],
)
def test_what_this_machine_lacks_is_no_mistake_of_the_file(loads: Load, text: str) -> None:
    with pytest.raises(DependencyError, match=r"^method 'fp8' needs llmcompressor$") as caught:
        loads(text)
    assert caught.value.exit_code == 3
    assert caught.value.hint == "pip install 'quantool[compressed]'"


def test_what_this_machine_lacks_is_told_beside_mistakes(mistakes: Mistakes) -> None:
    assert mistakes(START.replace("gguf", "fp8") + "seed: x\n") == [
        "c.yaml:2:1: method: method 'fp8' needs llmcompressor; pip install 'quantool[compressed]'",
        'c.yaml:4:1: seed: must be a whole number (value "x")',
    ]


def test_a_tilde_is_the_home_of_the_user(loads: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    text = START + "output_path: ~/out\nvalidation: {corpora: [{name: x, path: ~/x.txt}]}\n"
    config = loads(text).config
    assert config.output_path == Path("/home/somebody/out")
    assert config.validation.corpora[0].path == Path("/home/somebody/x.txt")


def test_the_home_of_nobody(mistakes: Mistakes) -> None:
    (line,) = mistakes(START + "output_path: ~no_such_user/out\n")
    assert line.startswith("c.yaml:4:1: output_path: ")


def test_mistakes_in_one_of_several_methods(mistakes: Mistakes) -> None:
    text = """\
model_id: m
push_to_hub: true
quant_level: Q8_0
quantizations:
  - {method: gguf, quant_level: Q8_0, imatrix: true, repo_id: a/b}
  - {method: gguf, quant_level: [q8_0, W4A16], repo_id: a/c}
  - {method: awq, quantization_config: {imatrix: true}, private: true}
  - {quant_level: W4A16, repo_id: a/d}
validation: {gates: {anything: {}}}
"""
    assert mistakes(text) == [
        'c.yaml:3:1: quant_level: cannot stand beside quantizations; put it in an entry there (value "Q8_0")',
        "c.yaml:5:39: quantizations.0.imatrix: unknown key here (value true); did you mean quantization_config.imatrix?",
        'c.yaml:6:34: quantizations.1.quant_level.0: gguf is asked for this level twice (value "q8_0")',
        f'c.yaml:6:40: quantizations.1.quant_level.1: gguf has no such level (value "W4A16"); known: {KNOWN}',
        "c.yaml:7:5: quantizations.2.quant_level: missing; the levels of awq are W4A16, W4A16_ASYM",
        "c.yaml:7:5: quantizations.2.repo_id: missing; push_to_hub needs the name of a repository",
        "c.yaml:7:41: quantizations.2.quantization_config.imatrix: unknown key (value true); known: targets, ignore",
        "c.yaml:7:57: quantizations.2.private: unknown key here (value true); did you mean private at the top?",
        "c.yaml:8:5: quantizations.3.method: missing",
    ]


def test_both_ways_to_name_methods(mistakes: Mistakes) -> None:
    lines = mistakes(START + "quantizations: [{method: awq, quant_level: W4A16}]\n")
    assert [line.split(": ")[1] for line in lines] == ["method", "quant_level"]


def test_an_override_can_be_the_mistake(mistakes: Mistakes) -> None:
    assert mistakes(START, "quant_level=[Q8_1, Q6_K]", "sed=3", "validation.gates.Zz={}") == [
        '--set quant_level: quant_level.0: gguf has no such level (value "Q8_1"); did you mean Q8_0 or Q6_K?',
        f"--set validation.gates.Zz: no method of this run has such a level; known: {KNOWN}",
        "--set sed: unknown key (value 3); did you mean seed?",
    ]


def test_tokens_are_neither_shown_nor_kept(mistakes: Mistakes, loads: Load) -> None:
    secret = "hf_abcdefghijklmnop"  # noqa: S105
    (line,) = mistakes(START + f"hub_token: {secret}\n")
    assert secret not in line
    loaded = loads(START + f"use_auth_token: {secret}\n")
    assert secret not in repr(loaded)
    assert secret not in json.dumps(loaded.config.model_dump(mode="json"))


def test_a_configuration_read_back_is_the_same(loads: Load) -> None:
    gates = "validation: {gates: {Q8_0: {max_mean_kld: 1, min_same_top_p: null}}}\n"
    config = loads(START + gates).config
    again = Config.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.validation.gates["Q8_0"].model_fields_set == {"max_mean_kld", "min_same_top_p"}


def test_a_corpus_has_one_origin() -> None:
    with pytest.raises(ValidationError, match="give either path or dataset"):
        Config.model_validate({"model_id": "m", "validation": {"corpora": [{"name": "a"}]}})


def test_schema(fakes: None) -> None:
    built = schema(find)
    assert built["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(built["properties"]) == set(Config.model_fields) | set(NO_EFFECT)
    assert built["required"] == ["model_id"]
    assert built["additionalProperties"] is False
    assert built["properties"]["method"]["anyOf"][0] == {"type": "string", "enum": ["awq", "gguf", "gptq"]}
    assert built["$defs"]["Quantization"]["properties"]["method"]["enum"] == ["awq", "gguf", "gptq"]
    checks = built["$defs"]["Validation"]["properties"]["checks"]["anyOf"][0]
    assert checks["items"]["enum"] == ["chat_template", "perplexity"]
    calibration = built["properties"]["calibration_config"]["anyOf"][0]
    assert set(calibration["properties"]) == set(Calibration.model_fields)
    for owner in (built, *built["$defs"].values()):
        for key, value in owner.get("properties", {}).items():
            assert value.get("description") or "$ref" in value, key
    assert built["properties"]["verbose"]["deprecated"] is True
    json.dumps(built)


def test_schema_before_anything_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "names", lambda folder: [])
    assert "enum" not in json.dumps(schema(find)["properties"]["method"])


def test_sections_are_closed_and_described() -> None:
    models: list[type[BaseModel]] = [*Section.__subclasses__(), Gates]
    assert Config in models
    for model in models:
        assert model.model_config["extra"] == "forbid"
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
    assert issubclass(Gates, Record)


def test_imports_stay_small() -> None:
    program = (
        "import sys, quantool.config.schema\n"
        "heavy = {'torch', 'transformers', 'numpy', 'llama_cpp', 'datasets', 'gguf', 'huggingface_hub', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real methods: fails as long as one that a configuration names is missing."""
    monkeypatch.chdir(ROOT)
    loaded = load(path, (), find)
    assert loaded.warnings == ()
    assert all(entry.levels() for entry in loaded.config.requested())


def test_quickstart_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load(Path("configs/quickstart.yaml"), (), find).config
    assert Path(config.model_id).is_dir()
    assert not config.push_to_hub
    assert [corpus.name for corpus in config.validation.corpora] == ["docs", "chat"]
    assert all(corpus.path is not None and corpus.path.is_file() for corpus in config.validation.corpora)


@pytest.mark.parametrize("value", ["-1", "4294967296"])
def test_a_seed_that_numpy_does_not_take(tmp_path: Path, value: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"model_id: x\nseed: {value}\ndataset_seed: {value}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, (), find)
    assert "job.yaml:2:1: seed:" in caught.value.message
    assert "job.yaml:3:1: dataset_seed:" in caught.value.message
