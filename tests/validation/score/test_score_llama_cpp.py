"""Several artifacts at once, and the base that they are made from."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest
from llama_gguf import write_gguf

from quantool.config.schema import Config, Corpus, Validation
from quantool.errors import ConfigError
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Finding, Gates, Verdict
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve
from quantool.validation._engines.head import Head, HeadPlan
from quantool.validation._engines.hidden_states import as_tensor, read_hidden
from quantool.validation._engines.windows import scored
from quantool.validation._findings.statistics import Tokens, summarize
from quantool.validation._score import score_llama_cpp

pytestmark = pytest.mark.e2e

MODELS = Path(__file__).parents[2] / "models"
CHAT = MODELS / "tiny-chat"
TEXT = MODELS / "text" / "heldout.en.txt"
CONTEXT = 128
GATES = Gates(max_ln_ppl_ratio=0.02, max_mean_kld=0.01, min_same_top_p=0.9)
QUIET = Progress(quiet=True)
CHECK = find_check("perplexity")


class Calls:
    """Runs workers in this process and notes how many models each was given; one of them may crash."""

    def __init__(self) -> None:
        self.models: list[int] = []
        self.crashing = ""

    def __call__(self, work: Work, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        if work is score_llama_cpp.score:
            paths = [*request["models"], *([request["base"]["path"]] if request["base"] else [])]
            self.models.append(len(request["models"]))
            if self.crashing and any(self.crashing in path for path in paths):
                raise options["failure"](
                    f"{process.name_of(work)} ended by SIGABRT without a result", hint="GGML_ASSERT(y)"
                )
        answer: dict[str, Any] = json.loads(
            json.dumps(work(json.loads(json.dumps(request)), lambda *_: None))
        )
        return answer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(process, "call", found)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a level, a level and a base with K rows permuted, a base that is not one."""
    folder = tmp_path_factory.mktemp("files")
    write_gguf(CHAT, folder / "base.gguf", file_type=1)
    write_gguf(CHAT, folder / "level.gguf", file_type=7)
    write_gguf(CHAT, folder / "bad-level.gguf", file_type=7, permute_k=False)
    write_gguf(CHAT, folder / "bad-base.gguf", file_type=1, permute_k=False)
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("run"))


def case(path: Path, workspace: Workspace, base: Path | None = None) -> Case:
    validation = Validation(corpora=(Corpus(name="en", path=TEXT),), context=CONTEXT, max_tokens=1536)
    config = Config(model_id=str(CHAT), method="gguf", validation=validation, device="cpu")
    source = resolve(config, weights=True, progress=QUIET)
    return Case(path, "llama.cpp", f"t/{path.stem}", source, config, GATES, workspace, base=base)


def judged(one: Case) -> dict[str, Finding]:
    return {finding.metric: finding for finding in CHECK.judge(one, QUIET)}


def prepare(*cases: Case) -> None:
    assert CHECK.prepare is not None
    CHECK.prepare(cases, QUIET)


def test_all_levels_are_scored_by_one_worker_and_judging_recalls(
    files: Path, workspace: Workspace, calls: Calls
) -> None:
    base = files / "base.gguf"
    sound, broken = (case(files / f"{name}.gguf", workspace, base) for name in ("level", "bad-level"))
    prepare(sound, broken)
    assert calls.models == [2]
    good, bad = judged(sound), judged(broken)
    prepare(sound, broken)
    assert calls.models == [2]
    assert not any(finding.verdict.fails for finding in good.values())
    assert good["conversion_kld"].threshold == 0.002
    assert float(good["conversion_kld"].measured or 1) < 0.001
    assert good["quantization_kld"].measured == pytest.approx(0, abs=1e-6)  # the same weights
    assert bad["mean_kld"].verdict is Verdict.REGRESSION
    assert re.search(r"conversion is sound \(KLD .*quantization of this level broke", bad["mean_kld"].detail)
    assert bad["conversion_kld"].verdict is Verdict.PASS
    assert float(bad["quantization_kld"].measured or 0) > 0.1
    assert "blame" not in good["mean_kld"].detail
    assert "broke" not in good["mean_kld"].detail
    # Alone it scores the same, and its base is not computed for nothing.
    other = Workspace(workspace.root.parent / "alone")
    shutil.copytree(workspace.work / "reference", other.work / "reference")
    assert judged(case(files / "bad-level.gguf", other))["mean_kld"].measured == bad["mean_kld"].measured
    assert calls.models == [2, 1]


