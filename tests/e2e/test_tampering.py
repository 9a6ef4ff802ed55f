"""An artifact that is wrong in one place fails the check that is there for it, by name; a sound one passes every time."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest
import tampering
from tampering import edited, fp8_of, spoilt, tampered

from quantool.config.schema import Config
from quantool.given_artifacts import artifact_of
from quantool.plugins.contract import Case
from quantool.records import Gates, Report, Source, Verdict
from quantool.run import judging
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve
from quantool.source.scan import scan_source
from tests.e2e.conftest import PATIENCE, quantool, write

pytestmark = pytest.mark.e2e

TEXT = making.TEXT / "heldout.en.txt"
GATES = {"max_ln_ppl_ratio": 0.05, "max_mean_kld": 0.05, "min_same_top_p": 0.9}
OTHERS = ["perplexity", "tokenizer", "stop_tokens", "integrity", "generation"]
LEVELS, TEXTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"), 5
"""Levels of the sound files and the number of texts that each is judged on: 20 runs."""
TEMPLATE = "tokenizer.chat_template"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LAYER = "model.layers.1.mlp.up_proj"
HEADS, HEAD = 2, 64
"""Key heads of tiny-chat and the rows of each."""


@dataclass(frozen=True)
class Made:
    """Sound artifacts of tiny-chat, not judged yet."""

    folder: Path
    base: Path

    def file(self, level: str) -> Path:
        """The file of a level."""
        return self.folder / f"tiny-5.2M-chat-{level}.gguf"


@cache
def _made() -> Made:
    wanted = making.config(
        making.TINY,
        making.room() / "tampering",
        LEVELS,
        quantization_config={"imatrix": True},
        dataset_path=making.CALIBRATION,
        calibration_config={"max_tokens": 2 * 512},
    )
    _, artifacts = making.make(wanted)
    return Made(artifacts[0].folder, next(wanted.output_path.glob(".quantool/work/base-*/base.gguf")))


@pytest.fixture(scope="module")
def made(cache: Path) -> Made:
    return _made()


@cache
def source(folder: Path) -> Source:
    """The record of a checkpoint whose weights have been read."""
    workspace = Workspace(making.room() / "judged" / folder.name)
    config = Config(model_id=str(folder), method="gguf", output_path=workspace.root)
    with workspace.lock():
        return scan_source(resolve(config, weights=True, progress=making.QUIET), workspace, making.QUIET)


def judged(
    artifacts: Mapping[str, Path], checks: list[str], reference: Path = making.TINY, **more: Any
) -> tuple[Report, ...]:
    """What the checks say of artifacts by level; what they share of a reference is computed once."""
    settings = {
        "max_tokens": 1024,
        "context": 128,
        "checks": checks,
        "corpora": [{"name": "docs", "path": str(TEXT)}],
    }
    workspace = Workspace(making.room() / "judged" / reference.name)
    config = Config.model_validate(
        {
            "model_id": str(reference),
            "method": "gguf",
            "output_path": workspace.root,
            "validation": settings | more,
        }
    )
    found = [artifact_of(path, level) for level, path in artifacts.items()]
    cases = [
        Case(path, engine, f"given/{path.name}", source(reference), config, Gates(**GATES), workspace)
        for path, (_, engine) in zip(artifacts.values(), found, strict=True)
    ]
    with workspace.lock():
        return judging.judge(cases, [artifact for artifact, _ in found], making.QUIET)


def failed(report: Report) -> set[tuple[str, str]]:
    """Check and metric of everything that must not be published."""
    return {(one.check, one.metric) for one in report.findings if one.verdict.fails}


def permute_k(made: Made, room: Path) -> Path:
    """Neighbours belong together in llama.cpp, what lies half a head apart in transformers."""

    def change(rows: Any) -> None:
        heads = np.array(rows).reshape(HEADS, HEAD // 2, 2, -1)
        rows[:] = heads.swapaxes(1, 2).reshape(rows.shape)

    return edited(made.file("Q8_0"), room / "permuted-Q8_0.gguf", "blk.1.attn_k.weight", change)


def shift_norms(made: Made, room: Path) -> Path:
    """What a converter does that adds 1 for an architecture that has it in its weights."""

    def change(weights: Any) -> None:
        weights += 1

    return edited(made.file("Q8_0"), room / "norms-Q8_0.gguf", "_norm.weight", change)


def double_scales(made: Made, room: Path) -> Path:
    def change(rows: Any) -> None:
        blocks = rows.reshape(-1, 34)  # ggml-common.h: block_q8_0
        blocks[:, :2] = (np.ascontiguousarray(blocks[:, :2]).view("<f2") * 2).view(np.uint8)

    return edited(made.file("Q8_0"), room / "scales-Q8_0.gguf", "blk.2.ffn_down.weight", change)


def other_tokenizer(made: Made, room: Path) -> Path:
    """As many tokens, and not the same ids."""
    keys = making.keys(made.file("Q8_0"))
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    plain = [number for number, kind in enumerate(types) if kind == 1]
    moved = random.Random(0).sample(plain, len(plain))
    mixed = list(tokens)
    for old, new in zip(plain, moved, strict=True):
        mixed[new] = tokens[old]
    return tampered(made.file("Q8_0"), room / "tokens-Q8_0.gguf", {"tokenizer.ggml.tokens": mixed})


def keyed(**change: Any) -> Callable[[Made, Path], Path]:
    """Another value of one key; dots are written as two underscores."""

    def spoil(made: Made, room: Path) -> Path:
        keys = {name.replace("__", "."): value for name, value in change.items()}
        return tampered(made.file("Q8_0"), room / "key-Q8_0.gguf", keys)

    return spoil


def templated(change: Callable[[str], str]) -> Callable[[Made, Path], Path]:
    """Another chat template."""

    def spoil(made: Made, room: Path) -> Path:
        template = change(making.keys(made.file("Q8_0"))[TEMPLATE])
        return tampered(made.file("Q8_0"), room / "template-Q8_0.gguf", {TEMPLATE: template})

    return spoil


def double_bos(_: Made, room: Path) -> Path:
    """A template that prints BOS once more than the source's."""
    original = tampering.gguf_of("spm_llama")
    template = "{{ bos_token }}" + making.keys(original)[TEMPLATE]
    return tampered(original, room / "bos-BF16.gguf", {TEMPLATE: template})


