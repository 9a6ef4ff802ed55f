import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantool import pipeline
from quantool.card.card import front_matter, write_card
from quantool.config.schema import Config
from quantool.origins import Origin, Prepared
from quantool.records import FileRecord, Finding, ModelCard, Plan, Report, Verdict
from quantool.runtime.progress import Progress
from tests.checkpoint import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Card = Callable[..., str]


@pytest.fixture
def plan(tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan as a checkpoint of the Hub would have it, with figures in place."""
    monkeypatch.setattr("quantool.plan.make.refuse_unloadable", lambda *_: None)  # it has two tensors
    config = {
        "model_id": str(write_checkpoint(tmp_path / "tiny")),
        "method": "fake",
        "quant_level": ["Q8_0"],
        "repo_id": "us/tiny-GGUF",
        "output_path": tmp_path / "out",
    }
    made = pipeline.plan(Config.model_validate(config), Progress(quiet=True))
    card = ModelCard(
        license="apache-2.0",
        languages=("ca", "eu"),
        pipeline_tag="text-generation",
        tags=("safetensors", "iberian"),
    )
    source = made.source.model_copy(update={"model_id": "org/tiny", "commit": COMMIT, "card": card})
    return made.model_copy(update={"source": source})


def report(plan: Plan, *findings: Finding, **details: Any) -> Report:
    output = plan.outputs[0]
    return Report.model_validate(
        {
            "artifact": {
                "output": output.id, "method": "fake", "level": output.level, "folder": "out/tiny",
                "files": [FileRecord(name="tiny-Q8_0.gguf", bytes=2_500_000, sha256="ab" * 32)],
                "bits_per_weight": 8.5, "seconds": 1.0, "details": details,
            },
            "reference": "org/tiny", "findings": findings, "seconds": 1.0,
        }
    )  # fmt: skip


def figures(corpus: str) -> list[Finding]:
    return [
        Finding(check="perplexity", metric=metric, corpus=corpus, verdict=Verdict.PASS, measured=measured,
                reference=reference, error=error)
        for metric, measured, reference, error in (
            ("perplexity", 10.05, 10.0, None),
            ("ln_ppl_ratio", 0.004988, None, 0.0012),
            ("mean_kld", 0.0125, None, 0.0003),
            ("same_top_p", 0.9321, None, 0.002),
        )
    ]  # fmt: skip


def parts(text: str) -> tuple[dict[str, Any], str]:
    before, front, body = text.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front), body


def test_what_was_prepared_is_said_and_pinned(plan: Plan) -> None:
    """A checkpoint that was quantized, and an adapter from a place of its own."""
    origins = {
        name: Origin(model_id=f"org/{name}", commit=commit * 40, folder=Path("/secret"), files=())
        for name, commit in (("base-FP8", "a"), ("lora", "b"))
    }
    prepared = Prepared(
        origin=origins["base-FP8"], form="FP8 (fp8)", adapter=origins["lora"], merged="rank 4"
    )
    source = plan.source.model_copy(update={"prepared": prepared})
    config = plan.config | {"model_id": "org/base-FP8", "adapter": "org/lora"}
    text = write_card(
        plan.model_copy(update={"source": source, "config": config}), plan.outputs, [report(plan)]
    )
    assert text.count("quantized again from FP8 (fp8): the reference is the dequantized model") == 2
    merged = f"adapter org/lora@{'b' * 40} (rank 4) merged into org/base-FP8@{'a' * 40}"
    assert text.count(f"{merged}: the reference is the merged model") == 2
    assert f"revision: {'a' * 40}\n" in text
    assert f"adapter_revision: {'b' * 40}\n" in text
    assert "/secret" not in text


def test_front_matter_is_what_the_source_says(plan: Plan) -> None:
    front, _ = parts(write_card(plan, plan.outputs, [report(plan)]))
    assert front == {
        "base_model": "org/tiny",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["ca", "eu"],
        "pipeline_tag": "text-generation",
        "library_name": "gguf",
        "tags": ["iberian", "gguf", "quantized"],
        "quantized_by": "quantool",
    }


def test_front_matter_says_nothing_that_nobody_knows(plan: Plan) -> None:
    source = plan.source.model_copy(update={"commit": None, "card": ModelCard()})
    output = plan.outputs[0].model_copy(update={"engine": "transformers"})
    assert front_matter(source, [output]) == {
        "pipeline_tag": "text-generation", "library_name": "transformers", "tags": ["vllm", "quantized"],
        "quantized_by": "quantool",
    }  # fmt: skip


def test_other_licences_keep_name_and_link(plan: Plan) -> None:
    card = ModelCard(license="other", license_name="llama3", license_link="LICENSE")
    front = front_matter(plan.source.model_copy(update={"card": card}), plan.outputs)
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "llama3", "LICENSE")


def test_languages_that_yaml_takes_for_something_else(plan: Plan) -> None:
    """Norwegian is the classic: unquoted, ``no`` is false."""
    source = plan.source.model_copy(update={"card": ModelCard(languages=("no", "on", "es"))})
    front, _ = parts(write_card(plan.model_copy(update={"source": source}), plan.outputs, [report(plan)]))
    assert front["language"] == ["no", "on", "es"]


def test_figures_with_errors_for_every_corpus(plan: Plan) -> None:
    _, body = parts(write_card(plan, plan.outputs, [report(plan, *figures("en"), *figures("ca"))]))
    row = "| Q8_0 | {} | 10.050 | 10.000 | 0.0050 ± 0.0012 | 0.01250 ± 0.00030 | 93.21 ± 0.20 % |"
    assert [line for line in body.splitlines() if "0.0050 ±" in line] == [row.format("en"), row.format("ca")]
    assert "| Q8_0 | tiny-Q8_0.gguf | 2.5 MB | 8.50 | en | 10.050 | 10.000 | 0.01250 | 93.21 % |" in body
    assert "the worst corpus, the one with the largest mean KLD" in body


def test_a_newcomer_reads_which_file_first(plan: Plan) -> None:
    """What it is, which file, how to run it, the verdicts; everything else is folded."""

    def level(name: str, size: int, divergence: float, verdict: Verdict = Verdict.PASS) -> Report:
        findings = figures("en")
        findings[2] = findings[2].model_copy(update={"measured": divergence, "verdict": verdict})
        made = report(plan, *findings)
        file = FileRecord(name=f"tiny-{name}.gguf", bytes=size, sha256="ab" * 32)
        changes = {"level": name, "output": f"gguf/{name}", "files": (file,)}
        return made.model_copy(update={"artifact": made.artifact.model_copy(update=changes)})

    reports = [
        level("Q8_0", 8_000_000, 0.002), level("Q4_K_M", 5_000_000, 0.04), level("Q3_K_M", 4_000_000, 0.09),
        level("IQ2_M", 2_000_000, 0.01, Verdict.REGRESSION),
    ]  # fmt: skip
    _, body = parts(write_card(plan, plan.outputs, reports))
    open_text = re.sub(r"<details>.*?</details>", "", re.sub(r"<details>(?:(?!<details>|</details>).)*</details>", "", body,
                       flags=re.DOTALL), flags=re.DOTALL)  # fmt: skip
    heads = [line for line in open_text.splitlines() if line.startswith("#")]
    assert heads == ["# tiny-GGUF", "## Which file", "## How to run it", "## Verdicts"]
    assert "**Take `tiny-Q4_K_M.gguf`** (5.0 MB)" in open_text
    assert "llama-server -hf us/tiny-GGUF:Q4_K_M" in open_text
    assert "| **Q4_K_M** | `tiny-Q4_K_M.gguf` | 5.0 MB |" in open_text
    assert "`tiny-IQ2_M.gguf` (did not pass)" in open_text
    first_screen = body.splitlines()[:26]
    assert any("Take `tiny-Q4_K_M.gguf`" in line for line in first_screen)
    assert any(line.startswith("llama-server") for line in first_screen)


def test_a_single_artifact_is_named_as_one(plan: Plan) -> None:
    _, body = parts(write_card(plan, plan.outputs, [report(plan, *figures("en"))]))
    assert "A quantized version of " in body
    assert "It was compared with the bf16 reference on held-out text." in body
    assert "There is one: Q8_0, 2.5 MB. Its most likely next token is the original's at 93.21 %" in body


def test_only_versions_that_took_part_are_named(plan: Plan) -> None:
    versions = plan.versions | {"llmcompressor": "0.14.0.1", "compressed-tensors": "0.19", "lm_eval": "0.4",
                                "datasets": "5.2", "llama-cpp-python": "0.3.36", "gguf": "0.19"}  # fmt: skip
    changed = plan.model_copy(update={"versions": versions})
    text = write_card(changed, plan.outputs, [report(plan, *figures("en"))])
    assert "llama-cpp-python 0.3.36" in text
    for name in ("llmcompressor", "compressed-tensors", "lm_eval 0", "datasets 5"):
        assert name not in text
    compressed = [plan.outputs[0].model_copy(update={"engine": "transformers", "method": "fp8"})]
    text = write_card(changed, compressed, [report(plan, *figures("en"))])
    assert "llmcompressor 0.14.0.1, " in text
    assert "llmcompressor==0.14.0.1" in text
    assert "gguf 0" not in text
    assert "llama-cpp-python" not in text.partition("How it was made")[2]


def test_source_and_versions_are_named(plan: Plan) -> None:
    _, body = parts(write_card(plan, plan.outputs, [report(plan, base="f16", note="bf16 would overflow")]))
    assert f"[org/tiny](https://huggingface.co/org/tiny) at commit `{COMMIT}`" in body
    assert f"transformers {plan.versions['transformers']}" in body
    assert "- Q8_0: made from F16\n" in body
    assert "- bf16 would overflow\n" in body


def test_a_local_source_is_named_without_its_folder(plan: Plan, tmp_path: Path) -> None:
    source = plan.source.model_copy(update={"commit": None, "model_id": str(tmp_path / "tiny")})
    text = write_card(plan.model_copy(update={"source": source}), plan.outputs, [report(plan)])
    assert "**tiny**" in text
    assert str(tmp_path) not in text


def test_sampling_that_the_source_recommends(plan: Plan) -> None:
    assert "temperature 0.6 (generation_config.json" in write_card(plan, plan.outputs, [report(plan)])
    source = plan.source.model_copy(update={"generation": {"eos_token_id": 2}})
    assert "sampling" not in write_card(
        plan.model_copy(update={"source": source}), plan.outputs, [report(plan)]
    )


@pytest.mark.parametrize(
    ("method", "options", "tags"),
    [
        ("awq", {"format": "compressed-tensors"}, ["awq", "compressed-tensors", "vllm", "quantized"]),
        ("awq", {"format": "autoawq"}, ["awq", "vllm", "quantized"]),
        ("fp8", {}, ["fp8", "compressed-tensors", "vllm", "quantized"]),
        ("fp16", {"format": "safetensors"}, ["vllm", "quantized"]),
    ],
)
def test_tags_that_the_hub_and_vllm_look_for(
    plan: Plan, method: str, options: dict[str, str], tags: list[str]
) -> None:
    changed = {"method": method, "options": options, "engine": "transformers"}
    output = plan.outputs[0].model_copy(update=changed)
    assert front_matter(plan.source, [output])["tags"] == ["iberian", *tags]


def test_other_checks_and_what_was_left_out_with_the_reason(plan: Plan) -> None:
    found = [
        Finding(check="tokenizer", metric="ids", verdict=Verdict.SKIPPED, detail="no NFC\nnormalizer"),
        Finding(check="tokenizer", metric="specials", verdict=Verdict.PASS, detail="not worth a word"),
        Finding(check="chat_template", metric="text", verdict=Verdict.REGRESSION, detail="a | b"),
    ]
    _, body = parts(write_card(plan, plan.outputs, [report(plan, *found)]))
    assert "| tokenizer | Q8_0 | ids SKIPPED, specials PASS |" in body
    assert "- Q8_0, text: REGRESSION: a | b\n" in body
    left_out = body.partition("<summary>What was not checked (")[2]
    assert "- Q8_0: tokenizer, ids: no NFC normalizer\n" in left_out
    assert "not worth a word" not in body
    assert "- lm_eval did not run: validation.lm_eval is not set\n" in left_out
    assert "- perplexity did not run: " in left_out
    assert "- chat_template did not run" not in left_out
    assert "| Q8_0 | SKIPPED" not in body  # one finding of the tokenizer passed
    assert "| Q8_0 | PASS | - | REGRESSION |" in body


def test_a_check_that_nobody_has_thought_of(plan: Plan) -> None:
    found = [
        Finding(check="needle", metric="recall", corpus=f"{length} tokens", verdict=Verdict.PASS, measured=0.8,
                reference=0.9, error=0.05, threshold=0.7)
        for length in range(8)
    ]  # fmt: skip
    found.append(Finding(check="needle", metric="answers", verdict=Verdict.ANOMALOUS, detail="too good"))
    _, body = parts(write_card(plan, plan.outputs, [report(plan, *figures("en"), *found)]))
    assert "| needle | Q8_0 | 8 PASS, answers ANOMALOUS |" in body
    assert "| Q8_0 | needle | recall [3 tokens] | 0.80 ± 0.05 | 0.9 | 0.7 | PASS |" in body
    assert "- Q8_0, answers: ANOMALOUS: too good" in body


def test_further_figures_of_a_corpus_are_folded_away(plan: Plan) -> None:
    median = Finding(check="perplexity", metric="kld_median", corpus="en", verdict=Verdict.PASS, measured=3e-7,
                     error=4e-8)  # fmt: skip
    _, body = parts(write_card(plan, plan.outputs, [report(plan, *figures("en"), median)]))
    assert "| level | corpus | kld_median |\n|---|---|---|\n| Q8_0 | en | 3.0e-07 ± 4e-08 |" in body
    assert "kld_median PASS" not in body


def test_the_configuration_to_make_it_again(plan: Plan, tmp_path: Path) -> None:
    corpora = [{"name": "en", "path": str(tmp_path / "texts" / "en.txt")}]
    config = plan.config | {
        "dataset_path": str(tmp_path / "calibration.txt"),
        "validation": {"corpora": corpora},
    }
    output = plan.outputs[0].model_copy(update={"needs": ("base", "imatrix")})
    text = write_card(plan.model_copy(update={"config": config}), [output], [report(plan)])
    assert str(tmp_path) not in text
    again = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert again == {
        "model_id": "tiny", "method": "fake", "quant_level": ["Q8_0"], "revision": COMMIT,
        "dataset_path": "calibration.txt", "validation": {"corpora": [{"name": "en", "path": "en.txt"}]},
    }  # fmt: skip
    Config.model_validate(again)
    assert f"quantool=={plan.versions['quantool']}" in text
    assert "- calibration: `calibration.txt`, at most 512 documents, shuffled with seed 42\n" in text


def test_the_hub_reads_the_figures(plan: Plan, tmp_path: Path) -> None:
    """What huggingface_hub loads and writes again is the same; figures that are no numbers stay out."""
    from huggingface_hub import ModelCard as HubCard
    from huggingface_hub import metadata_load
    from huggingface_hub.repocard_data import eval_results_to_model_index

    nan = figures("eu")[3].model_copy(update={"measured": float("nan")})
    corpora = [{"name": "en", "dataset": "org/texts", "config": "english", "split": "test"}]
    changed = plan.model_copy(update={"config": plan.config | {"validation": {"corpora": corpora}}})
    text = write_card(changed, plan.outputs, [report(plan, *figures("en"), *figures("ca"), nan)])
    card = HubCard(text)
    data: Any = card.data
    assert (data.model_name, data.base_model, data.license) == ("tiny-GGUF", "org/tiny", "apache-2.0")
    found = [
        (r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value)
        for r in data.eval_results
    ]
    assert found == [
        ("org/texts", "english", "test", "mean_kld", 0.0125),
        ("org/texts", "english", "test", "same_top_p", 0.9321),
        ("all", None, None, "mean_kld", 0.0125),
    ]
    assert data.eval_results[0].metric_name.startswith("Q8_0: mean KL divergence")
    front = parts(text)[0]
    assert front["model-index"] == eval_results_to_model_index(data.model_name, data.eval_results)
    card.save(tmp_path / "README.md")
    assert metadata_load(tmp_path / "README.md") == front


def test_no_index_where_nothing_was_measured(plan: Plan) -> None:
    front, body = parts(write_card(plan, plan.outputs, [report(plan)]))
    assert "model-index" not in front
    assert "Figures by corpus" not in body


@pytest.mark.parametrize(("levels", "corpora"), [(1, 1), (5, 5), (12, 3), (31, 6)])
def test_the_front_matter_is_short_whatever_was_measured(plan: Plan, levels: int, corpora: int) -> None:
    """On 0.3.0 five levels on five corpora were 300 lines."""
    names = [f"corpus-{number}" for number in range(corpora)]
    every = []
    for number in range(levels):
        findings = [finding for name in names for finding in figures(name)]
        worst = 4 * (number % corpora) + 2  # another corpus is worst for each level
        findings[worst] = findings[worst].model_copy(update={"measured": 0.5})
        made = report(plan, *findings)
        every.append(
            made.model_copy(update={"artifact": made.artifact.model_copy(update={"level": f"L{number}"})})
        )
    languages = tuple(f"l{number}" for number in range(40))
    card = plan.source.card.model_copy(update={"languages": languages, "tags": languages})
    changed = plan.model_copy(update={"source": plan.source.model_copy(update={"card": card})})
    text = write_card(changed, plan.outputs, every)
    front, _ = parts(text)
    assert text.split("---\n")[1].count("\n") + 2 <= 60
    results = [
        metric
        for entry in front["model-index"]
        for result in entry["results"]
        for metric in result["metrics"]
    ]
    assert {metric["name"].partition(":")[0] for metric in results} == {
        f"L{number}" for number in range(levels)
    }


def test_plots_stand_where_they_are_looked_for(plan: Plan) -> None:
    both = ["plots/size-kld.png", "plots/corpora.png"]
    text = write_card(plan, plan.outputs, [report(plan, *figures("en"))], both)
    assert re.search(
        r"SHA256SUMS`; `quantool verify` checks a download\.\n\n!\[Size of each level[^]]*\]\(plots/size-kld\.png\)\n",
        text,
    )
    assert re.search(r"one standard error\.\n\n!\[Mean KL divergence[^]]*\]\(plots/corpora\.png\)\n", text)
    assert "![" not in write_card(plan, plan.outputs, [report(plan, *figures("en"))])


def test_no_heading_for_checks_without_findings(plan: Plan) -> None:
    assert "Other checks" not in write_card(plan, plan.outputs, [report(plan, *figures("en"))])


def test_a_comparison_is_claimed_only_where_it_was_measured(plan: Plan) -> None:
    measured = write_card(plan, plan.outputs, [report(plan, *figures("en"))] * 2)
    assert "Every file was compared with the bf16 reference" in measured
    unmeasured = write_card(plan, plan.outputs, [report(plan, *figures("en")), report(plan)])
    assert "Not every file was compared" in unmeasured
    assert "Every file" not in unmeasured


def test_what_the_experts_saw_is_said_once_for_the_levels_that_share_it(plan: Plan) -> None:
    seen = "8 experts in 2 layers saw 7 to 90 tokens; fewer than 32: 1 experts, blk.1 expert 3 (7)"
    found = Finding(check="experts", metric="expert_tokens", verdict=Verdict.PASS, measured=7.0, detail=seen)
    first = report(plan, found)
    second = first.model_copy(update={"artifact": first.artifact.model_copy(update={"level": "IQ2_XXS"})})
    text = write_card(plan, plan.outputs, [first, report(plan), second])
    assert text.count(f"- experts, {first.artifact.level}, IQ2_XXS: {seen}") == 1
    assert "- experts," not in write_card(plan, plan.outputs, [report(plan)])
