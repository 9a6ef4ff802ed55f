"""The traps of converting: each ends in the right result, or in a refusal before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import making
import pytest
from safetensors.torch import load_file, save_file

from quantool import pipeline
from quantool.errors import ConfigError, DependencyError, QuantizationError, QuantoolError, SourceError
from quantool.methods._llama_cpp import base_file, convert, dry_run, quantize
from quantool.methods._llama_cpp.pre_tokenizer import KNOWN, equal_steps, is_byte_level, suggest
from quantool.records import Plan
from quantool.runtime import toolchain
from quantool.source import shapes
from quantool.source.resolve import resolve

pytestmark = pytest.mark.e2e

# sha256(str(ids)) of upstream's check text by the tokenizer of tiny-chat, as upstream's converter prints it
APPROXIMATE = {"gpt-4o", "tekken"}
TINY_HASH = "6f4cf441fb8636efdf038b2bfa02796205e109070d34eb8186ffc4c5dbec4b14"
Case = tuple[Path, dict[str, Any]]
"""A checkpoint, and options."""
KNOWN_LLAMA = next(steps[0] for (steps, _), name in KNOWN.items() if name == "llama-bpe")
COPY_IT = "copy it from the original checkpoint"


@pytest.fixture(scope="module", autouse=True)
def _cache() -> Iterator[None]:
    with making.own_cache():
        yield


def plan(model: Path, level: str = "F16", pre_tokenizer: str | None = "qwen2", **options: Any) -> Plan:
    wanted = making.config(
        model,
        making.room() / "never-written",
        level,
        method="fp16",
        quantization_config={"pre_tokenizer": pre_tokenizer, **options},
    )
    made = pipeline.plan(wanted, making.QUIET)
    assert not (making.room() / "never-written").exists()
    return made


def attempt(model: Path, options: dict[str, Any]) -> Plan | QuantoolError:
    try:
        return plan(model, **options)
    except QuantoolError as error:
        return error


@cache
def outcomes() -> dict[str, Plan | QuantoolError]:
    """The plan of every case, or its refusal; two at a time, because each is one Python importing torch."""
    cases = {name: prepare(making.room() / "cases" / name) for name, prepare in CASES.items()}
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda case: attempt(*case), cases.values())
        return dict(zip(cases, found, strict=True))


def refusal(name: str, kind: type[QuantoolError]) -> QuantoolError:
    found = outcomes()[name]
    assert isinstance(found, kind), found
    return found


def accepted(name: str) -> Plan:
    found = outcomes()[name]
    assert isinstance(found, Plan), found
    return found


def copy(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose small files may be changed."""
    shutil.copytree(model, folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(making.read_json(path) | changes))


def unknown_structure(folder: Path) -> Case:
    model = copy(making.TINY, folder)
    saved = making.read_json(model / "tokenizer.json")
    saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    (model / "tokenizer.json").write_text(json.dumps(saved))
    return model, {"pre_tokenizer": None}


def one_character(folder: Path) -> Case:
    """Qwen2's expression with another number of digits at a time."""
    model = copy(making.TINY, folder)
    saved = making.read_json(model / "tokenizer.json")
    split = saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r"|\p{N}|", r"|\p{N}+|")
    (model / "tokenizer.json").write_text(json.dumps(saved))
    return model, {"pre_tokenizer": None}


def lower_case(folder: Path) -> Case:
    model = copy(making.TINY, folder)
    edit(model / "tokenizer.json", normalizer={"type": "Lowercase"})
    return model, {"pre_tokenizer": None}


def broken_template(folder: Path) -> Case:
    model = copy(making.TINY, folder)
    (model / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m }\n{% endfor %}")
    return model, {}


def padded(folder: Path) -> Case:
    """30 rows of embeddings more than tokens."""
    model = copy(making.model("spm_llama"), folder)
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = tensors[name]
        tensors[name] = rows[[*range(len(rows)), *[0] * 30]].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    edit(model / "config.json", vocab_size=len(tensors["lm_head.weight"]))
    return model, {"pre_tokenizer": None}


