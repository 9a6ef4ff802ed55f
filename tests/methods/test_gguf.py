"""The method gguf: what is planned is what is made, what is written says where it comes from, options are checked."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import making
import pytest

from quantool import __version__, pipeline
from quantool.errors import ConfigError
from quantool.formats.safetensors_layout import write_skeleton
from quantool.methods._llama_cpp import base_file, quantize
from quantool.methods.gguf import Options
from quantool.records import Plan
from quantool.runtime import process, toolchain
from quantool.runtime.worker import Work
from quantool.source.resolve import resolve
from quantool.source.tensor_headers import headers

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def _cache() -> Iterator[None]:
    with making.own_cache():
        yield


def plan(
    levels: str | list[str], model: Path = making.TINY, output: Path | None = None, **options: Any
) -> Plan:
    keys = options.pop("keys", {})
    wanted = making.config(
        model, output or making.room() / "never-written", levels, quantization_config=options, **keys
    )
    return pipeline.plan(wanted, making.QUIET)


def sizes(made: Plan) -> dict[str, int]:
    return {output.level: sum(file.bytes for file in output.files) for output in made.outputs}


def test_plan_has_the_bytes_of_every_level() -> None:
    plain, _ = making.every_level()
    planned = sizes(plan([*plain], making.model(making.SMALL)))
    assert planned == {level: path.stat().st_size for level, path in plain.items()}


def test_plan_has_the_bytes_of_every_level_with_matrix() -> None:
    _, weighed = making.every_level()
    one = making.made(making.SMALL)
    planned = sizes(plan([*weighed], one.checkpoint, imatrix=str(one.matrix)))
    assert planned == {level: path.stat().st_size for level, path in weighed.items()}
    assert planned["Q8_0"] > making.every_level()[0]["Q8_0"].stat().st_size  # the keys of the matrix


@pytest.mark.parametrize("name", ["tiny-chat", "moe"])
def test_plan_has_the_bytes_with_a_matrix_to_come(name: str) -> None:
    one = making.made(name)
    output, artifact = one.plan.outputs[0], one.artifacts[0]
    assert [(file.name, file.bytes) for file in output.files] == [
        (file.name, (artifact.folder / file.name).stat().st_size) for file in artifact.files
    ]
    assert artifact.bits_per_weight == output.bits_per_weight


def test_plan_counts_the_bits_of_a_weight() -> None:
    from gguf import GGUFReader

    planned = {
        one.level: one.bits_per_weight for one in plan(["Q8_0", "Q2_K"], making.model(making.SMALL)).outputs
    }
    for level, bits in planned.items():
        tensors = GGUFReader(making.every_level()[0][level]).tensors
        total = 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
        assert bits == pytest.approx(total)


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """tiny-chat whose weights are a hole: a header that promises data, and zeros."""
    folder = tmp_path / "tiny-chat"
    shutil.copytree(making.TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    source = resolve(making.config(making.TINY, tmp_path, "Q8_0"), weights=False, progress=making.QUIET)
    write_skeleton(headers(source), folder)
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 100_000
    return folder


def test_plan_reads_no_weights_and_writes_nothing(skeleton: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in skeleton.rglob("*")}
    made = plan(["Q8_0", "Q4_K_M"], skeleton, output)
    assert sizes(made) == sizes(plan(["Q8_0", "Q4_K_M"]))
    assert not output.exists()
    assert {path: path.stat().st_mtime_ns for path in skeleton.rglob("*")} == before
    started = time.monotonic()
    assert plan(["Q8_0", "Q4_K_M"], skeleton, output).outputs == made.outputs
    print(f"second plan: {time.monotonic() - started:.2f} s")


def test_second_plan_starts_no_worker(
    skeleton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan("Q8_0", skeleton)

    def none(*_: object, **__: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(process, "call", none)
    assert plan("Q8_0", skeleton).outputs == made.outputs


@pytest.mark.parametrize("kept", [True, False])
def test_a_level_over_the_limit_is_split_as_planned(tmp_path: Path, kept: bool) -> None:
    from gguf import GGUFReader

    options = {"max_shard_size": "3M", "keep_split": kept}
    made, artifacts = making.make(
        making.config(making.TINY, tmp_path / "out", ["Q8_0", "COPY", "Q2_K"], quantization_config=options)
    )
    names = []
    for output, artifact in zip(made.outputs, artifacts, strict=True):
        assert [(file.name, file.bytes) for file in output.files] == [
            (file.name, (artifact.folder / file.name).stat().st_size) for file in artifact.files
        ]
        names.append([file.name for file in artifact.files])
    if kept:
        assert names[0] == [f"tiny-5.2M-chat-Q8_0-{n:05d}-of-00004.gguf" for n in range(1, 5)]
    else:
        assert names == [
            [f"tiny-5.2M-chat-Q8_0-{n:05d}-of-00002.gguf" for n in (1, 2)],
            [f"tiny-5.2M-chat-COPY-{n:05d}-of-00004.gguf" for n in range(1, 5)],
            ["tiny-5.2M-chat-Q2_K.gguf"],
        ]
        largest = max(file.bytes for output in made.outputs for file in output.files[1:])
        (stage,) = [stage for stage in made.stages if stage.name == "gguf/split"]
        assert stage.writes >= largest
        assert (
            sum(step.writes for step in made.stages)
            >= sum(file.bytes for output in made.outputs for file in output.files) + stage.writes
        )
    left = {path.name for path in (tmp_path / "out" / ".quantool" / "work").iterdir()}
    assert not [name for name in left if name.startswith("split-")]
    whole = making.run("Q8_0", tmp_path / "whole.gguf")
    making.quantized(making.made("tiny-chat").base, [whole])
    expected = {t.name: t.data.tobytes() for t in GGUFReader(tmp_path / "whole.gguf").tensors}
    found = {
        t.name: t.data.tobytes() for name in names[0] for t in GGUFReader(artifacts[0].folder / name).tensors
    }
    assert found == expected
    request = {"path": str(artifacts[0].folder / names[0][0]), "vocabulary_only": False}
    assert process.call(quantize.probe, request, log=tmp_path / "log")["tokens"] == 4096
    (artifacts[0].folder / names[0][1]).unlink()  # a missing shard is told, not passed over
    with pytest.raises(Exception, match="cannot load"):
        process.call(quantize.probe, request, log=tmp_path / "log")


def test_a_split_that_was_interrupted_is_not_quantized_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = making.config(
        making.TINY, tmp_path / "out", "Q8_0", quantization_config={"max_shard_size": "3M"}
    )
    call, asked = process.call, []

    def killed(work: Work, *words: Any, **keys: Any) -> dict[str, Any]:
        asked.append(work.__name__)
        if asked.count("split") == 1 and asked[-1] == "split":
            raise KeyboardInterrupt
        return call(work, *words, **keys)

    monkeypatch.setattr(process, "call", killed)
    with pytest.raises(KeyboardInterrupt):
        making.make(wanted)
    assert not list((tmp_path / "out" / "tiny-chat-GGUF").glob("*Q8_0*"))
    asked[:] = ["split"]
    made, (artifact,) = making.make(wanted)
    assert asked.count("split") == 2
    assert "quantize" not in asked
    assert [file.bytes for file in artifact.files] == [file.bytes for file in made.outputs[0].files]


def test_the_limit_is_there_without_being_asked_for() -> None:
    assert Options.model_validate({}).split_bytes() == 45 * 10**9
    made = plan("Q8_0")
    assert [len(output.files) for output in made.outputs] == [1]
    assert "gguf/split" not in {stage.name for stage in made.stages}


def test_a_small_base_does_not_depend_on_the_limit(tmp_path: Path) -> None:
    """What is no larger than a part is not made again for another limit."""
    source = resolve(making.config(making.TINY, tmp_path, "Q8_0"), weights=False, progress=making.QUIET)
    keys = [
        base_file.base_key(source, Options.model_validate({"max_shard_size": size}), "f16")
        for size in ("45G", "1G", "3M", "4M")
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_an_export_over_the_limit_is_split(tmp_path: Path) -> None:
    keys = {"method": "fp16", "quantization_config": {"max_shard_size": "3M"}}
    made, (artifact,) = making.make(making.config(making.TINY, tmp_path / "out", "F16", **keys))
    assert len(artifact.files) == 4
    assert [file.bytes for file in artifact.files] == [file.bytes for file in made.outputs[0].files]
    request = {"path": str(artifact.folder / artifact.files[0].name), "vocabulary_only": False}
    assert process.call(quantize.probe, request, log=tmp_path / "log")["tokens"] == 4096


def test_metadata_says_what_it_is_and_how_to_sample() -> None:
    one = making.made("tiny-chat")
    found = making.keys(one.folder / one.artifacts[0].files[0].name)
    generation = making.read_json(making.TINY / "generation_config.json")
    expected = {
        "general.name": "tiny-chat",
        "general.quantized_by": f"quantool {__version__}",
        "general.license": "apache-2.0",
        "general.languages": ["en", "es", "ca", "eu", "gl"],
        "general.file_type": 15,  # LLAMA_FTYPE_MOSTLY_Q4_K_M
        "general.sampling.temp": pytest.approx(generation["temperature"]),
        "general.sampling.top_k": generation["top_k"],
        "general.sampling.top_p": pytest.approx(generation["top_p"]),
        "tokenizer.chat_template": (making.TINY / "chat_template.jinja").read_text(encoding="utf-8"),
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": generation["eos_token_id"][0],
        "quantool.version": __version__,
        "quantool.llama_cpp.commit": toolchain.locate().commit,
        "quantize.imatrix.file": one.matrix.name,
        "quantize.imatrix.dataset": "calibration.txt",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert not [key for key in found if key.startswith("general.source")]  # a local folder has no repository


def test_plans_of_one_model_may_be_made_at_the_same_time(skeleton: Path) -> None:
    """Two runs share the user cache, and neither may see what the other is still writing."""
    (skeleton / "README.md").write_text("---\nlicense: mit\n---\n")  # nobody has rehearsed this one
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: plan("Q8_0", skeleton).outputs, range(2))
    assert first == second


def test_every_option_is_described() -> None:
    assert all(field.description for field in Options.model_fields.values())


def test_levels_that_need_a_matrix_are_refused_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plan([*toolchain.levels()], making.model(making.SMALL))
    named = caught.value.message.partition(" cannot be made")[0].split(", ")
    assert sorted(named) == sorted(making.NEEDS_MATRIX)
    assert "imatrix: true" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"tensor_types": {"ffn_down": "q6k"}}, "unknown ggml type 'q6k'", "q6_k"),
        ({"output_tensor_type": "Q5"}, "unknown ggml type 'Q5'", "q5_"),
        ({"token_embedding_type": "bf61"}, "unknown ggml type 'bf61'", "bf16"),
        ({"tensor_types": {"ffn_down(": "q6_k"}}, r"'ffn_down\(' is no regular expression", ""),
        ({"tensor_types": {"fnn_down.weight": "q6_k"}}, "'fnn_down.weight' matches no tensor", "ffn_down.weight"),
        ({"imatrix": "no/such/file.gguf"}, "no/such/file.gguf does not exist", ""),
        ({"imatrix": str(making.CALIBRATION)}, "calibration.txt is not an importance matrix", "llama-imatrix"),
        ({"imatrix": True}, "needs calibration text", "dataset_path"),
        ({"max_shard_size": "2MB"}, "'2MB' is not a number with K, M or G", ""),
        ({"max_shard_size": "0G"}, "'0G' is not a number", ""),
    ],
)  # fmt: skip
def test_wrong_option_is_refused_in_the_plan(options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan("Q4_K_M", **options)
    assert hint in caught.value.hint


def test_model_as_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"base\.gguf is not an importance matrix"):
        plan("Q4_K_M", imatrix=str(making.made("tiny-chat").base))


@pytest.mark.parametrize("other", ["moe", making.SMALL])
def test_matrix_of_another_model_is_refused(other: str) -> None:
    with pytest.raises(ConfigError, match="is of another model: it has"):
        plan("Q4_K_M", imatrix=str(making.made(other).matrix))


def test_alias_is_told() -> None:
    assert "level Q4_K is llama.cpp's alias for Q4_K_M" in plan("Q4_K").warnings


def test_unwritable_output_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        blocked = Path("/proc/quantool")  # not even root may
    else:
        blocked = tmp_path / "closed" / "out"
        blocked.parent.mkdir(mode=0o500)
    with pytest.raises(Exception, match="cannot write to"):
        pipeline.run(making.config(making.TINY, blocked, "Q8_0"), making.QUIET)
