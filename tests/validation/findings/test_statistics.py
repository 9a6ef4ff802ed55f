import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quantool.records import Finding, Gates, Verdict
from quantool.validation import perplexity
from quantool.validation._engines import head
from quantool.validation._findings.statistics import Estimate, Tokens, summarize

TOKENS = 3000


def sample(seed: int = 3) -> Tokens:
    """Scores with correlated likelihoods and a long-tailed divergence."""
    random = np.random.default_rng(seed)
    reference = random.gamma(2.0, 1.5, TOKENS).astype(np.float32)
    nll = np.maximum(reference + random.normal(0.02, 0.2, TOKENS), 0.001).astype(np.float32)
    return Tokens(
        nll_reference=reference,
        nll=nll,
        kld=random.exponential(0.03, TOKENS).astype(np.float32),
        same_top=(random.random(TOKENS) < 0.9).astype(np.float32),
    )


def test_statistics_are_those_of_llama_perplexity() -> None:
    tokens = sample()
    scores = summarize(tokens)
    nll, reference = tokens.nll.astype(float), tokens.nll_reference.astype(float)
    assert scores.perplexity.value == pytest.approx(math.exp(nll.mean()))
    assert scores.ln_ppl_ratio.value == pytest.approx(nll.mean() - reference.mean())
    # Its own formula for the paired error: both variances less twice the covariance.
    error = nll.var() + reference.var() - 2 * ((nll * reference).mean() - nll.mean() * reference.mean())
    assert scores.ln_ppl_ratio.error == pytest.approx(math.sqrt(error / (TOKENS - 1)), rel=1e-6)
    change = np.exp(-nll) - np.exp(-reference)
    assert scores.rms_dp.value == pytest.approx(math.sqrt((change**2).mean()))
    for name, fraction in (("kld_median", 50), ("kld_99", 99), ("kld_999", 99.9), ("kld_max", 100)):
        assert getattr(scores, name).value == pytest.approx(np.percentile(tokens.kld, fraction), rel=1e-6)
    assert scores.same_top_p.value == pytest.approx(tokens.same_top.mean())


def bootstrap(tokens: Tokens, rounds: int = 400) -> dict[str, NDArray[np.float64]]:
    random = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        rows = random.integers(0, TOKENS, TOKENS)
        drawn = Tokens(tokens.nll_reference[rows], tokens.nll[rows], tokens.kld[rows], tokens.same_top[rows])
        for name, value in vars(summarize(drawn)).items():
            if isinstance(value, Estimate):
                found.setdefault(name, []).append(value.value)
    return {name: np.array(values) for name, values in found.items()}


def test_error_bars_are_what_drawing_again_shows() -> None:
    tokens = sample()
    scores = summarize(tokens)
    for name, values in bootstrap(tokens).items():
        if name == "kld_max":  # the bootstrap is not consistent for an extreme
            continue
        tolerance = 0.5 if name == "kld_999" else 0.25
        assert getattr(scores, name).error == pytest.approx(values.std(), rel=tolerance), name


def test_the_error_of_the_maximum_is_its_jackknife() -> None:
    tokens = sample()
    left_out = np.array([np.delete(tokens.kld, row).max() for row in range(TOKENS)], dtype=float)
    jackknife = math.sqrt((TOKENS - 1) / TOKENS * ((left_out - left_out.mean()) ** 2).sum())
    assert summarize(tokens).kld_max.error == pytest.approx(jackknife, rel=1e-3)


def test_identical_scores_have_no_errors_and_no_overflow() -> None:
    same = np.full(10, 2000.0, dtype=np.float32)
    scores = summarize(Tokens(same, same, same * 0, same * 0 + 1))
    assert scores.ln_ppl_ratio == Estimate(0, 0)
    assert scores.rms_dp == Estimate(0, 0)
    assert scores.same_top_p == Estimate(1, 0)
    assert math.isfinite(scores.perplexity.value)