def without_tokenizer_model(case: Case) -> Case:
    (case[0] / "tokenizer.model").unlink()
    return case


def short_window(folder: Path) -> Case:
    """The context is no longer than the window, so that it does not matter."""
    model = copy(making.model("sliding_mistral"), folder)
    edit(model / "config.json", max_position_embeddings=64)
    return model, {}


def unknown_architecture(folder: Path) -> Case:
    model = copy(making.TINY, folder)
    edit(model / "config.json", architectures=["LlamaForSomethingElse"])
    return model, {}


CASES: dict[str, Callable[[Path], Case]] = {
    "unknown hash": lambda _: (making.TINY, {"pre_tokenizer": None}),
    "unknown structure": unknown_structure,
    "one character": one_character,
    "lower case": lower_case,
    "unknown name": lambda _: (making.TINY, {"pre_tokenizer": "qwen22"}),
    "broken template": broken_template,
    "padded": padded,
    "padded without tokenizer.model": lambda folder: without_tokenizer_model(padded(folder)),
    "gemma without tokenizer.model": lambda folder: without_tokenizer_model(
        (copy(making.model("gemma3"), folder), {"pre_tokenizer": None})
    ),
    "gemma without tokenizer.model, named": lambda folder: without_tokenizer_model(
        (copy(making.model("gemma3"), folder), {"pre_tokenizer": "qwen2"})
    ),
    "sliding window": lambda _: (making.model("sliding_mistral"), {}),
    "short window": short_window,
    "My-Phi-3-tune": lambda folder: (copy(making.TINY, folder), {}),
    "My-Phi-3-tune, named": lambda folder: (
        copy(making.TINY, folder / "My-Phi-3-tune"),
        {"model_name": "tuned"},
    ),
    "unknown architecture": unknown_architecture,
}


def test_unknown_vocabulary_with_the_steps_of_a_name_needs_no_setting(tmp_path: Path) -> None:
    made = accepted("unknown hash")
    (note,) = [note for note in made.warnings if "qwen2" in note]
    assert "the tokenizer check proves it" in note
    named = plan(making.TINY)
    assert made.outputs[0].files == named.outputs[0].files
    assert not any("qwen2" in note for note in named.warnings)
    wanted = [
        making.config(
            making.TINY,
            tmp_path / str(name),
            "F16",
            method="fp16",
            quantization_config={"pre_tokenizer": name},
        )
        for name in (None, "qwen2")
    ]
    hashes = [making.make(config)[1][0].files[0].sha256 for config in wanted]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("name", ["one character", "unknown structure"])
def test_unknown_vocabulary_whose_steps_are_no_name_s_is_refused(name: str) -> None:
    error = refusal(name, SourceError)
    assert "with the hash " in error.message
    assert "quantization_config.pre_tokenizer" in error.hint


def test_step_that_llama_cpp_does_not_have_is_named() -> None:
    error = refusal("lower case", SourceError)
    assert 'no normalizer: {"type": "Lowercase"}' in error.message


