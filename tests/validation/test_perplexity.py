import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_gguf import write_gguf

from quantool.config.schema import Config, Corpus, Validation
from quantool.errors import ConfigError, QuantizationError
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Artifact, Finding, Gates, Report, Verdict
from quantool.runtime import process
from quantool.runtime.arithmetic import native
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve
from quantool.validation._findings.statistics import Tokens
from quantool.validation._score import score_llama_cpp

pytestmark = pytest.mark.e2e

CONTEXT = 64
MODELS = Path(__file__).parent.parent / "models"
TEXT = "".join(f"In line {number} the {number % 7}th word is {number * number}.\n" for number in range(60))
GATES = Gates(max_ln_ppl_ratio=0.01, max_mean_kld=0.01, min_same_top_p=0.95)
QUIET = Progress(quiet=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with one token a byte, whose tokenizer puts BOS first."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("random-llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(entries, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer: Any = PreTrainedTokenizerFast
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer(tokenizer_object=raw, **special).save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.12,
        bos_token_id=0,
        eos_token_id=1,
    )
    made: Any = LlamaForCausalLM
    made(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gguf(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(model, tmp_path_factory.mktemp("gguf") / "random-F16.gguf")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose reference the tests share, as artifacts of one run do."""
    return Workspace(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text(TEXT)
    return path


def case(model: Path, artifact: Path, text: Path, workspace: Workspace, **settings: Any) -> Case:
    validation = Validation(
        **{"corpora": (Corpus(name="lines", path=text),), "context": CONTEXT, "max_tokens": 1024, **settings}
    )
    config = Config(model_id=str(model), method="gguf", validation=validation, device="cpu")
    source = resolve(config, weights=True, progress=QUIET)
    engine = "transformers" if artifact.is_dir() else "llama.cpp"
    return Case(artifact, engine, f"t/{artifact.name}", source, config, GATES, workspace)


def judge(case: Case) -> dict[str, Finding]:
    return {finding.metric: finding for finding in find_check("perplexity").judge(case, QUIET)}


def failing(found: Mapping[str, Finding]) -> set[str]:
    return {metric for metric, finding in found.items() if finding.verdict.fails}


class Calls:
    """Runs workers in this process, which saves loading torch each time, and notes their names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, work: Work, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        self.names.append(work.__name__)
        answer: dict[str, Any] = json.loads(
            json.dumps(work(json.loads(json.dumps(request)), lambda *_: None))
        )
        return answer

    def since(self) -> list[str]:
        found, self.names = self.names, []
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(process, "call", found)
    return found


def test_a_faithful_gguf_passes(model: Path, gguf: Path, text: Path, shared: Workspace) -> None:
    found = judge(case(model, gguf, text, shared))
    untold = found.pop("conversion_kld")
    assert untold.verdict is Verdict.SKIPPED
    assert "--base" in untold.detail
    assert found.pop("arithmetic").measured == ("bfloat16" if "bfloat16" in native() else "float32")
    assert {finding.verdict for finding in found.values()} == {Verdict.PASS}
    assert float(found["mean_kld"].measured or 1) < 1e-3
    assert found["perplexity"].measured == pytest.approx(found["perplexity"].reference, rel=5e-3)
    assert all(finding.error is not None for finding in found.values())
    assert set(found) == {
        *("perplexity", "ln_ppl_ratio", "mean_kld", "same_top_p", "rms_dp"),
        *("kld_median", "kld_99", "kld_999", "kld_max"),
    }
    assert "lines" in found["mean_kld"].detail


def test_the_numbers_are_those_of_a_direct_computation(
    model: Path, gguf: Path, text: Path, shared: Workspace
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = judge(case(model, gguf, text, shared))
    ids = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    windows = torch.tensor(ids[:1024]).view(-1, CONTEXT)
    windows[:, 0] = 0
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        log_p = reference(windows).logits.log_softmax(-1)
    positions = slice(CONTEXT // 2, CONTEXT - 1)
    nll = -log_p[:, positions].gather(2, windows[:, CONTEXT // 2 + 1 :, None]).double()
    assert nll.numel() == 16 * 31
    # float32 stands nearer to llama.cpp than bfloat16 does.
    assert found["perplexity"].measured == pytest.approx(float(nll.mean().exp()), rel=1e-3)
    error = float(nll.std() / nll.numel() ** 0.5 * nll.mean().exp())
    assert found["perplexity"].error == pytest.approx(error, rel=1e-2)
    saved = Tokens.load(shared.work / "scores" / "t" / gguf.name / "lines.npz")
    assert np.allclose(saved.nll, nll.flatten(), atol=0.05)


def test_the_reference_is_computed_once(
    model: Path, gguf: Path, text: Path, tmp_path: Path, calls: Calls
) -> None:
    own = tmp_path / "lines.txt"
    shutil.copy(text, own)
    workspace = Workspace(tmp_path / "run")
    first = judge(case(model, gguf, own, workspace))
    assert calls.since() == ["tokenize", "capture", "score"]
    assert judge(case(model, gguf, own, workspace)) == first
    assert calls.since() == []
    second = tmp_path / "second.gguf"
    shutil.copy(gguf, second)
    judge(case(model, second, own, workspace))
    assert calls.since() == ["score"]
    own.write_text(TEXT.replace("word", "sound"))
    assert judge(case(model, gguf, own, workspace)) != first
    assert calls.since() == ["tokenize", "capture", "score"]
    other = Corpus(name="other", path=text)
    judge(case(model, gguf, own, workspace, corpora=(Corpus(name="lines", path=own), other)))
    assert calls.since() == ["tokenize", "capture", "score"]
    stored = workspace.work / "reference" / "other.hidden.npy"
    stored.write_bytes(stored.read_bytes()[:-1])
    judge(case(model, gguf, own, workspace, corpora=(other,)))
    assert calls.since() == ["capture"]


def test_permuted_k_rows_are_a_regression(tmp_path: Path, calls: Calls) -> None:
    chat = MODELS / "tiny-chat"
    held_out = MODELS / "text" / "heldout.en.txt"
    settings = {"context": 128, "max_tokens": 2048}
    workspace = Workspace(tmp_path / "run")
    sound = judge(case(chat, write_gguf(chat, tmp_path / "sound.gguf"), held_out, workspace, **settings))
    assert failing(sound) == set()
    assert float(sound["mean_kld"].measured or 1) < 1e-3
    wrong = write_gguf(chat, tmp_path / "wrong.gguf", permute_k=False)
    found = judge(case(chat, wrong, held_out, workspace, **settings))
    assert found["mean_kld"].verdict is Verdict.REGRESSION
    assert found["ln_ppl_ratio"].verdict is Verdict.REGRESSION


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut off", "llama.cpp cannot load it: .*(corrupted|not within the file bounds|failed)"),
        ("no gguf", "llama.cpp cannot load it: .*magic"),
        ("vocabulary", "its vocabulary has 200 entries, that of the reference 288"),
        ("overflow", "not finite"),
    ],
)
def test_what_cannot_be_scored_is_a_regression(
    model: Path,
    gguf: Path,
    text: Path,
    shared: Workspace,
    tmp_path: Path,
    calls: Calls,
    fault: str,
    words: str,
) -> None:
    bad = tmp_path / f"{fault.replace(' ', '-')}.gguf"
    if fault == "cut off":
        bad.write_bytes(gguf.read_bytes()[:-5000])
    elif fault == "no gguf":
        bad.write_bytes(b"what" * 100)
    elif fault == "vocabulary":
        write_gguf(model, bad, vocabulary=200)
    else:
        write_gguf(model, bad, ruined=True)
    finding, untold = find_check("perplexity").judge(case(model, bad, text, shared), QUIET)
    assert (untold.metric, untold.verdict) == ("conversion_kld", Verdict.SKIPPED)
    assert finding.verdict is Verdict.REGRESSION
    assert re.search(words, finding.detail), finding.detail


def test_padding_does_not_count(
    model: Path, text: Path, shared: Workspace, tmp_path: Path, calls: Calls
) -> None:
    # The tokenizer has 258 entries, the reference 288: without the last 20 nothing that is ever read is missing.
    short = write_gguf(model, tmp_path / "short.gguf", vocabulary=268)
    found = judge(case(model, short, text, shared))
    assert failing(found) == set()


def test_a_folder_is_scored_by_transformers(
    model: Path, text: Path, shared: Workspace, tmp_path: Path, calls: Calls
) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    found = judge(case(model, copy, text, shared))
    assert {finding.verdict for finding in found.values()} == {Verdict.PASS}
    assert found["mean_kld"].measured == pytest.approx(0, abs=1e-6)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert judge(case(model, copy, text, shared))["mean_kld"].verdict is Verdict.REGRESSION
    weights.pop("model.norm.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    (finding,) = find_check("perplexity").judge(case(model, copy, text, shared), QUIET)
    assert finding.verdict is Verdict.REGRESSION
    assert "lacks weights" in finding.detail


def test_texts_that_do_not_fit_are_refused(model: Path, gguf: Path, tmp_path: Path, calls: Calls) -> None:
    short = tmp_path / "short.txt"
    short.write_text("few words")
    with pytest.raises(ConfigError, match="'lines' has 10 tokens, less than one window of 64"):
        judge(case(model, gguf, short, Workspace(tmp_path / "run")))
    with pytest.raises(ConfigError, match=r"context is 512, but .* no more than 256"):
        judge(case(model, gguf, short, Workspace(tmp_path / "run"), context=512))
    with pytest.raises(ConfigError, match="artifact not found"):
        judge(
            case(
                model,
                tmp_path / "absent.gguf",
                tmp_path / "short.txt",
                Workspace(tmp_path / "run"),
                context=16,
                max_tokens=32,
            )
        )


def test_several_files_in_lockstep_score_as_one_by_one(
    model: Path, gguf: Path, text: Path, shared: Workspace, tmp_path: Path, calls: Calls
) -> None:
    judge(case(model, gguf, text, shared))
    alone = Tokens.load(shared.work / "scores" / "t" / gguf.name / "lines.npz")
    reference = shared.work / "reference"
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"x" * 100)
    short = write_gguf(model, tmp_path / "short.gguf", vocabulary=268)
    models = [broken, gguf, short]
    request = {
        "models": [str(path) for path in models],
        "outputs": [[str(tmp_path / f"{number}.npz")] for number in range(len(models))],
        "windows": [str(reference / "lines.windows.npy")],
        "hidden": [str(reference / "lines.hidden.npy")],
        "source": str(model),
        "head": {
            "weight": ["model.safetensors", "lm_head.weight"],
            "bias": None,
            "scale": 1.0,
            "softcap": None,
        },
        "tokens": 258,
        "context": CONTEXT,
        "gpu": False,
        "base": None,
    }
    answer = calls(score_llama_cpp.score, request)
    assert [failure is None for failure in answer["failures"]] == [False, True, True]
    assert np.array_equal(Tokens.load(tmp_path / "1.npz").kld, alone.kld)
    assert np.allclose(Tokens.load(tmp_path / "2.npz").kld, alone.kld, atol=1e-2)


def test_an_anomalous_report_fails() -> None:
    def report(*verdicts: Verdict) -> Verdict:
        findings = tuple(Finding(check="c", metric="m", verdict=verdict) for verdict in verdicts)
        artifact = Artifact(
            output="o",
            method="m",
            level="l",
            folder=Path(),
            files=(),
            bits_per_weight=16,
            seconds=0,
        )
        return Report(artifact=artifact, reference="r", findings=findings, seconds=0).verdict()

    assert report(Verdict.PASS, Verdict.ANOMALOUS) is Verdict.ANOMALOUS
    assert report(Verdict.REGRESSION, Verdict.ANOMALOUS) is Verdict.REGRESSION
    assert report(Verdict.PASS, Verdict.SKIPPED) is Verdict.PASS
    assert report() is Verdict.SKIPPED
    assert [verdict.value for verdict in Verdict if verdict.fails] == ["REGRESSION", "ANOMALOUS"]


def test_a_crash_is_a_regression_and_a_killed_worker_is_not(
    model: Path, gguf: Path, text: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(signal: str) -> None:
        def call(work: Work, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
            if work is score_llama_cpp.score:
                raise options["failure"](
                    f"{process.name_of(work)} ended by {signal} without a result", hint="GGML_ASSERT(x)"
                )
            return calls(work, request, **options)

        monkeypatch.setattr(process, "call", call)

    workspace = Workspace(tmp_path / "run")
    dying("SIGABRT (an assertion of llama.cpp)")
    finding, _ = find_check("perplexity").judge(case(model, gguf, text, workspace), QUIET)
    assert finding.verdict is Verdict.REGRESSION
    assert "GGML_ASSERT(x)" in finding.detail
    dying("SIGKILL (out of memory?)")
    with pytest.raises(QuantizationError, match="SIGKILL"):
        judge(case(model, gguf, text, Workspace(tmp_path / "other")))