def test_a_broken_base_is_blamed(files: Path, workspace: Workspace, calls: Calls) -> None:
    found = judged(case(files / "bad-level.gguf", workspace, files / "bad-base.gguf"))
    assert found["conversion_kld"].verdict is Verdict.REGRESSION
    assert "itself is off (KLD" in found["mean_kld"].detail
    assert "the conversion broke" in found["mean_kld"].detail
    assert found["quantization_kld"].measured == pytest.approx(0, abs=1e-6)  # the same weights


def test_an_unquantized_artifact_has_no_base(files: Path, workspace: Workspace, calls: Calls) -> None:
    found = judged(case(files / "base.gguf", workspace, files / "base.gguf"))
    assert found["quantization_kld"].verdict is Verdict.SKIPPED
    assert "F16, not quantized" in found["quantization_kld"].detail
    assert "conversion_kld" not in found


def test_a_quantized_base_is_refused(files: Path, workspace: Workspace, calls: Calls) -> None:
    shutil.copy(files / "level.gguf", files / "another.gguf")
    with pytest.raises(ConfigError, match=r"base .*level.gguf is quantized \(general.file_type 7\)"):
        judged(case(files / "another.gguf", workspace, files / "level.gguf"))


@pytest.mark.parametrize("crashing", ["bad-level", "base"])
def test_after_a_crash_only_the_bad_file_is_named(
    files: Path, workspace: Workspace, tmp_path: Path, calls: Calls, crashing: str
) -> None:
    own = Workspace(tmp_path / "run")
    shutil.copytree(workspace.work / "reference", own.work / "reference")
    base = tmp_path / "base.gguf"
    shutil.copy(files / "base.gguf", base)
    calls.crashing = f"{crashing}.gguf"
    cases = [case(files / f"{name}.gguf", own, base) for name in ("level", "bad-level")]
    prepare(*cases)
    assert calls.models == [2, 1, 1, 0]
    good, bad = map(judged, cases)
    assert calls.models == [2, 1, 1, 0]
    assert not good["mean_kld"].verdict.fails
    if crashing == "base":
        assert "crashes on it" in good["conversion_kld"].detail
        assert "cannot be scored either: the conversion broke" in bad["mean_kld"].detail
    else:
        assert set(bad) == {"perplexity", "conversion_kld"}
        assert "GGML_ASSERT(y)" in bad["perplexity"].detail
        assert "the conversion is sound" in bad["perplexity"].detail


