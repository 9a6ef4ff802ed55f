"""What can be said of the vLLM engine without a GPU: its arithmetic, what it reads from the log, and that it says when absent."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from quantool.errors import DependencyError
from quantool.validation._engines import vllm
from quantool.validation._engines.head import Unsound, compare
from quantool.validation._engines.start import start

POSITIONS, VOCABULARY = 5, 40


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the reference, logits of the artifact, and the tokens that came."""
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(POSITIONS, VOCABULARY, generator=generator) * 2
    artifact = reference + torch.randn(POSITIONS, VOCABULARY, generator=generator) * 0.5
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    return reference.log_softmax(-1), artifact, targets


def told(artifact: torch.Tensor, targets: torch.Tensor, count: int) -> list[dict[int, float]]:
    """What an engine says that knows of ``count`` tokens and of the one that came."""
    rows = []
    for log_q, target in zip(artifact.log_softmax(-1), targets.tolist(), strict=True):
        wanted = [*log_q.topk(count).indices.tolist(), target]
        rows.append({token: float(log_q[token]) for token in wanted})
    return rows


def test_all_tokens_give_the_scores_of_whole_logits(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    log_p, artifact, targets = logits
    whole = compare(log_p, artifact, targets)
    assert whole is not None
    torch.testing.assert_close(
        vllm.divergence(log_p, told(artifact, targets, VOCABULARY), targets), whole, rtol=1e-5, atol=1e-5
    )


def test_few_tokens_give_a_lower_bound_of_the_divergence_alone(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    log_p, artifact, targets = logits
    whole = compare(log_p, artifact, targets)
    assert whole is not None
    part = vllm.divergence(log_p, told(artifact, targets, 4), targets)
    torch.testing.assert_close(part[[0, 1, 3]], whole[[0, 1, 3]], rtol=1e-5, atol=1e-5)
    assert (part[2] <= whole[2] + 1e-6).all()
    assert (part[2] > 0.2 * whole[2]).all()


def test_log_probability_that_is_not_finite_is_unsound(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    log_p, artifact, targets = logits
    rows = told(artifact, targets, 4)
    rows[2][targets[2].item()] = float("nan")  # type: ignore[index]
    with pytest.raises(Unsound, match="not finite"):
        vllm.divergence(log_p, rows, targets)


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (
            "Selected CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8",
            ["CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8"],
        ),
        (
            "Using MacheteLinearKernel for AutoAWQMarlinLinearMethod",
            ["MacheteLinearKernel for AutoAWQMarlinLinearMethod"],
        ),
        ("Using FLASH_ATTN attention backend", []),
    ],
)
def test_kernels_are_read_from_the_log(message: str, names: list[str]) -> None:
    logger = logging.getLogger("served")
    logger.setLevel(logging.INFO)
    kernels = vllm.Kernels()
    logger.addHandler(kernels)
    try:
        logger.info("%s", message)
        logger.info("%s", message)
    finally:
        logger.removeHandler(kernels)
    assert kernels.names == names


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_absent_vllm_is_said(tmp_path: Path) -> None:
    held = start("vllm", tmp_path, context=64, device="auto", trust_remote_code=False)
    with pytest.raises(DependencyError, match="vLLM, which is not installed"), held:
        pass