def rename(made: Made, room: Path) -> Path:
    return Path(shutil.copyfile(made.file("Q8_0"), room / "toy-Q4_K_M.gguf"))


def other_matrix(made: Made, room: Path) -> Path:
    """Made with the matrix of a model of two layers as wide as these: llama.cpp takes it without a word."""
    from gguf import GGUFReader, GGUFWriter

    path, output = room / "other-imatrix.gguf", room / "matrix-Q4_K_M.gguf"
    writer = GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", ["other.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    for tensor in GGUFReader(made.base).tensors:
        if tensor.name.startswith(("blk.0.", "blk.1.")) and len(tensor.shape) == 2:
            writer.add_tensor(f"{tensor.name}.in_sum2", np.ones((1, int(tensor.shape[0])), np.float32))
            writer.add_tensor(f"{tensor.name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    making.quantized(made.base, [making.run("Q4_K_M", output, path, "other.txt")])
    return output


def as_it_is(made: Made, _: Path) -> Path:
    return made.file("Q8_0")


@cache
def noisy() -> Path:
    """Another commit of the checkpoint: weights that are a little worse."""
    import torch

    def change(tensors: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, weight in tensors.items():
            if weight.dim() == 2 and ".layers." in name:
                noise = torch.randn(weight.shape, generator=generator) * weight.float().std() * 0.6
                tensors[name] = (weight.float() + noise).to(weight.dtype)

    return spoilt(making.TINY, making.room() / "noisy", tensors=change)


def with_folder(
    tensors: Callable[[dict[str, Any]], None] | None = None,
    settings: Callable[[dict[str, Any]], None] | None = None,
) -> Callable[[Made, Path], Path]:
    """A damaged copy of the FP8 folder of the llama structure."""

    def spoil(_: Made, room: Path) -> Path:
        return spoilt(fp8_of("spm_llama")[0], room / "toy-FP8-dynamic", tensors, settings)

    return spoil


def unquantize(tensors: dict[str, Any]) -> None:
    import torch

    weight, scale = tensors[f"{LAYER}.weight"].float(), tensors.pop(f"{LAYER}.weight_scale").float()
    tensors[f"{LAYER}.weight"] = (weight * scale).to(torch.bfloat16)


def nan_scale(tensors: dict[str, Any]) -> None:
    tensors[f"{LAYER}.weight_scale"][7] = float("nan")


def drift(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"] = ["model.lm_head"]


@dataclass(frozen=True)
class Fault:
    """What is wrong, which check finds it and under what name, and what must stay healthy."""

    name: str
    spoil: Callable[[Made, Path], Path]
    check: str
    metric: str
    level: str = "Q8_0"
    model: str = ""
    """A structure in the place of tiny-chat."""
    reference: Callable[[], Path] = field(default=lambda: making.TINY)


FAULTS = (
    Fault("K rows permuted", permute_k, "perplexity", "mean_kld"),
    Fault("norm weights off by 1", shift_norms, "perplexity", "mean_kld"),
    Fault("one layer's scales doubled", double_scales, "perplexity", "mean_kld"),
    Fault("another model's tokenizer", other_tokenizer, "tokenizer", "probe_ids"),
    Fault("pre-tokenizer changed", keyed(tokenizer__ggml__pre="gpt-2"), "tokenizer", "probe_ids"),
    Fault("BOS doubled", double_bos, "chat_template", "bos_count", "BF16", model="spm_llama"),
    Fault("EOS wrong", keyed(tokenizer__ggml__eos_token_id=5), "stop_tokens", "eos"),
    Fault("plain ChatML", templated(lambda _: CHATML), "chat_template", "template_text"),
    Fault("trailing newline", templated(lambda text: text + "\n"), "chat_template", "template_text"),
    Fault("unparsable", templated(lambda text: text + "{% if %}"), "chat_template", "rendered_text"),
    Fault("level renamed", rename, "integrity", "file_type", "Q4_K_M"),
    Fault("imatrix of another model", other_matrix, "integrity", "imatrix", "Q4_K_M"),
    Fault("reference from another commit", as_it_is, "integrity", "source_commit", reference=noisy),
    Fault("better than its reference", as_it_is, "perplexity", "ln_ppl_ratio", reference=noisy),
    Fault(
        "a layer left as it was", with_folder(unquantize), "integrity", "layers", "FP8_DYNAMIC", "spm_llama"
    ),
    Fault("a scale is NaN", with_folder(nan_scale), "integrity", "scales", "FP8_DYNAMIC", "spm_llama"),
    Fault("ignore drifted", with_folder(None, drift), "integrity", "ignore", "FP8_DYNAMIC", "spm_llama"),
)


def healthy(made: Made, room: Path) -> dict[str, Report]:
    """The sound files judged on ``TEXTS`` texts, each by itself."""
    words = TEXT.read_text(encoding="utf-8")
    step = len(words) // TEXTS
    corpora = []
    for number in range(TEXTS):
        path = room / f"{number}.txt"
        path.write_text(words[number * step : (number + 1) * step], encoding="utf-8")
        corpora.append({"name": f"text{number}", "path": str(path)})
    files = {level: made.file(level) for level in LEVELS}
    found = judged(files, OTHERS, corpora=corpora, max_tokens=512, context=64)
    return dict(zip(LEVELS, found, strict=True))


@dataclass(frozen=True)
class Judged:
    """Every fault's report by its name, and those of the sound files by level."""

    faults: dict[str, Future[Report]]
    sound: Future[dict[str, Report]]


@pytest.fixture(scope="module")
def reports(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    """All that is judged here, in two lanes; a workspace belongs to one of them."""

    def faulty(fault: Fault, room: Path) -> Report:
        reference = tampering.folder_of(fault.model) if fault.model else fault.reference()
        (report,) = judged({fault.level: fault.spoil(made, room)}, [fault.check], reference)
        return report

    lanes = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
    started = {}
    for number, fault in enumerate(FAULTS):
        elsewhere = bool(fault.model) or fault.reference is noisy
        room = tmp_path_factory.mktemp(f"fault-{number}")
        started[fault.name] = lanes[elsewhere].submit(faulty, fault, room)
    yield Judged(started, lanes[0].submit(healthy, made, tmp_path_factory.mktemp("healthy")))
    for lane in lanes:
        lane.shutdown(cancel_futures=True)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(reports: Judged, fault: Fault) -> None:
    report = reports.faults[fault.name].result()
    assert (fault.check, fault.metric) in failed(report)
    verdict = Verdict.ANOMALOUS if fault.name.startswith("better") else Verdict.REGRESSION
    assert verdict in {one.verdict for one in report.findings if one.metric == fault.metric}


@pytest.mark.parametrize("level", LEVELS)
def test_sound_file_passes_on_every_text(reports: Judged, level: str) -> None:
    """20 of 20 with all levels: chance must not fail a sound file, and neither may its other checks."""
    report = reports.sound.result()[level]
    assert failed(report) == set()
    passed = {one.corpus for one in report.findings if one.metric == "mean_kld" and one.verdict == "PASS"}
    assert {f"text{number}" for number in range(TEXTS)} <= passed
    assert {one.check for one in report.findings} == set(OTHERS)
    skipped = {one.metric for one in report.findings if one.verdict == Verdict.SKIPPED}
    assert not skipped & {"imatrix", "source_commit", "hf_resolver", "scales", "tensor_types"}


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[..., tuple[int, set[str]]]:
    """Run `quantool validate`; its exit code and the metrics that failed."""
    folder = tmp_path_factory.mktemp("validated")
    settings = {
        "model_id": "anything",
        "method": "gguf",
        "quant_level": "Q8_0",
        "validation": {
            "max_tokens": 1024,
            "context": 128,
            "corpora": [{"name": "docs", "path": str(TEXT)}],
            "gates": {"*": GATES},
        },
    }
    file = write(folder, "judging", **settings)

    def validate(artifact: Path, *words: str) -> tuple[int, set[str]]:
        child = quantool(
            "validate", str(artifact), "--reference", str(making.TINY), "--config", str(file),
            "--output", str(folder / "out"), "--json", *words, cache=cache,
        )  # fmt: skip
        out, err = child.communicate(timeout=PATIENCE)
        assert child.returncode in (0, 5), err
        findings = json.loads(out)["findings"]
        return child.returncode, {
            finding["metric"] for finding in findings if finding["verdict"] in ("REGRESSION", "ANOMALOUS")
        }

    return validate


def test_command_passes_a_sound_file(validated: Callable[..., tuple[int, set[str]]], made: Made) -> None:
    checks = json.dumps([check for check in OTHERS if check != "perplexity"])
    assert validated(made.file("Q8_0"), "--set", f"validation.checks={checks}") == (0, set())


def test_command_fails_with_what_a_check_finds(
    validated: Callable[..., tuple[int, set[str]]], made: Made, tmp_path: Path
) -> None:
    code, found = validated(rename(made, tmp_path), "--set", 'validation.checks=["integrity"]')
    assert code == 5
    assert found == {"file_type", "bits_per_weight", "tensor_types"}
