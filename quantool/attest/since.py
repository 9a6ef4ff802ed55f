"""What changed since the release that stands where a new one goes: a short section for the card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantool.attest.compare import figures
from quantool.attest.release import CARD, RECORD, Release, read_release
from quantool.config.schema import Config
from quantool.errors import ConfigError, DependencyError, SourceError
from quantool.hub.download import fetch, hub_errors, list_repository
from quantool.records import Plan, Report
from quantool.runtime.progress import Progress

HEADING = "## Since the release before"
SECTION = re.compile(rf"^{HEADING}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BEHIND = "## Verdicts\n"
"""Heading of the card that the section stands before."""
TOLD = ("mean KLD", "size", "verdict")
"""Figures that are told; all others are in ``quantool diff``."""


@dataclass(frozen=True)
class EarlierRelease:
    """A release on the Hub, and its card."""

    release: Release
    card: str
    name: str
    """Its tag, or the beginning of its commit."""


def earlier_releases(config: Config, plan: Plan, progress: Progress) -> dict[str, EarlierRelease]:
    """By folder to publish, what stands at its destination; nothing where nothing is published or there is no release."""
    if not config.push_to_hub or config.card.template is not None:
        return {}
    found = {}
    for output in plan.outputs:
        if output.repo_id and output.repo not in found:
            earlier = _earlier(output.repo_id, config.publish.revision, progress)
            if earlier is not None:
                found[output.repo] = earlier
    return found


def _earlier(repo_id: str, revision: str, progress: Progress) -> EarlierRelease | None:
    try:
        listing = list_repository(repo_id, revision, None)
        if RECORD not in listing.sizes:
            return None
        fetch(repo_id, listing, tuple(name for name in (RECORD, CARD) if name in listing.sizes), None, None)
        card = listing.folder / CARD
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        return EarlierRelease(read_release(listing.folder), text, _name(repo_id, listing.commit))
    except (SourceError, ConfigError):  # no such repository or branch, or no record that can be read
        return None
    except DependencyError as error:
        progress.warn(f"the card does not say what changed since the release before: {error.message}")
        return None


def _name(repo_id: str, commit: str) -> str:
    from huggingface_hub import HfApi

    with hub_errors(repo_id, commit):
        tags = HfApi().list_repo_refs(repo_id).tags
    return next((tag.name for tag in tags if tag.target_commit == commit), f"`{commit[:7]}`")


def with_changes(card: str, earlier: EarlierRelease | None, reports: Sequence[Report]) -> str:
    """The card with the section, if there is something to tell.

    Where the same files are published again, the section of the card before stays: a rerun changes nothing.
    """
    if earlier is None or BEHIND not in card:
        return card
    before = {output.id: output.report for output in earlier.release.outputs}
    if {name: _hashes(report) for name, report in before.items()} == {
        report.artifact.output: _hashes(report) for report in reports
    }:
        kept = SECTION.search(earlier.card)
        section = kept[0] if kept else ""
    else:
        section = _section(earlier, before, reports)
    return card.replace(BEHIND, f"{section}{BEHIND}", 1)


def _section(earlier: EarlierRelease, before: dict[str, Report], reports: Sequence[Report]) -> str:
    lines = []
    for report in reports:
        level, old = report.artifact.level, before.get(report.artifact.output)
        changed = [] if old is None else figures(level, old, report)
        told = [
            f"{name} {change.before} → {change.after}"
            for name in TOLD
            for change in changed
            if change.name == f"{level} {name}"
        ]
        if old is None:
            lines.append(f"- {level}: new")
        elif told:
            lines.append(f"- {level}: {', '.join(told)}")
    gone = before.keys() - {report.artifact.output for report in reports}
    lines += [f"- {before[name].artifact.level}: not made any more" for name in before if name in gone]
    return f"{HEADING}\n\nSince {earlier.name}:\n\n" + "\n".join(lines) + "\n\n" if lines else ""


def _hashes(report: Report) -> list[str]:
    return [file.sha256 for file in report.artifact.files]
