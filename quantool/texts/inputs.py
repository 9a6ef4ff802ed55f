"""The texts that a configuration leads to, by what a change of them is known by: what keys of kept results count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quantool.config.schema import Config, Corpus
from quantool.records import fingerprint
from quantool.texts import corpus


def held_out(config: Config) -> Iterator[tuple[str, str | None]]:
    """Every evaluation text, in order."""
    for number, entry in enumerate(corpus.corpora(config)):
        yield f"{number} {_name(entry)}", corpus.identity(entry)


def calibration(config: Config) -> Iterator[tuple[str, str | None]]:
    """The calibration text, where the configuration names one."""
    if (origin := corpus.calibration_corpus(config)) is not None:
        yield _name(origin), corpus.identity(origin)


def calibration_by_name(config: Config) -> Iterator[tuple[str, str | None]]:
    """The same for what is made with it: a data set on the Hub is taken as unchanged, else nothing would be kept."""
    for name, identity in calibration(config):
        yield name, identity or "by name"


def conversations(config: Config) -> Iterator[tuple[str, str | None]]:
    """The user's conversations to render."""
    yield from _file("conversations", config.validation.conversations)


def prompts(config: Config) -> Iterator[tuple[str, str | None]]:
    """The user's conversations to answer."""
    yield from _file("prompts", config.validation.behaviour.prompts)


def haystack(config: Config) -> Iterator[tuple[str, str | None]]:
    """The text to hide sentences in, where any are hidden."""
    settings = config.validation.needle
    if settings is not None and settings.haystack is not None:
        yield from _file("haystack", settings.haystack)
    elif settings is not None:
        yield next(held_out(config))


def long_haystack(config: Config) -> Iterator[tuple[str, str | None]]:
    """The text to hide sentences in at the lengths of ``validation.long``: the first corpus."""
    if config.validation.long is not None:
        yield next(held_out(config))


def _file(name: str, path: Path | None) -> Iterator[tuple[str, str | None]]:
    if path is not None:
        yield name, corpus.identity(Corpus(name=name, path=path))


def _name(entry: Corpus) -> str:
    """The name in reports; of a data set where it comes from as well. A file counts by what it holds."""
    origin = fingerprint(entry.dataset, entry.config, entry.split, entry.field)[:16] if entry.dataset else ""
    return f"{entry.name} {origin}".strip()