@pytest.mark.parametrize("adds", [False, True])
def test_bos_is_written_where_the_name_has_a_default(adds: bool, tmp_path: Path) -> None:
    """llama-bpe means BOS unless the file says otherwise; a tokenizer without post-processor says nothing."""
    model = copy(making.TINY, tmp_path / "model")
    saved = making.read_json(model / "tokenizer.json")
    saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = KNOWN_LLAMA
    saved["model"]["ignore_merges"] = True
    first = saved["added_tokens"][0]
    saved["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": first["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {first["content"]: {"id": first["content"], "ids": [first["id"]], "tokens": [first["content"]]}},
    } if adds else None  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(saved))
    settings = making.read_json(model / "tokenizer_config.json")
    settings = {key: value for key, value in settings.items() if key != "add_bos_token"}
    settings |= {"bos_token": first["content"], "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    made = plan(model, pre_tokenizer=None)
    assert any("llama-bpe" in note for note in made.warnings)
    wanted = making.config(
        model, tmp_path / "out", "F16", method="fp16", quantization_config={"pre_tokenizer": None}
    )
    artifact = making.make(wanted)[1][0]
    keys = making.keys(artifact.folder / artifact.files[0].name)
    assert keys["tokenizer.ggml.pre"] == "llama-bpe"
    assert keys["tokenizer.ggml.add_bos_token"] is adds


def test_unknown_pre_tokenizer_of_unknown_structure_says_how_to_choose() -> None:
    error = refusal("unknown structure", SourceError)
    assert "with the hash " in error.message
    assert TINY_HASH not in error.message
    assert "quantization_config.pre_tokenizer" in error.hint
    assert "qwen2" not in error.hint


def test_pre_tokenizer_that_llama_cpp_does_not_know_is_refused_with_the_nearest() -> None:
    error = refusal("unknown name", ConfigError)
    assert "'qwen22'" in error.message
    assert "qwen2" in error.hint


@pytest.mark.parametrize("name", KNOWN.values())
def test_structure_suggests_a_name(name: str) -> None:
    (steps, merges), _ = next(item for item in KNOWN.items() if item[1] == name)
    spelled: dict[str, dict[str, Any]] = {
        "BYTES": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        "GPT2": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "DIGIT": {"type": "Digits", "individual_digits": True},
    }
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    inner = [spelled.get(step) or split | {"pattern": {"Regex": step}} for step in steps]
    tokenizer: dict[str, Any] = {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": inner},
        "model": {"ignore_merges": merges},
    }
    assert suggest(tokenizer) == name
    assert equal_steps(tokenizer | {"decoder": {"type": "ByteLevel"}}) == (
        None if name in APPROXIMATE else name
    )
    assert equal_steps(tokenizer | {"decoder": {"type": "Metaspace"}}) is None
    tokenizer["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"})
    assert suggest(tokenizer) is None


def test_structure_of_a_real_tokenizer_is_recognized() -> None:
    tokenizer = making.read_json(making.TINY / "tokenizer.json")
    assert suggest(tokenizer) == "qwen2"
    assert is_byte_level(tokenizer)
    assert not is_byte_level(making.read_json(making.model("gemma3") / "tokenizer.json"))


@cache
def with_both_templates() -> tuple[Path, str]:
    model = copy(making.TINY, making.room() / "both-templates")
    edit(model / "tokenizer_config.json", chat_template="{{ 'the old one' }}")
    return model, (model / "chat_template.jinja").read_text(encoding="utf-8")


def stored_template(model: Path) -> Any:
    return stored_keys(model)["tokenizer.chat_template"]


def stored_keys(model: Path) -> dict[str, Any]:
    wanted = making.config(model, making.room() / "never-written", "F16")
    source = resolve(wanted, weights=False, progress=making.QUIET)
    options = base_file.GgufOptions(pre_tokenizer="qwen2")
    return dry_run.rehearse(source, options, "f16").keys


def test_template_file_wins_over_tokenizer_config() -> None:
    from transformers import AutoTokenizer

    model, template = with_both_templates()
    assert stored_template(model) == template == AutoTokenizer.from_pretrained(model).chat_template


