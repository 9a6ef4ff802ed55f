"""Memory by level and context: the sum is llama.cpp's own."""

from __future__ import annotations

import re
import subprocess
import sys

import making
import pytest

from quantool.card.memory_table import (
    GIB,
    contexts,
    memory,
    memory_tables,
    needed,
    which_file,
    your_memory,
)
from quantool.config.schema import Config
from quantool.footprint import cache_bytes, compute_bytes
from quantool.records import Artifact, FileRecord, Finding, ModelFacts, Report, Verdict
from quantool.runtime import process
from quantool.source.resolve import resolve


@pytest.fixture(scope="module")
def large() -> ModelFacts:
    """A model of 7 B parameters with grouped queries."""
    changes = {"layers": 32, "kv_heads": 8, "head_size": 128, "context": 131072, "vocabulary": 128256}
    tiny = resolve(Config(model_id=str(making.TINY), method="gguf"), weights=False, progress=making.QUIET)
    return tiny.facts.model_copy(update=changes)


def report(level: str, gib: float, kld: float | None = None) -> Report:
    """An artifact of so many GiB; with ``kld`` it was judged and passed."""
    file = FileRecord(name=f"m-{level}.gguf", bytes=int(gib * GIB), sha256="ab" * 32)
    findings = [] if kld is None else [
        Finding(check="perplexity", metric="mean_kld", corpus="en", verdict=Verdict.PASS, measured=kld, error=kld / 50)
    ]  # fmt: skip
    artifact = Artifact.model_validate(
        {"output": f"gguf/{level}", "method": "gguf", "level": level, "folder": "out", "files": [file],
         "bits_per_weight": 8.0, "seconds": 1.0}
    )  # fmt: skip
    return Report(artifact=artifact, reference="bf16", findings=tuple(findings), seconds=1.0)