def test_scores_are_saved(tmp_path: Path) -> None:
    tokens = sample()
    tokens.save(tmp_path / "a.npz")
    again = Tokens.load(tmp_path / "a.npz")
    assert all(np.array_equal(getattr(tokens, name), getattr(again, name)) for name in vars(tokens))


def test_comparison_against_float64() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(50, 333, generator=generator) * 3
    theirs = ours + torch.randn(50, 333, generator=generator) * 0.3
    targets = torch.randint(0, 333, (50,), generator=generator)
    found = head.compare(ours.log_softmax(-1), theirs, targets)
    assert found is not None
    p, q = (np.exp(values.double().numpy()) for values in (ours, theirs))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    rows = np.arange(50)
    expected = (
        -np.log(p[rows, targets]),
        -np.log(q[rows, targets]),
        (p * np.log(p / q)).sum(1),
        p.argmax(1) == q.argmax(1),
    )
    for got, wanted in zip(found.numpy(), expected, strict=True):
        assert np.allclose(got, wanted, atol=3e-6)


def test_comparison_refuses_what_is_not_finite() -> None:
    import torch

    good = torch.randn(4, 9)
    for bad in (math.nan, math.inf, -math.inf):
        logits = good.clone()
        logits[2, 3] = bad
        assert head.compare(good.log_softmax(-1), logits, torch.zeros(4).long()) is None


def test_padding_is_left_out_and_a_short_vocabulary_refused() -> None:
    assert head.common_vocabulary(100, 100, 90) == 100
    assert head.common_vocabulary(128, 100, 90) == 100
    assert head.common_vocabulary(90, 128, 90) == 90
    with pytest.raises(head.Unsound, match="has 80 entries, that of the reference 128"):
        head.common_vocabulary(128, 80, 90)


def gated(ratio: Estimate, gates: Gates) -> Finding:
    scores = summarize(sample())
    changed = type(scores)(**{**vars(scores), "ln_ppl_ratio": ratio})
    found = perplexity.findings_of(changed, "c", gates)
    return next(finding for finding in found if finding.metric == "ln_ppl_ratio")


@pytest.mark.parametrize(
    ("value", "error", "verdict", "words"),
    [
        (0.009, 0.001, Verdict.PASS, "upper limit 0.01"),
        (0.0115, 0.001, Verdict.PASS, "within noise of the upper limit 0.01"),
        (0.0125, 0.001, Verdict.REGRESSION, "beyond the upper limit 0.01"),
        (-0.021, 0.001, Verdict.ANOMALOUS, "better than the reference"),
        (-0.021, 0.008, Verdict.PASS, "upper limit"),
        (-0.019, 0.001, Verdict.PASS, "upper limit"),
        (math.nan, 0.001, Verdict.REGRESSION, "beyond"),
    ],
)
def test_gates(value: float, error: float, verdict: Verdict, words: str) -> None:
    finding = gated(Estimate(value, error), Gates(max_ln_ppl_ratio=0.01))
    assert finding.verdict is verdict
    assert words in finding.detail


def test_lower_limits_and_no_limits() -> None:
    scores = summarize(sample())
    share = scores.same_top_p
    for limit, verdict in (
        (share.value - 0.01, Verdict.PASS),
        (share.value + share.error, Verdict.PASS),
        (share.value + 3 * share.error, Verdict.REGRESSION),
    ):
        found = perplexity.findings_of(scores, "c", Gates(min_same_top_p=limit))
        assert next(one for one in found if one.metric == "same_top_p").verdict is verdict
    assert {one.verdict for one in perplexity.findings_of(scores, "c", Gates())} == {Verdict.PASS}


def test_a_corpus_overrides_gates_field_by_field() -> None:
    gates = Gates(max_ln_ppl_ratio=0.1, max_mean_kld=0.2, min_same_top_p=0.9)
    own = Gates(max_mean_kld=0.5, min_same_top_p=None)
    assert perplexity.merged(gates, own) == Gates(max_ln_ppl_ratio=0.1, max_mean_kld=0.5)
    assert perplexity.merged(gates, None) == gates