def test_template_in_tokenizer_config_is_taken_where_there_is_no_file(tmp_path: Path) -> None:
    model = copy(with_both_templates()[0], tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    assert stored_template(model) == "{{ 'the old one' }}"


def test_named_templates_are_those_of_transformers_in_a_fixed_order(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = copy(with_both_templates()[0], tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag", "a-b"):
        (model / "additional_chat_templates" / f"{name}.jinja").write_text(f"{{{{ '{name}' }}}}")
    keys = stored_keys(model)
    found = AutoTokenizer.from_pretrained(model).chat_template
    assert keys["tokenizer.chat_template"] == found["default"]
    for name in ("tool_use", "rag", "a-b"):
        assert keys[f"tokenizer.chat_template.{name.replace('-', '_')}"] == found[name]


def test_template_that_does_not_parse_is_refused_with_its_line() -> None:
    assert "chat_template.jinja:2" in refusal("broken template", SourceError).message


def test_fewer_tokens_than_rows_without_tokenizer_model_is_refused() -> None:
    error = refusal("padded without tokenizer.model", SourceError)
    assert "embedding rows" in error.message
    assert "tokenizer.model is missing" in error.hint
    assert accepted("padded").outputs[0].files


@pytest.mark.parametrize("name", ["gemma without tokenizer.model", "gemma without tokenizer.model, named"])
def test_gemma_without_tokenizer_model_is_refused(name: str) -> None:
    error = refusal(name, SourceError)
    assert "tokenizer.model" in error.message
    assert COPY_IT in error.hint


def test_sliding_window_that_llama_cpp_ignores_is_refused() -> None:
    error = refusal("sliding window", SourceError)
    assert "sliding window of 64 tokens" in error.message
    assert "max_position_embeddings to 64" in error.hint
    assert accepted("short window").outputs[0].files


def test_name_that_changes_llama_cpp_is_refused_and_mended() -> None:
    error = refusal("My-Phi-3-tune", ConfigError)
    assert "'My-Phi-3-tune'" in error.message
    assert "quantization_config.model_name" in error.hint
    assert accepted("My-Phi-3-tune, named").outputs[0].files[0].name == "tuned-5.2M-F16.gguf"


def test_architecture_that_the_converter_does_not_know_is_refused() -> None:
    assert "LlamaForSomethingElse" in refusal("unknown architecture", SourceError).message


def test_what_converts_and_does_not_load_is_refused(tmp_path: Path) -> None:
    """phi-3 in general.name makes llama.cpp look for a token; the converter ends well."""
    from quantool.runtime import process, toolchain

    metadata = tmp_path / "metadata.json"
    metadata.write_text(json.dumps({"general.name": "phi-3"}))
    request: dict[str, Any] = {
        "toolchain": str(toolchain.locate().folder), "model": str(making.model("spm_llama")), "type": "f16",
        "output": str(tmp_path / "out.gguf"), "metadata": str(metadata), "folder_name": "model", "pre_tokenizer": None,
        "chat_template": None, "named_templates": {}, "add_space_prefix": None, "pooling": None, "extra": {}, "split_bytes": 0,
        "rehearse": False,
    }  # fmt: skip
    process.call(convert.convert, request, log=tmp_path / "log")
    loading = {"path": str(tmp_path / "out.gguf"), "vocabulary_only": False}
    with pytest.raises(QuantizationError, match=r"cannot load out\.gguf: .*unordered_map::at"):
        process.call(quantize.probe, loading, log=tmp_path / "log")


def test_missing_tensor_is_found_by_the_plan(tmp_path: Path) -> None:
    model = copy(making.TINY, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = attempt(model, {"level": "F16"})
    assert isinstance(found, SourceError)
    assert "tensor 'blk.1.ffn_up.weight' not found" in found.message


def test_other_tokenizer_is_the_one_that_is_planned_and_written(tmp_path: Path) -> None:
    other = copy(making.TINY, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (other / name).unlink()
    wanted = making.config(making.TINY, tmp_path / "out", "F16", method="fp16", tokenizer_name=str(other))
    planned = pipeline.plan(wanted, making.QUIET).outputs[0].files[0]
    plain = plan(making.TINY).outputs[0].files[0]
    assert planned.bytes < plain.bytes - 1000  # the template's length
    artifact = making.make(wanted)[1][0]
    assert artifact.files[0].bytes == planned.bytes
    written = making.keys(artifact.folder / artifact.files[0].name)
    assert written["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"


@cache
def overflowing() -> Path:
    """tiny-chat with one weight beyond f16's largest number."""
    model = copy(making.TINY, making.room() / "overflowing")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 70_000
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_base_is_bf16_where_f16_overflows(tmp_path: Path) -> None:
    made, artifacts = making.make(making.config(overflowing(), tmp_path, "Q8_0"))
    assert any("beyond f16's 65504: the base is bf16" in note for note in made.warnings)
    assert [stage.name for stage in made.stages if stage.name.startswith("base")] == ["base-bf16"]
    assert [path.name for path in (tmp_path / ".quantool/work").glob("base-*")] == ["base-bf16"]
    assert "the base is bf16" in str(artifacts[0].details["note"])


@pytest.mark.parametrize(
    ("method", "level", "options"), [("fp16", "F16", {}), ("gguf", "Q8_0", {"base_type": "f16"})]
)
def test_f16_is_refused_where_it_overflows(
    tmp_path: Path, method: str, level: str, options: dict[str, Any]
) -> None:
    wanted = making.config(overflowing(), tmp_path, level, method=method, quantization_config=options)
    with pytest.raises(QuantizationError, match="weights reach 7"):
        making.make(wanted)
    assert not list(tmp_path.rglob("*.gguf"))


def named_like_the_source(wanted: Any) -> None:
    """What is made has the planned bytes and the names that are guessed from the source's own folder."""
    plan(making.TINY)  # its rehearsal lies in the cache: what else it is taken for shows
    planned = pipeline.plan(wanted, making.QUIET).outputs[0].files[0]
    artifact = making.make(wanted)[1][0]
    assert artifact.files[0].bytes == planned.bytes
    keys = making.keys(artifact.folder / artifact.files[0].name)
    assert (keys["general.basename"], keys["general.finetune"]) == ("tiny", "chat")


def test_the_same_tokenizer_from_another_folder_changes_no_byte(tmp_path: Path) -> None:
    """T9: a folder of links is converted, by whose name upstream would guess."""
    other = copy(making.TINY, tmp_path / "other")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (other / name).unlink()
    named_like_the_source(
        making.config(making.TINY, tmp_path / "out", "F16", method="fp16", tokenizer_name=str(other))
    )


def test_a_checkout_that_is_no_repository_is_planned_to_the_byte(tmp_path: Path) -> None:
    """T9: its files have no key for llama.cpp's commit, those of the installed converter have."""
    checkout = tmp_path / "llama.cpp"
    shutil.copytree(toolchain.locate().folder, checkout)
    named_like_the_source(
        making.config(
            making.TINY,
            tmp_path / "out",
            "F16",
            method="fp16",
            quantization_config={"llama_cpp_path": str(checkout)},
        )
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vocab_size": 4092}, r"^config\.json: vocab_size 4092, but the tokenizer has ids up to 4095$"),
        ({"intermediate_size": -1}, r"refuses this checkpoint: struct\.error: ."),
        ({"num_attention_heads": 7}, r"refuses this checkpoint: RuntimeError: .*\(conversion/\w+\.py:\d+: "),
        ({"layer_types": ["x"]}, r"refuses this checkpoint: StrictDataclass\w+: .*layer_type"),
    ],
)
def test_what_the_converter_stumbles_over_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    """B9, for a model type whose shapes nobody knows: converter's own words, no traceback, no log in a lost folder."""
    monkeypatch.setattr(shapes, "CONFORMING", frozenset())
    model = copy(making.TINY, tmp_path / "model")
    config = making.read_json(model / "config.json") | keys
    (model / "config.json").write_text(json.dumps(config))
    found = attempt(model, {"level": "F16"})
    assert isinstance(found, SourceError)
    assert re.search(message, found.message), found.message
    assert "\n" not in found.message + found.hint


def test_a_card_that_upstream_cannot_read_gives_what_can_be_read(tmp_path: Path) -> None:
    """B2: one impossible date ended the plan with the converter's words, which named no file."""
    model = copy(making.TINY, tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: mit\ndate: 2024-13-45\n---\n")
    made = plan(model)
    options = base_file.GgufOptions(pre_tokenizer="qwen2")
    keys = dry_run.rehearse(made.source, options, "f16").keys
    assert keys["general.license"] == "mit"


def test_a_full_disk_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T13: numpy's words for it have neither a number nor the reason."""

    def fail(*_words: object) -> None:
        raise OSError("1048576 requested and 429024 written")

    monkeypatch.setattr(convert, "_load", lambda _folder: (None, None))
    monkeypatch.setattr(convert, "_convert", fail)
    request = {"toolchain": str(tmp_path), "model": str(tmp_path), "output": "out/base.gguf"}
    with pytest.raises(DependencyError, match=r"cannot write out/base\.gguf: the disk is full"):
        convert.convert(request, lambda done, total: None)