LOAD = """
import sys, llama_cpp
kind = getattr(llama_cpp, f"GGML_TYPE_{sys.argv[3].upper()}")
llama_cpp.Llama(sys.argv[1], n_ctx=int(sys.argv[2]), type_k=kind, type_v=kind, flash_attn=True, verbose=True)
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "context", "kind"),
    [("tiny-chat", 2048, "f16"), ("tiny-chat", 32768, "q8_0"), ("moe", 2048, "f16")],
)
def test_cache_and_computing_take_what_llama_cpp_says(name: str, context: int, kind: str) -> None:
    with making.own_cache():
        one = making.made(name)
    facts = one.plan.source.facts
    assert facts.sliding_window is None
    file = one.folder / one.artifacts[0].files[0].name
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(file), str(context), kind],
        capture_output=True,
        text=True,
        check=True,
        env=process.environment(),
    )
    (printed,) = re.findall(r"KV buffer size = +([\d.]+) MiB", done.stderr)
    assert float(printed) == pytest.approx(cache_bytes(facts, context, kind) / (1 << 20), abs=0.005)
    if name == "moe":  # its small vocabulary takes less than its experts, which are not counted
        return
    (printed,) = re.findall(r"compute buffer size = +([\d.]+) MiB", done.stderr)
    assert float(printed) <= compute_bytes(facts, context) / (1 << 20) <= 3 * float(printed)


def test_weights_cache_and_scores_are_added(large: ModelFacts) -> None:
    cache = 2 * 32 * 8 * 128 * 2 * 8192
    assert cache == GIB
    computing = 4 * 512 * (128256 + 2 * large.hidden) + 2 * 512 * 8192
    assert needed(report("Q4_K_M", 4), large, 8192) == 4 * GIB + cache + computing
    assert needed(report("Q4_K_M", 4), large, 8192, "q8_0") == 4 * GIB + cache * 17 // 32 + computing


def test_the_models_own_context_is_the_last(large: ModelFacts) -> None:
    assert contexts(large) == [4096, 8192, 16384, 32768, 65536, 131072]
    assert contexts(large.model_copy(update={"context": 40960})) == [4096, 8192, 16384, 32768, 40960]
    assert contexts(large.model_copy(update={"context": 2048})) == [2048]


def test_the_largest_level_that_fits(large: ModelFacts) -> None:
    facts = large.model_copy(update={"context": 16384})
    lines = memory_tables(facts, [report("Q8_0", 7.4), report("Q4_K_M", 4.0)]).splitlines()
    assert "| Q4_K_M | 4.0 GiB | 4.8 GiB | 5.3 GiB | 6.3 GiB |" in lines
    start = lines.index("| memory | 4,096 tokens | 8,192 tokens | 16,384 tokens |")
    assert lines[start + 2 : start + 6] == [
        "| 6 GiB | Q4_K_M | Q4_K_M | - |",
        "| 8 GiB | Q4_K_M | Q4_K_M | Q4_K_M |",
        "| 12 GiB | Q8_0 | Q8_0 | Q8_0 |",
        "",
    ]


def test_one_level_needs_no_choice(large: ModelFacts) -> None:
    text = memory_tables(large, [report("Q8_0", 7.4)])
    assert "largest level" not in text
    assert "131,072 bytes of attention cache for each token" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1, "1 MiB"),
        (3 << 20, "3 MiB"),
        (GIB - 1, "1024 MiB"),
        (GIB, "1.0 GiB"),
        (GIB + 1, "1.1 GiB"),
        (15 * GIB, "15.0 GiB"),
    ],
)
def test_memory_is_rounded_up(size: int, text: str) -> None:
    assert memory(size) == text


def test_which_file_says_what_each_needs(large: ModelFacts) -> None:
    lines = which_file(large, [report("Q4_K_M", 4.0), report("Q8_0", 7.4)]).splitlines()
    assert "| level | file | size | memory at 8,192 tokens | memory at 131,072 tokens | same top-p |" in lines
    rows = [line for line in lines if line.startswith("| Q")]
    assert [row.split(" | ")[0] for row in rows] == ["| Q8_0", "| Q4_K_M"]
    assert "5.3 GiB | 20.4 GiB | - |" in rows[1]
    assert "Take" not in "".join(lines)  # nothing was judged


def test_one_file_that_was_not_judged_is_not_praised(large: ModelFacts) -> None:
    assert which_file(large, [report("Q8_0", 7.4)]).startswith("There is one, which did not pass: Q8_0, ")


def test_a_sliding_window_is_told(large: ModelFacts) -> None:
    assert "sliding window" not in memory_tables(large, [report("Q8_0", 7.4)])
    text = memory_tables(large.model_copy(update={"sliding_window": 4096}), [report("Q8_0", 7.4)])
    assert "Layers with a sliding window of 4,096 tokens need less cache" in text


def test_your_memory_names_the_closest_file_that_fits(large: ModelFacts) -> None:
    """7 B with 1 GiB of cache at 8k, 4 GiB at 32k; rows end where the closest file fits everywhere."""
    reports = [report("Q8_0", 7.4, 0.001), report("Q4_K_M", 4.0, 0.03), report("Q3_K_M", 3.3, 0.09)]
    *rows, _, explanation = your_memory(large, reports).splitlines()
    assert rows == [
        "| your memory | 8,192 tokens, cache f16 | 8,192 tokens, cache q8_0 | 32,768 tokens, cache f16 | 32,768 tokens, cache q8_0 |",
        "|---|---|---|---|---|",
        "| 8 GB | `m-Q4_K_M.gguf` | `m-Q4_K_M.gguf` | - | `m-Q4_K_M.gguf` |",
        "| 12 GB | `m-Q8_0.gguf` | `m-Q8_0.gguf` | `m-Q4_K_M.gguf` | `m-Q8_0.gguf` |",
        "| 16 GB | `m-Q8_0.gguf` | `m-Q8_0.gguf` | `m-Q8_0.gguf` | `m-Q8_0.gguf` |",
    ]
    assert "284 MiB to compute in, and 512 MiB left to the driver" in explanation
    assert "`--cache-type-k q8_0 --cache-type-v q8_0`" in explanation


def test_a_fitted_file_that_is_closer_is_taken_before_a_larger_one(large: ModelFacts) -> None:
    reports = [report("Q8_0", 7.4, 0.001), report("Q4_K_M", 4.0, 0.03), report("Q4_K_M-fit", 3.9, 0.02)]
    assert "| 8 GB | `m-Q4_K_M-fit.gguf` |" in your_memory(large, reports)


def test_files_that_did_not_pass_answer_nothing(large: ModelFacts) -> None:
    assert your_memory(large, [report("Q8_0", 7.4)]) == ""
    text = your_memory(large, [report("Q8_0", 7.4), report("Q4_K_M", 4.0, 0.03)])
    assert "Q8_0.gguf" not in text
    assert "| 8 GB | `m-Q4_K_M.gguf` |" in text


def test_only_what_applies_to_the_models_size(large: ModelFacts) -> None:
    tiny = large.model_copy(update={"layers": 4, "vocabulary": 4096, "context": 2048})
    assert your_memory(tiny, [report("Q8_0", 0.01, 0.001), report("Q4_K_M", 0.005, 0.03)]) == (
        "A memory of 8 GB holds `m-Q8_0.gguf`, the file closest to the original, with 2,048 tokens of context.\n"
    )
    rows = your_memory(large, [report("Q8_0", 430, 0.001), report("Q4_K_M", 60, 0.03)]).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:-2]] == ["| 80 GB", "| 160 GB", "| 320 GB", "| 640 GB"]
    assert your_memory(large, [report("Q8_0", 2000, 0.001)]) == "None fits 640 GB with 32,768 tokens.\n"
