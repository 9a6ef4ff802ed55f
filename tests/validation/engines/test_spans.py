"""Windows in spans: nothing that is done is lost, several GPUs give what one gives, a full one takes smaller batches."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structures
import torch

from quantool.config.schema import Config, Corpus, Validation
from quantool.errors import DependencyError
from quantool.plugins.contract import Case
from quantool.records import Gates
from quantool.runtime import gpus, process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve
from quantool.texts.corpus import corpora
from quantool.validation import perplexity
from quantool.validation._engines import hidden_states, reference, spans
from quantool.validation._engines.memory import BatchSize
from quantool.validation._engines.spans import Span, divide, spans_of
from quantool.validation._score.score_files import own_file
from quantool.validation._score.scores import compute

MODELS = Path(__file__).parents[2] / "models"
CHAT, TEXTS = MODELS / "tiny-chat", MODELS / "text"
CONTEXT = 128
QUIET = Progress(quiet=True)


def test_spans_hold_all_windows_once() -> None:
    found = spans_of([40, 3, 0], 512)
    assert found == [Span(0, 0, 16), Span(0, 16, 32), Span(0, 32, 40), Span(1, 0, 3)]
    assert spans_of([2], 10_000) == [Span(0, 0, 1), Span(0, 1, 2)]


@pytest.mark.parametrize("hands", [1, 2, 3, 7])
def test_shares_are_like_and_in_order(hands: int) -> None:
    found = spans_of([200, 30], 512)
    shares = divide(found, hands)
    assert [span for share in shares for span in share] == found
    assert len(shares) == hands
    sizes = [sum(span.windows for span in share) for share in shares]
    assert max(sizes) - min(sizes) <= 2 * 16
    assert divide(found[:1], hands) == [found[:1]]


class Workers:
    """Runs workers in this process and notes what each was to do and on which GPU."""

    def __init__(self) -> None:
        self.spans: list[list[list[int]]] = []
        self.gpus: list[str | None] = []
        self._turn = threading.Lock()  # transformers loads one model at a time

    def __call__(self, work: Work, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        if "spans" in request:
            self.spans.append([*map(list, request["spans"])])
            self.gpus.append(options["variables"].get(gpus.VISIBLE))
        with self._turn:
            answer: dict[str, Any] = json.loads(
                json.dumps(work(json.loads(json.dumps(request)), lambda *_: None))
            )
        return answer


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    found = Workers()
    monkeypatch.setattr(process, "call", found)
    monkeypatch.setattr(spans, "SPAN_TOKENS", 4 * CONTEXT)
    return found


def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that torch cannot use: each stands for a process."""
    monkeypatch.setattr(gpus, "capabilities", lambda: [(9, 0)] * 2)


def case(root: Path, artifact: Path = CHAT, device: str = "auto") -> Case:
    held_out = (
        Corpus(name="en", path=TEXTS / "heldout.en.txt"),
        Corpus(name="other", path=TEXTS / "calibration.txt"),
    )
    validation = Validation(corpora=held_out, context=CONTEXT, max_tokens=10 * CONTEXT)
    config = Config(model_id=str(CHAT), method="awq", validation=validation, device=device)
    source = resolve(config, weights=True, progress=QUIET)
    return Case(artifact, "transformers", "t/copy", source, config, Gates(), Workspace(root))


def made(one: Case) -> tuple[reference.Reference, ...]:
    return reference.references(one, corpora(one.config), QUIET)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """What one process makes."""
    return states(made(case(tmp_path_factory.mktemp("whole"))))


def states(known: tuple[reference.Reference, ...]) -> list[torch.Tensor]:
    return [hidden_states.as_tensor(hidden_states.read_hidden(each.hidden)).float() for each in known]


def near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Equal but for the rounding of batches of other sizes."""
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(found, expected, strict=True))


@pytest.mark.e2e
def test_a_run_that_died_goes_on_behind_its_last_span(
    workers: Workers, whole: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU vanishes in the third of six spans."""
    original, saved = hidden_states.save_states, 0

    def vanishing(*args: Any) -> Any:
        nonlocal saved
        saved += 1
        if saved == 3:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return original(*args)

    monkeypatch.setattr(reference, "save_states", vanishing)
    with pytest.raises(RuntimeError, match="CUDA error") as raised:
        made(case(tmp_path))
    assert gpus.fault(raised.value) is not None
    assert gpus.fault(RuntimeError("size mismatch")) is None
    found = made(case(tmp_path))
    assert [len(asked) for asked in workers.spans] == [6, 4]
    assert workers.spans[1] == workers.spans[0][2:]
    assert near(states(found), whole)
    assert not list((tmp_path / ".quantool" / "work" / "reference").glob("*.parts"))
    assert made(case(tmp_path)) == found
    assert len(workers.spans) == 2


@pytest.mark.e2e
def test_parts_of_another_text_or_checkpoint_are_not_taken(workers: Workers, tmp_path: Path) -> None:
    one = case(tmp_path)
    made(one)
    (en, _) = made(one)
    other = Span(0, 0, 4).part(en.hidden, "another key")
    other.parent.mkdir()
    np.save(other, np.zeros((4, 3)))
    one.workspace.forget("reference/en")
    made(one)
    assert workers.spans[1] == [[0, 0, 4], [0, 4, 8], [0, 8, 10]]
    assert not other.exists()


