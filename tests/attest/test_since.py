"""The card's section on what changed since the release at the destination."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.loopback import REPO, write_job
from tests.pushing import WritableHub

pytestmark = [
    pytest.mark.usefixtures("plugin"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own PUT
]


def job(tmp_path: Path, divergence: float, **publish: Any) -> Path:
    return write_job(
        tmp_path,
        {
            "repo_id": REPO, "push_to_hub": True, "publish": publish,
            "quantization_config": {"only": "Q8_0", "divergence": divergence},
        },
    )  # fmt: skip


def card(hub: WritableHub) -> str:
    return hub.repositories[REPO].files["README.md"].decode()


@pytest.fixture
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("own_hub_cache")
def test_a_release_says_what_changed_since_the_one_before(
    tmp_path: Path, hub: WritableHub, quantool: Callable[..., Any]
) -> None:
    done = quantool(job(tmp_path, 0.00031, tag="v1.1"), "-q")
    assert done.code == 0, done.err
    assert "## Since" not in card(hub)
    done = quantool(job(tmp_path, 0.00027), "-q")
    assert done.code == 0, done.err
    wanted = (
        "## Since the release before\n\nSince v1.1:\n\n- Q8_0: mean KLD 0.00031 → 0.00027\n\n## Verdicts\n"
    )
    assert wanted in card(hub)
    commit = hub.repositories[REPO].commit
    done = quantool(job(tmp_path, 0.00027), "-q", "--json")
    (publication,) = json.loads(done.out)["publications"]
    assert publication["sent"] == [], "the same files again are the same card"
    assert wanted in card(hub)
    assert hub.repositories[REPO].commit == commit
