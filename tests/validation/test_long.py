"""Long windows with each type of attention cache: what it costs is told from nothing, and damage at a distance is found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import induction
import long_context
import making
import numpy as np
import pytest
import tampering

from quantool.config.schema import Config
from quantool.errors import ConfigError
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Finding, Gates, Verdict
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve
from quantool.validation._score.long_windows import by_position

QUIET = Progress(quiet=True)
LENGTH = 3072


class Calls:
    """Runs workers in this process, which saves loading torch each time, and notes their requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def __call__(self, work: Work, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        given = json.loads(json.dumps(request))
        self.requests.append(given)
        found: dict[str, Any] = json.loads(json.dumps(work(given, lambda *_: None)))
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(process, "call", found)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_context.write_long(tmp_path_factory.mktemp("long") / "model")


@pytest.fixture(scope="module")
def gguf(model: Path) -> Path:
    return tampering.convert(model, model.parent / "long-F16.gguf", "f16")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("run"))


def config(folder: Path, text: Path, **settings: Any) -> Config:
    chosen = {"lengths": [LENGTH], "needle": False} | settings
    validation = {"corpora": [{"name": "text", "path": str(text)}], "long": chosen}
    return Config.model_validate(
        {"model_id": str(folder), "method": "gguf", "device": "cpu", "validation": validation}
    )


def case(artifact: Path, wanted: Config, workspace: Workspace) -> Case:
    source = resolve(wanted, weights=True, progress=QUIET)
    engine = "transformers" if artifact.is_dir() else "llama.cpp"
    return Case(artifact, engine, f"t/{artifact.stem}", source, wanted, Gates(max_mean_kld=0.01), workspace)


def judge(chosen: Case) -> dict[str, Finding]:
    return {found.metric: found for found in find_check("long").judge(chosen, QUIET)}


def text() -> Path:
    return making.TEXT / "calibration.txt"


@pytest.mark.e2e
def test_a_cache_is_told_from_another_and_broken_rotary_scaling_is_found(
    model: Path, gguf: Path, shared: Workspace, calls: Calls, tmp_path: Path
) -> None:
    found = judge(case(gguf, config(model, text(), max_cache_kld=0.001), shared))
    assert [*found] == [f"kld_{LENGTH}", f"kld_{LENGTH}_q8_0", f"kld_{LENGTH}_q4_0"]
    plain, light, heavy = found.values()
    assert plain.verdict == Verdict.PASS
    assert plain.corpus == "text"
    assert f"positions {LENGTH // 2} to" in plain.detail
    assert isinstance(plain.measured, float)
    assert plain.measured < 0.001
    assert heavy.verdict == Verdict.REGRESSION  # beyond 0.001 by more than two standard errors
    figures = []
    for finding in (light, heavy):
        assert isinstance(finding.measured, float)
        assert isinstance(finding.error, float)
        figures.append((finding.measured, finding.error))
    (slight, _), (heavier, error) = figures
    assert heavier > 5 * error > 0  # told from f16
    assert heavier > 3 * abs(slight)
    scored = [request["cache"] for request in calls.requests if "models" in request]
    assert scored == ["f16", "q8_0", "q4_0"]

    count = len(calls.requests)
    assert judge(case(gguf, config(model, text(), max_cache_kld=0.001), shared)) == found
    assert len(calls.requests) == count  # all of it was kept

    # As when a converter drops the scaling: the short windows of the other checks do not show it.
    lost = [f"llama.rope.scaling.{key}" for key in ("type", "factor", "original_context_length")]
    wrong = tampering.tampered(gguf, tmp_path / "wrong-F16.gguf", drop=lost)
    found = judge(case(wrong, config(model, text(), kv=["f16"]), shared))
    assert tampering.regressions(found) == {f"kld_{LENGTH}"}


@pytest.mark.e2e
def test_a_sentence_is_asked_for_with_each_cache(calls: Calls, tmp_path: Path) -> None:
    """llama.cpp turns keys before it rounds them to four bits, so a sound file copies with that cache, too."""
    folder = induction.write_induction(tmp_path / "induction")
    file = tampering.convert(folder, tmp_path / "induction-BF16.gguf")
    hay = tmp_path / "hay.txt"
    hay.write_text("".join(letter for letter in text().read_text()[:3000] if letter not in "=0123456789"))
    wanted = config(folder, hay, lengths=[512], kv=["q4_0", "fp8"], needle=True)
    workspace = Workspace(tmp_path / "run")
    found = judge(case(file, wanted, workspace))
    assert (found["retrieval_q4_0"].verdict, found["retrieval_q4_0"].measured) == (Verdict.PASS, 1)
    asked = [request.get("cache") for request in calls.requests if "depths" in request]
    assert asked == [None, "q4_0"]
    assert (found["cache_fp8"].verdict, "vLLM" in found["cache_fp8"].detail) == (Verdict.SKIPPED, True)

    # As when a converter drops the rotary settings: neighbours are not told apart any more.
    wrong = tampering.tampered(file, tmp_path / "wrong-BF16.gguf", {"llama.rope.freq_base": 10000.0})
    lost = judge(case(wrong, wanted, workspace))["retrieval_q4_0"]
    assert (lost.verdict, lost.measured) == (Verdict.REGRESSION, 0)


def test_nothing_is_tried_unless_it_is_configured(tmp_path: Path) -> None:
    wanted = making.config(making.TINY, tmp_path, "F16")
    (found,) = judge(case(tmp_path, wanted, Workspace(tmp_path))).values()
    assert found.verdict == Verdict.SKIPPED


def test_lengths_that_the_model_does_not_read_are_refused() -> None:
    wanted = config(making.TINY, text(), lengths=[4096])
    check = find_check("long")
    assert check.require is not None
    with pytest.raises(ConfigError, match="4096 tokens, but tiny-chat reads no more than 2048"):
        check.require(wanted, resolve(wanted, weights=True, progress=QUIET))


def test_a_mean_for_each_quarter_of_the_scored_half() -> None:
    windows = np.concatenate([np.repeat([0.0, 1.0, 2.0, 3.0], [2, 2, 2, 1])] * 2).astype(np.float32)
    buckets = by_position(windows, 16)  # positions 8 to 14 are scored
    assert [(bucket.positions.start, bucket.positions.stop) for bucket in buckets] == [
        (8, 9),
        (9, 11),
        (11, 13),
        (13, 15),
    ]
    assert buckets[0].mean.value == 0
    assert buckets[3].mean.value == pytest.approx(2.5)
