"""Every error that a user can cause or mend, one exit code per kind.

::

    QuantoolError
    ├── ConfigError         2   the YAML file, an override or an argument is wrong
    ├── SourceError         2   the checkpoint is missing, damaged, or of a kind that cannot be used
    ├── DependencyError     3   a library, tool, disk space or lock is missing here
    ├── QuantizationError   4   a method failed on a sound input
    ├── GateError           5   an artifact did not pass its gates (the report is written)
    └── PublicationError    6   the Hub refused, or what it stored differs

130 stands for an interruption, 1 for anything else that is raised: a bug, whose traceback is written to a file.
"""

INTERRUPTED = 130


class QuantoolError(Exception):
    """A failure with advice.

    ``message`` names the value and the place, ``hint`` (may be empty) says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(QuantoolError):
    """The configuration is wrong; the message lists every mistake found."""

    exit_code = 2


class SourceError(QuantoolError):
    """The checkpoint is missing, damaged or not usable."""

    exit_code = 2


class DependencyError(QuantoolError):
    """Something this machine lacks: a library, a tool, disk space, a free output folder."""

    exit_code = 3


class QuantizationError(QuantoolError):
    """A method failed."""

    exit_code = 4


class GateError(QuantoolError):
    """At least one artifact did not pass its gates."""

    exit_code = 5


class PublicationError(QuantoolError):
    """The upload failed or its verification did."""

    exit_code = 6


BY_NAME: dict[str, type[QuantoolError]] = {
    kind.__name__: kind
    for kind in (ConfigError, SourceError, DependencyError, QuantizationError, GateError, PublicationError)
}


def nearest(value: str, known: list[str]) -> str:
    """A sentence naming the entries of ``known`` most like ``value``, or an empty string."""
    from difflib import get_close_matches

    folded = {name.lower(): name for name in known}
    found = [folded[name] for name in get_close_matches(value.lower(), folded, n=2, cutoff=0.5)]
    return f"did you mean {' or '.join(found)}?" if found else ""