@pytest.mark.e2e
def test_two_gpus_share_windows_and_give_what_one_gives(
    workers: Workers, whole: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference, and scores of the checkpoint itself, whose divergence is none."""
    two_gpus(monkeypatch)
    monkeypatch.setattr("quantool.runtime.parallel.children.prepare", lambda _: None)
    one = case(tmp_path)
    known = made(one)
    assert sorted(workers.gpus, key=str) == ["0", "1"]
    assert sorted(len(share) for share in workers.spans) == [3, 3]
    assert near(states(known), whole)
    findings = {
        finding.metric: finding for finding in perplexity.judge.judge(one, QUIET) if finding.corpus == "en"
    }
    assert sorted(workers.gpus[2:], key=str) == ["0", "1"]
    assert float(findings["mean_kld"].measured or 0) < 1e-5
    assert findings["perplexity"].measured == pytest.approx(findings["perplexity"].reference, rel=1e-5)
    file = own_file(one, known[0])
    assert file.file.is_file()
    assert not spans.folder_of(file.file).exists()


@pytest.mark.e2e
def test_scores_go_on_behind_the_last_span(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = case(tmp_path)
    (en, other) = made(one)
    workers.spans.clear()
    kept = own_file(one, en).part(Span(0, 4, 8))
    compute([one], (en, other), QUIET)
    expected = own_file(one, en).file.read_bytes()
    loaded = np.load(own_file(one, en).file)
    rows = slice(4 * (CONTEXT // 2 - 1), 8 * (CONTEXT // 2 - 1))
    kept.parent.mkdir()
    np.savez(kept, **{name: loaded[name][rows] for name in loaded.files})
    for name in ("en", "other"):
        one.workspace.forget(f"scores/t/copy/{name}")
    compute([one], (en, other), QUIET)
    assert [0, 4, 8] in workers.spans[0]
    assert [0, 4, 8] not in workers.spans[1]
    assert own_file(one, en).file.read_bytes() == expected


@pytest.mark.e2e
def test_an_artifact_whose_parts_are_all_there_is_put_together_beside_one_that_has_none(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed between the last part of the first and the first part of the second; with one GPU and with two."""
    one = case(tmp_path)
    two = replace(one, name="t/second")
    known = made(one)
    compute([one], known, QUIET)
    expected = {each.windows.corpus.name: own_file(one, each).file.read_bytes() for each in known}
    for hands in (1, 2):
        if hands == 2:
            two_gpus(monkeypatch)
            monkeypatch.setattr("quantool.runtime.parallel.children.prepare", lambda _: None)
        for each in known:
            file = own_file(one, each)
            loaded = np.load(file.file)
            for span in spans_of([each.windows.count], CONTEXT):
                part = file.part(span)
                part.parent.mkdir(exist_ok=True)
                rows = slice(*(number * (CONTEXT // 2 - 1) for number in (span.first, span.last)))
                np.savez(part, **{name: loaded[name][rows] for name in loaded.files})
            file.file.unlink()
            for name in (one.name, two.name):
                one.workspace.forget(f"scores/{name}/{each.windows.corpus.name}")
        compute([one, two], known, QUIET)
        assert {each.windows.corpus.name: own_file(one, each).file.read_bytes() for each in known} == expected
        assert all(own_file(two, each).file.is_file() for each in known)


def request(folder: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(3, 500, (8, 512)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    return {
        "folder": str(folder), "dtype": "bfloat16", "device": "cpu", "trust_remote_code": False,
        "windows": [str(tmp_path / "ids.npy")], "outputs": [str(tmp_path / "out.npy")],
    } | more  # fmt: skip


class FullGpu:
    """A GPU that has room for so many tokens at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.seen: list[int] = []
        from transformers import LlamaForCausalLM

        original = LlamaForCausalLM.forward

        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(kwargs["input_ids"].numel())
            if self.seen[-1] > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            return original(model, *args, **kwargs)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


@pytest.mark.e2e
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_full_gpu_gets_half_the_batch_and_says_so(
    by_layer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = structures.write_spm_llama(tmp_path / "model")
    asked = request(folder, tmp_path, by_layer=by_layer)
    expected = reference.capture(asked, lambda *_: None)
    roomy = np.load(tmp_path / "out.npy")
    gpu = FullGpu(monkeypatch, room=1024)
    found = reference.capture(asked, lambda *_: None)
    way = "layer by layer" if by_layer else "whole"
    assert expected["execution"] == way
    assert found["execution"] == (
        f"{way}, in batches of 1024 tokens instead of 2048: the GPU's memory was full"
    )
    assert set(gpu.seen) - {64, 512} == {1024, 2048}  # the trial of layers, the window that is verified
    as_float = [torch.from_numpy(states).view(torch.bfloat16).float() if states.dtype == np.uint16
                else torch.from_numpy(states) for states in (np.load(tmp_path / "out.npy"), roomy)]  # fmt: skip
    assert near(as_float[:1], as_float[1:])


@pytest.mark.e2e
def test_a_gpu_that_stays_full_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = structures.write_spm_llama(tmp_path / "model")
    gpu = FullGpu(monkeypatch, room=511)
    with pytest.raises(
        DependencyError, match=r"the GPU's memory is full: .*20 GiB \(batches of 512 tokens\)"
    ):
        reference.capture(request(folder, tmp_path, by_layer=False), lambda *_: None)
    assert gpu.seen == [512] * 3


def test_a_batch_of_one_window_is_not_halved() -> None:
    size = BatchSize()
    calls = []

    def work() -> None:
        calls.append(size.tokens)
        raise torch.OutOfMemoryError("full")

    with pytest.raises(DependencyError, match="full"):
        size.with_room(2048, work)
    assert calls == [2048]
