"""Tasks of lm-eval: a sound artifact passes, a broken one fails, and what lm-eval does not know is refused early."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conversations
import making
import pytest
import tampering

from quantool import pipeline
from quantool.config.schema import Config
from quantool.errors import ConfigError, DependencyError
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Artifact, Finding, Gates, Verdict
from quantool.run import judging
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.runtime.workspace import Workspace
from quantool.validation._cache.questions import load_engine
from quantool.validation._tasks import lm_eval_worker
from quantool.validation._tasks.lm_eval_adapter import SLICE, Adapter, adapted

pytestmark = pytest.mark.e2e

QUIET = Progress(quiet=True)
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TALK = list(dict(conversations.SMALL_TALK).items())[:20]


def write_tasks(folder: Path) -> Path:
    """Tasks on small talk that the tiny chat model knows: choose the answer, write it, read it; the first two as a group."""
    folder.mkdir(parents=True)
    answers = sorted({answer for _, answer in TALK})
    rows = []
    for number, (question, answer) in enumerate(TALK):
        place = answers.index(answer)
        choices = [answers[(place + step) % len(answers)] for step in (0, 3, 7, 11)]
        gold = number % 4
        choices[0], choices[gold] = choices[gold], choices[0]
        rows.append({"question": question, "answer": answer, "choices": choices, "gold": gold})
    data = folder / "talk.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": TURN.format("{{question}}"),
        "target_delimiter": "",
    }
    choose = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    say = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 40},
        "metric_list": [{"metric": "exact_match"}],
    }
    read = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    kinds: dict[str, dict[str, Any]] = {"choose": choose, "say": say, "read": read}
    for name, own in kinds.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**shared, **own, "task": name}))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("lm-eval") / "tasks")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tampering.convert(making.TINY, tmp_path_factory.mktemp("tiny") / "tiny-Q8_0.gguf", "q8_0")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("run"))


def config(folder: Path, **settings: Any) -> Config:
    section = {"tasks": ["choose", "say", "read"], "include_path": str(folder), "apply_chat_template": False}
    section |= settings
    return Config.model_validate(
        {
            "model_id": str(making.TINY),
            "method": "gguf",
            "quantization_config": making.QWEN2,
            "quant_level": "Q8_0",
            "device": "cpu",
            "dataset_cache_dir": str(folder.parent / "cache"),
            "output_path": str(folder.parent / "out"),
            "validation": {"lm_eval": section},
        }
    )


def case(artifact: Path, wanted: Config, workspace: Workspace) -> Case:
    engine = "transformers" if artifact.is_dir() else "llama.cpp"
    source = tampering.source_of(making.TINY)
    return Case(artifact, engine, f"t/{artifact.name}", source, wanted, Gates(), workspace)


def judge(one: Case) -> dict[str, Finding]:
    found = find_check("lm_eval").judge(one, QUIET)
    return {f"{finding.corpus}: {finding.metric}": finding for finding in found}


class Calls:
    """Runs workers in this process, which saves loading torch each time, and notes their engines."""

    def __init__(self) -> None:
        self.engines: list[str] = []

    def __call__(self, work: Work, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        self.engines.append(request["engine"])
        answer = work(json.loads(json.dumps(request)), lambda *_: None)
        found: dict[str, Any] = json.loads(json.dumps(answer))
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(process, "call", found)
    return found


def test_a_sound_level_passes_and_the_reference_is_asked_once(
    gguf: Path, tasks: Path, shared: Workspace, calls: Calls, tmp_path: Path
) -> None:
    found = judge(case(gguf, config(tasks), shared))
    assert set(found) == {"choose: acc", "say: exact_match", "read: word_perplexity"}
    assert {finding.verdict for finding in found.values()} == {Verdict.PASS}
    assert found["choose: acc"].reference == 1
    assert found["say: exact_match"].reference == 1
    assert found["choose: acc"].threshold == pytest.approx(0.98)
    assert f"on {len(TALK)} documents; 0 lost, 0 gained" in found["choose: acc"].detail
    read = found["read: word_perplexity"]
    assert read.measured == pytest.approx(read.reference, rel=0.05)
    assert read.error is not None
    assert "for the record" in read.detail
    assert calls.engines == ["transformers", "llama.cpp"]

    broken = Path(shutil.copy(gguf, tmp_path / "broken-Q8_0.gguf"))
    reverse_keys(broken)
    found = judge(case(broken, config(tasks), shared))
    assert found["choose: acc"].verdict is Verdict.REGRESSION
    assert found["say: exact_match"].verdict is Verdict.REGRESSION
    assert "McNemar's exact test" in found["say: exact_match"].detail
    assert "a loss beyond chance and beyond max_drop 0.02" in found["choose: acc"].detail
    assert calls.engines == ["transformers", "llama.cpp", "llama.cpp"]

    assert judge(case(broken, config(tasks, max_drop=1), shared))["choose: acc"].verdict is Verdict.PASS
    assert len(calls.engines) == 3  # what may be lost changes no answer


def test_an_instruct_model_is_asked_through_its_template(
    gguf: Path, tmp_path: Path, shared: Workspace, calls: Calls
) -> None:
    """The same questions without the turns in the task: the template writes them, examples are turns of their own."""
    folder = write_tasks(tmp_path / "bare" / "tasks")
    for name in ("choose", "say"):
        task = json.loads((folder / f"{name}.yaml").read_text()) | {
            "doc_to_text": "{{question}}",
            "num_fewshot": 1,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task | {"fewshot_split": "test"}))
    wanted = config(folder, tasks=["choose", "say"], apply_chat_template=None)
    found = judge(case(gguf, wanted, shared))
    assert {name: finding.reference for name, finding in found.items()} == {
        "choose: acc": 1,
        "say: exact_match": 1,
    }
    assert all("asked through the chat template" in finding.detail for finding in found.values())
    plain = judge(case(gguf, config(folder, tasks=["say"]), shared))["say: exact_match"]
    assert plain.reference is not None
    assert float(plain.reference) < 1  # the model knows the answers in its own form only


def test_a_task_that_a_model_judges_is_refused() -> None:
    assert lm_eval_worker.JUDGED.search("pisa_en_llm_judged")
    assert lm_eval_worker.JUDGED.search("llm-judge")
    assert not lm_eval_worker.JUDGED.search("bbh_zeroshot_causal_judgement")
    with pytest.raises(
        ConfigError, match="mine_llm_judged is not supported: another model judges its answers"
    ):
        lm_eval_worker.refuse_judged(SimpleNamespace(aggregation=lambda: {"acc": sum}), "mine_llm_judged")


def reverse_keys(path: Path) -> None:
    """Turn the rows of every K upside down."""
    from gguf import GGUFReader

    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name.endswith("attn_k.weight"):
            tensor.data[:] = tensor.data[::-1].copy()


def test_a_group_is_judged_by_all_its_documents_and_changed_data_is_asked_anew(
    tasks: Path, tmp_path: Path, calls: Calls
) -> None:
    """The artifact is the source itself: equal in every answer. With examples, and fewer documents."""
    own = write_tasks(tmp_path / "tasks")
    group = {"group": "talk", "task": ["choose", "say"], "num_fewshot": 2}
    (own / "talk.yaml").write_text(json.dumps(group))
    workspace = Workspace(tmp_path / "run")
    data = tmp_path / "data.jsonl"
    data.write_text((own / "talk.jsonl").read_text())
    for name in ("choose", "say"):
        text = (own / f"{name}.yaml").read_text().replace(str(own / "talk.jsonl"), str(data))
        (own / f"{name}.yaml").write_text(text)
    wanted = config(own, tasks=["talk"], limit=6)
    found = judge(case(making.TINY, wanted, workspace))
    assert {finding.verdict for finding in found.values()} == {Verdict.PASS}
    assert set(found) == {"talk: acc", "talk: exact_match"}
    assert "on 6 documents" in found["talk: acc"].detail
    assert calls.engines == ["transformers", "transformers"]
    data.write_text("".join(data.read_text().splitlines(keepends=True)[7:]))  # outside of include_path
    other = tmp_path / "other"
    shutil.copytree(making.TINY, other)
    assert {finding.verdict for finding in judge(case(other, wanted, workspace)).values()} == {Verdict.PASS}
    assert (
        len(calls.engines) == 5
    )  # the artifact on new data, so the reference anew; and the artifact beside it


def test_what_does_not_load_is_a_regression(
    tasks: Path, shared: Workspace, tmp_path: Path, calls: Calls
) -> None:
    bad = tmp_path / "bad-Q8_0.gguf"
    bad.write_bytes(b"what" * 100)
    (finding,) = judge(case(bad, config(tasks), shared)).values()
    assert finding.verdict is Verdict.REGRESSION
    assert "llama.cpp cannot load it" in finding.detail


def test_without_a_section_it_says_that_it_did_not_run(gguf: Path, shared: Workspace, calls: Calls) -> None:
    plain = Config.model_validate({"model_id": str(making.TINY), "method": "gguf"})
    (finding,) = find_check("lm_eval").judge(case(gguf, plain, shared), QUIET)
    assert finding.verdict is Verdict.SKIPPED
    assert finding.detail == "validation.lm_eval is not configured"
    assert calls.engines == []


# --- refused early


def test_a_plan_names_the_nearest_task_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    """In a child, as it is; the index of lm-eval's own tasks takes seconds."""
    own = write_tasks(tmp_path / "tasks")
    (own / "mine.yaml").write_text("task: mine\n  output_type: [")
    with pytest.raises(
        ConfigError, match=r"no task or group 'hellaswagg' \(did you mean hellaswag"
    ) as caught:
        pipeline.plan(config(own, tasks=["choose", "hellaswagg", "mine"]), QUIET)
    assert "'mine'" in caught.value.message
    assert "'choose'" not in caught.value.message
    assert f"{own / 'mine.yaml'} cannot be read" in caught.value.hint
    assert not (own.parent / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": 4}, "validation.lm_eval.limit is 4"),
        ({"include_path": "nowhere"}, "include_path is no folder: nowhere"),
    ],
)
def test_settings_that_cannot_be_used(tasks: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pipeline.plan(config(tasks, **settings), QUIET)


def test_lm_eval_is_missing(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, shared: Workspace, gguf: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DependencyError, match=r"validation\.lm_eval needs lm_eval") as caught:
        pipeline.plan(config(tasks), QUIET)
    assert caught.value.hint == "pip install 'quantool[lm-eval]'"
    wanted = config(tasks)
    settings = wanted.validation.model_copy(update={"checks": ("lm_eval",)})
    given = case(gguf, wanted.model_copy(update={"validation": settings}), shared)
    artifact = Artifact(
        output="t/BF16", method="t", level="BF16", folder=gguf.parent, files=(), bits_per_weight=16, seconds=0
    )
    with pytest.raises(DependencyError, match=r"validation\.lm_eval needs lm_eval"):
        judging.judge([given], [artifact], QUIET)


def test_a_section_whose_check_is_left_out_is_told(tasks: Path) -> None:
    wanted = config(tasks)
    settings = wanted.validation.model_copy(
        update={"checks": ("integrity",), "lm_eval": wanted.validation.lm_eval}
    )
    made = pipeline.plan(wanted.model_copy(update={"validation": settings}), QUIET)
    assert "validation.lm_eval has no effect: validation.checks leaves lm_eval out" in made.warnings


# --- the adapter, on the reference


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(making.TINY)


@pytest.fixture(scope="module")
def plain() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(making.TINY, dtype=torch.float32)


def adapter(tokenizer: Any, longest: int = 2048, engine: str = "transformers") -> Adapter:
    request = {"engine": engine, "model": str(making.TINY), "device": "cpu", "trust_remote_code": False}
    found: Adapter = adapted(tokenizer, partial(load_engine, request), longest, lambda *_: None)
    return found


def requests(*arguments: Sequence[Any]) -> list[Any]:
    return [SimpleNamespace(args=tuple(one)) for one in arguments]


def directly(plain: Any, prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
    """What transformers says in float32."""
    import torch

    with torch.no_grad():
        log_p = plain(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
    rows = log_p[len(prompt) - 1 : -1]
    targets = torch.tensor(continuation)
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


def test_log_probabilities_are_those_of_the_model(tokenizer: Any, plain: Any) -> None:
    question, answer = TURN.format("What is 7 plus 5?"), "7 plus 5 is 12."
    long = " ".join(["word"] * 300)
    model: Any = adapter(tokenizer, 128)
    found = model.loglikelihood(
        requests((question, answer), (question, "De res!"), ("", answer), (long, " word word")),
        disable_tqdm=True,
    )

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    end = tokenizer.eos_token_id  # this tokenizer has no BOS
    expected = [
        directly(plain, ids(question), ids(answer)),
        directly(plain, ids(question), ids("De res!")),
        directly(plain, [end], ids(answer)),
        directly(plain, ids(long + " word word")[-128:-2], ids(" word word")),
    ]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[0][1]
    for (measured, _), (value, _) in zip(found, expected, strict=True):
        assert measured == pytest.approx(value, rel=0.03, abs=0.05)  # the reference computes in bfloat16
    assert {what: count for what, count in model.notes.items() if count} == {
        "prompts cut on the left to 128 tokens": 1
    }


def test_a_text_is_read_in_windows_that_predict_each_token_once(tokenizer: Any, plain: Any) -> None:
    text = (making.TEXT / "heldout.en.txt").read_text()[:600]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(ids) > 100
    (whole,) = adapter(tokenizer).loglikelihood_rolling(requests((text,)))
    assert whole == pytest.approx(directly(plain, [tokenizer.eos_token_id], ids)[0], rel=0.01)
    (windowed, empty) = adapter(tokenizer, 64).loglikelihood_rolling(requests((text,), ("",)))
    assert empty == 0
    expected = directly(plain, [tokenizer.eos_token_id], ids[:63])[0]
    for start in range(63, len(ids), 63):
        end = min(start + 63, len(ids))
        expected += directly(plain, ids[end - 64 : start], ids[start:end])[0]
    assert windowed == pytest.approx(expected, rel=0.01)
    assert windowed != pytest.approx(whole, rel=1e-3)


def test_answers_end_at_the_texts_that_end_them(tokenizer: Any) -> None:
    question = TURN.format("Tell me a joke.")
    whole = dict(conversations.SMALL_TALK)["Tell me a joke."]
    settings: list[dict[str, Any]] = [
        {"until": ["?"], "max_gen_toks": 40},
        {"until": [], "max_gen_toks": 40},
        {"until": ["nothing like it"], "max_gen_toks": 4},
        {"until": ["\n"], "max_gen_toks": 40, "do_sample": True, "temperature": 1.0},
    ]
    model = adapter(tokenizer)
    found = model.generate_until(requests(*((question, one) for one in settings)))
    assert found[0] == whole.partition("?")[0]
    assert found[1] == found[3] == whole
    assert whole.startswith(found[2])
    assert 0 < len(found[2]) < len(whole)
    assert {what: count for what, count in model.notes.items() if count} == {
        "answers that the task wants drawn are greedy": 1
    }


def test_long_answers_go_on_where_they_were_looked_at(tokenizer: Any) -> None:
    """More than a slice; the same as in one piece, but for what rounding decides late."""
    text = (making.TEXT / "heldout.en.txt").read_text()[:200]
    (found,) = adapter(tokenizer).generate_until(requests((text, {"until": [], "max_gen_toks": SLICE + 16})))
    request = {
        "engine": "transformers",
        "model": str(making.TINY),
        "device": "cpu",
        "trust_remote_code": False,
    }
    with load_engine(request, 512) as engine:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        (answer,) = engine.generate([ids], SLICE + 16)
    expected = tokenizer.decode(answer.ids, skip_special_tokens=True)
    assert len(answer.ids) > SLICE or answer.ended is not None
    assert found[:100] == expected[:100]
