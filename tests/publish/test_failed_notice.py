"""--allow-regression: what did not pass may go out, and the card, the record and the exit code say so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantool.config.load import load
from quantool.errors import ConfigError
from quantool.plugins import find
from quantool.publish.package import with_notice
from quantool.publish.packed_folder import NOTICE, read_packed_folder
from quantool.records import Publication, sha256_of
from tests.loopback import REPO, content, edit, write_job
from tests.pushing import WritableHub

Run = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own PUT


@pytest.fixture
def failed(folder: Path) -> Path:
    """The folder, with a level that did not pass."""

    def fail(record: dict[str, Any]) -> None:
        record["reports"][0]["findings"][0] |= {"verdict": "REGRESSION", "measured": 0.5, "threshold": 0.01}

    edit(folder, fail)
    card, sums = folder / "README.md", folder / "SHA256SUMS"
    before = sha256_of(card)
    card.write_text(with_notice(card.read_text(), read_packed_folder(folder).reports))
    sums.write_text(sums.read_text().replace(before, sha256_of(card)))
    return folder


def test_a_folder_that_did_not_pass_goes_out_with_a_warning(
    publish: Run, failed: Path, hub: WritableHub
) -> None:
    assert publish().code == 5
    assert hub.asked == []
    ended = publish("--allow-regression", "--json")
    assert ended.code == 5
    assert "warning: fake/Q8_0 did not pass (REGRESSION) and is published all the same" in ended.err
    assert "what is published did not all pass" in ended.err
    made = Publication.model_validate_json(ended.out)
    assert made.allow_regression
    files = hub.repositories[REPO].files
    assert content(failed).items() <= files.items()
    card = files["README.md"].decode()
    assert card.index("\n# model-FAKE\n") < card.index(NOTICE) < card.index("## ", card.index(NOTICE) + 3)
    assert re.search(
        r"^- Q8_0: REGRESSION in \w+: mean_kld 0\.50* .*on text, limit 0\.01$", card, re.MULTILINE
    ), card
    assert "- Q4_K_M: " not in card[card.index(NOTICE) : card.index("\n## ", card.index(NOTICE) + 3)]
    (body,) = [asked.body for asked in hub.sent("POST", "/commit/main")]
    assert b"Published with --allow-regression: Q8_0 did not pass." in body
    assert {line[66:]: line[:64] for line in files["SHA256SUMS"].decode().splitlines()} == {
        name: sha256_of(failed / name) for name in content(failed) if name != "SHA256SUMS"
    }


def test_the_permission_is_asked_for_every_time(publish: Run, failed: Path, hub: WritableHub) -> None:
    assert publish("--allow-regression").code == 5
    before = content(failed)
    hub.asked.clear()
    assert publish().code == 5  # what the record says of an earlier time is no permission
    assert hub.asked == []
    ended = publish("--allow-regression")
    assert (ended.code, "nothing was new" in ended.out) == (5, True)
    assert content(failed) == before


def test_what_passed_needs_no_warning(publish: Run, folder: Path, hub: WritableHub) -> None:
    before = content(folder)
    assert publish("--allow-regression").code == 0
    assert content(folder) == before


def test_what_was_not_judged_stays_here_all_the_same(publish: Run, failed: Path, hub: WritableHub) -> None:
    edit(failed, lambda record: record["reports"].pop())
    ended = publish("--allow-regression")
    assert (ended.code, "fake/Q4_K_M: not judged" in ended.err) == (5, True)
    assert hub.asked == []


def test_a_card_that_was_changed_is_not_signed_again(publish: Run, failed: Path, hub: WritableHub) -> None:
    with (failed / "README.md").open("a") as card:
        card.write("All is well.\n")
    ended = publish("--allow-regression")
    assert (ended.code, "differs from SHA256SUMS: README.md" in ended.err) == (6, True), ended.err
    assert REPO not in hub.repositories


def test_a_card_that_does_not_say_it_is_refused(publish: Run, folder: Path, hub: WritableHub) -> None:
    edit(folder, lambda record: record["reports"][0]["findings"][0].update(verdict="REGRESSION"))
    ended = publish("--allow-regression")
    assert (ended.code, "README.md does not say what did not pass" in ended.err) == (6, True), ended.err
    assert hub.asked == []


def test_a_run_with_and_without_the_permission(
    tmp_path: Path, plugin: Path, quantool: Run, hub: WritableHub
) -> None:
    options = {"only": "Q8_0", "divergence": 9.0}
    job = write_job(tmp_path, {"repo_id": REPO, "push_to_hub": True, "quantization_config": options})
    ended = quantool(job)
    assert (ended.code, hub.repositories) == (5, {})
    assert "is not published: fake/Q8_0 did not pass" in ended.err
    ended = quantool(job, "--allow-regression")
    assert ended.code == 5
    assert "1 of 2 artifacts did not pass" in ended.err
    assert "published: " in ended.out
    files = hub.repositories[REPO].files
    assert NOTICE in files["README.md"].decode()
    folder = tmp_path / "out" / "model-FAKE"
    assert content(folder).items() <= files.items()
    assert [report.artifact.level for report in read_packed_folder(folder).failed] == ["Q8_0"]
    before = content(folder)
    assert quantool(job).code == 5
    assert content(folder) == before  # packed the same, whether it goes out or not


def test_no_configuration_gives_the_permission(tmp_path: Path, plugin: Path) -> None:
    for keys in ({"allow_regression": True}, {"publish": {"allow_regression": True}}):
        with pytest.raises(ConfigError, match="allow_regression"):
            load(write_job(tmp_path, keys), (), find)


@pytest.mark.parametrize(
    ("card", "before", "after"),
    [
        ("---\na: 1\n---\n# Title\n\nText\n", "---\na: 1\n---\n# Title\n", "\nText\n"),
        ("---\na: 1\n---\n\nOwn text\n", "---\na: 1\n---\n", "\nOwn text\n"),
        ("Own text\n", "", "\nOwn text\n"),
    ],
)
def test_the_warning_stands_first_in_any_card(failed: Path, card: str, before: str, after: str) -> None:
    reports = read_packed_folder(failed).reports
    warned = with_notice(card, reports)
    assert warned.startswith(before)
    assert warned.endswith(after)
    assert warned.index(NOTICE) < warned.index("ext\n")
    assert with_notice(card, reports[1:]) == card