def test_models_go_together_as_far_as_memory_reaches(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [files / f"{name}.gguf" for name in ("level", "bad-level", "bad-base")]
    members = [score_llama_cpp._Member(path, [], []) for path in paths]
    size = (files / "level.gguf").stat().st_size

    def sizes(memory: float, base: Path | None = None) -> list[int]:
        monkeypatch.setattr(
            score_llama_cpp, "available", lambda **_: memory * size / score_llama_cpp.WEIGHTS_SHARE
        )
        held = score_llama_cpp._Member(base, [], []) if base else None
        return [len(group) for group in score_llama_cpp.grouped(members, held, gpu=False)]

    assert sizes(10) == [3]
    assert sizes(2.5) == [2, 1]
    assert sizes(2.5, files / "base.gguf") == [1, 1, 1]
    assert sizes(0.1) == [1, 1, 1]
    monkeypatch.undo()
    assert score_llama_cpp.available(gpu=False) > 1 << 28


def test_blocks_that_do_not_fit_give_the_same_numbers(
    files: Path, workspace: Workspace, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = files / "base.gguf"
    whole = judged(case(files / "bad-level.gguf", workspace, base))
    for name in ("BLOCK_BYTES", "BASE_BYTES"):
        monkeypatch.setattr(score_llama_cpp, name, 1)
    monkeypatch.setattr("quantool.validation._engines.llama_cpp.OUTPUT_BYTES", 4 * 8192 * 20)
    own = Workspace(tmp_path / "run")
    shutil.copytree(workspace.work / "reference", own.work / "reference")
    pieces = judged(case(files / "bad-level.gguf", own, base))
    for metric in ("perplexity", "mean_kld", "same_top_p", "kld_99"):
        assert pieces[metric].measured == pytest.approx(whole[metric].measured, rel=0.02)
    assert float(pieces["quantization_kld"].measured or 0) > 0.1


def test_of_a_long_window_less_is_held_at_once() -> None:
    """A vocabulary of 4,096: all of 4,096 tokens is held, of 32,768 a part, for its cache is eight times as large."""
    held = {context: 4 * 4096 * len(scored(context)) for context in (512, 4096, 16384, 32768)}
    fits = {context: size <= score_llama_cpp.block_bytes(context) for context, size in held.items()}
    assert fits == {512: True, 4096: True, 16384: False, 32768: False}
    assert score_llama_cpp.block_bytes(512) == score_llama_cpp.BLOCK_BYTES


@pytest.fixture(scope="module")
def level() -> Path:
    """The trained model at Q4_K_M, with its tokenizer."""
    made = making.made("tiny-chat")
    return made.folder / made.artifacts[0].files[0].name


@pytest.mark.upstream
def test_the_numbers_are_those_of_llama_perplexity(
    level: Path, workspace: Workspace, tmp_path: Path, calls: Calls
) -> None:
    """Its base file is written from our reference: same ids, same log-probabilities (in its 16 bits, from -16 on)."""
    binary = making.upstream("llama-perplexity")
    judged(case(level, workspace))
    ours = summarize(Tokens.load(workspace.work / "scores" / "t" / level.stem / "en.npz"))
    write_base_file(workspace.work / "reference", tmp_path / "base.kld")
    command = [
        binary,
        "-m",
        level,
        "-c",
        CONTEXT,
        "--kl-divergence",
        "--kl-divergence-base",
        tmp_path / "base.kld",
    ]
    expected = {
        "Mean PPL(Q) ": ours.perplexity,
        "Mean PPL(base) ": ours.perplexity_reference,
        "Mean ln(PPL(Q)/PPL(base))": ours.ln_ppl_ratio,
        "Mean    KLD": ours.mean_kld,
        "Median  KLD": ours.kld_median,
        "99.0%   KLD": ours.kld_99,
        "99.9%   KLD": ours.kld_999,
        "Maximum KLD": ours.kld_max,
    }
    shares = {"RMS Δp": ours.rms_dp, "Same top p": ours.same_top_p}
    printed = statistics_of([str(part) for part in command], [*expected, *shares])
    for name, estimate in expected.items():
        value, error = printed[name]
        # Six digits after the point are all that it prints.
        assert estimate.value == pytest.approx(value, rel=1e-3, abs=1e-6), name
        if error is not None:
            assert estimate.error == pytest.approx(error, rel=1e-2, abs=1e-6), name
    for name, estimate in shares.items():
        assert 100 * estimate.value == pytest.approx(printed[name][0], rel=1e-3, abs=1e-3), name


def statistics_of(command: list[str], names: Sequence[str]) -> dict[str, tuple[float, float | None]]:
    """What llama-perplexity prints under each of ``names``: value, and error where it has one.

    A thread of its own writes its log, and now and then loses lines at the end of the process; then it is run again.
    """
    said = ""
    for _ in range(4):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=process.environment())
        said = f"{done.stdout}\n{done.stderr}"
        found = {
            name: re.search(re.escape(name) + r"\s*:\s*([-\d.]+)\b(?:\s*±\s+([\d.]+))?", said)
            for name in names
        }
        if all(found.values()):
            return {
                name: (float(one[1]), float(one[2]) if one[2] else None) for name, one in found.items() if one
            }
    raise AssertionError(said[-3000:])


def write_base_file(reference: Path, target: Path) -> None:
    """llama-perplexity's base file (perplexity.cpp, ``log_softmax`` with uint16_t) of the reference's log-probabilities."""
    ids = np.load(reference / "en.windows.npy")
    plan = HeadPlan(("model.safetensors", head_name()), None, 1.0, None)
    head = Head(CHAT, plan)
    odd = head.rows % 2
    with target.open("wb") as file:
        file.write(b"_logits_")
        file.write(np.array([CONTEXT, head.rows, len(ids)], np.int32).tobytes())
        file.write(ids.tobytes())
        for states in read_hidden(reference / "en.hidden.npy"):
            log_p = head.log_probs(as_tensor(states)).numpy()
            for row in log_p:
                low = max(row.min(), row.max() - 16)
                scale = np.float32((row.max() - low) / 65535)
                file.write(np.array([scale, low], np.float32).tobytes())
                steps = np.rint(np.maximum(row - low, 0) / scale).astype(np.uint16)
                file.write(steps.tobytes() + b"\0\0" * odd)


def head_name() -> str:
    tied = json.loads((CHAT / "config.json").read_text())["tie_word_embeddings"]
    return "model.embed_tokens.weight" if tied else "lm_head.weight"
