"""How a command ends: its result on standard output; errors as a message, a hint and an exit code on standard error."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import typer

from quantool.errors import INTERRUPTED, DependencyError, GateError, QuantoolError

if TYPE_CHECKING:
    from quantool.pipeline import RunResult
    from quantool.records import Publication
    from quantool.runtime.progress import Progress

P = ParamSpec("P")


def interrupt(_number: int, _frame: object) -> None:
    """Let a signal end the program as Ctrl-C does."""
    raise KeyboardInterrupt


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Turn quantool's errors into a message and their exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except QuantoolError as error:
            show_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            complain("interrupted; finished stages are kept, run the same command again to go on")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # `| head`: typer ends without a word
            raise
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            complain(f"error: {error.strerror or error}{place}")
            raise typer.Exit(DependencyError.exit_code) from None
        except typer.Exit:
            raise
        except Exception as error:  # noqa: BLE001 - a bug: the user gets one line, who mends it the traceback
            from quantool.runtime.unforeseen import written_down

            show_error(written_down(error))
            raise typer.Exit(QuantoolError.exit_code) from None

    return wrapped


def show_error(error: QuantoolError) -> None:
    """Print an error and its hint."""
    complain(f"error: {error.message}")
    if error.hint:
        complain(f"hint: {error.hint}")


def complain(text: str) -> None:
    """Print a line to standard error."""
    typer.echo(text, err=True)


def publication_line(made: Publication) -> str:
    """One line on a publication."""
    sent = f"{len(made.sent)} of {len(made.files)} files sent" if made.sent else "nothing was new"
    tag = f", tagged {made.tag}" if made.tag else ""
    return f"{made.url}: {sent}, all compared{tag}"


def end_run(result: RunResult, progress: Progress, output: Path, *, as_json: bool) -> None:
    """Print what a run in the folder ``output`` ended with; raise the first of what went wrong."""
    show_run(result, progress, as_json=as_json)
    errors: list[QuantoolError] = list(result.refused)
    if result.failed:
        failed = GateError(
            f"{len(result.failed)} of {len(result.reports)} artifacts did not pass",
            hint=f"findings: {output / 'report.md'}; thresholds: validation.gates",
        )
        errors.insert(0, failed)
    for error in errors[1:]:
        show_error(error)
    if errors:
        raise errors[0]


def show_run(result: RunResult, progress: Progress, *, as_json: bool) -> None:
    """Print what a run ended with: the table (or all records as JSON), what failed, where the folders are."""
    from quantool.report.finding_text import failures
    from quantool.report.recommend import folders
    from quantool.report.table import table, terminal_width, write_step_summary

    try:
        write_step_summary(result.reports)
    except OSError as error:  # the result is worth more than its copy
        progress.warn(f"the table is not in $GITHUB_STEP_SUMMARY: {error.strerror or error}")
    if as_json:
        reports = [
            report.model_dump(mode="json") | {"verdict": report.verdict()} for report in result.reports
        ]
        publications = [made.model_dump(mode="json") for made in result.publications]
        record = {
            "plan": result.plan.model_dump(mode="json"), "reports": reports, "publications": publications,
        }  # fmt: skip
        typer.echo(json.dumps(record, indent=1))
        return
    typer.echo(table(result.reports, terminal_width()))
    for line in failures(result.reports):
        complain(line)
    for line in folders(result.reports):
        progress.say(line)
    for made in result.publications:
        typer.echo(f"published: {publication_line(made)}")
